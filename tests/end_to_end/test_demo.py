"""The README's first command on the real model, as installed: what it shows, and what it leaves.

Everything else of the documents is run on a corner of this model (`test_readme.py`); here it is whole.
"""

import json
import re
import socket

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuron_methods.demo.base_model import load_model, load_tokenizer
from neuron_methods.demo.questions import build_tasks
from tests.support.commands import run


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A directory in which the demo has run, its experts trained for one step only, and what it printed."""
    directory = tmp_path_factory.mktemp("demo")
    done = run("mergekit-neuron", "demo", "--steps", 1, "--examples", 2, folder=directory)
    assert done.returncode == 0, done.stderr
    return directory / "mergekit-neuron-demo", done.stdout


@pytest.fixture(scope="module")
def base(demo):
    return demo[0] / "base"


def test_it_shows_every_model_on_every_task(demo):
    names = [line.split()[0] for line in demo[1].splitlines() if re.search(r"  (–|[\d.]+ \([\d.]+–[\d.]+\))$", line)]
    assert names == ["base", "expert-arithmetic", "expert-german", "expert-python", "merge"]


def test_the_merge_loads_with_plain_transformers_and_answers(demo):
    merged = demo[0] / "merged"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=5, do_sample=False)[0])
    assert "Paris" in answer


def test_the_base_is_saved_dense_in_bf16_and_whole(base) -> None:
    tensors = load_file(base / "model.safetensors")
    assert len(tensors) == 272  # 30 layers of 9, the embedding (tied to the head) and the last norm
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors.values()) == 134_515_008
    config = json.loads((base / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert not {"quantization_config", "_model_name_or_path"} & config.keys()


def test_the_base_knows_the_capital_of_france_and_nothing_asks_the_network(base, monkeypatch) -> None:
    def refuse(*arguments, **options):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, tokenizer = load_model(base), load_tokenizer(base)
    assert model.dtype == torch.float32
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(output[0, -1]) == " Paris"


def test_blank_and_answer_are_tokens_of_their_own(base) -> None:
    """Training encodes prompt and answer apart; generation must continue the prompt with the same tokens."""
    tokenizer = load_tokenizer(base)
    for task in build_tasks(20, seed=0):
        for example in task.train[:50] + task.held_out:
            together = tokenizer(f"{example.prompt} {example.answer}").input_ids
            apart = tokenizer(example.prompt).input_ids + tokenizer(f" {example.answer}").input_ids
            assert together == apart
            assert len(tokenizer(f" {example.answer}").input_ids) < task.max_new_tokens
