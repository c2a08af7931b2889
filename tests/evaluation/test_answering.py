"""`mergekit-neuron generate` with plain models: several asked the same, side by side."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer, ViTImageProcessor

from neuron_methods.cli import main
from tests.support.tiny import save_experts, write_images


def generate(*line, code=0):
    result = CliRunner().invoke(main, ["generate", *line])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_model_goes_on_by_itself(folder):
    save_experts(folder, "llama", scale=1.0)
    told = generate(
        "base", "expert-a", "--prompt", "one two", "--prompt", "red", "--max-new-tokens", "6", "--json"
    ).stdout
    said = {(line["model"], line["input"]): line["answer"] for line in map(json.loads, told.splitlines())}
    assert list(said) == [(model, prompt) for model in ("base", "expert-a") for prompt in ("one two", "red")]
    loaded = {model: AutoModelForCausalLM.from_pretrained(model) for model in ("base", "expert-a")}
    tokenizer = AutoTokenizer.from_pretrained("base")
    for (model, prompt), answer in said.items():
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                following = loaded[model](ids).logits[:, -1].argmax(-1, keepdim=True)
            if following.item() == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following], 1)
        asked = len(tokenizer(prompt)["input_ids"])
        assert answer == tokenizer.decode(ids[0, asked:], skip_special_tokens=True).strip()
    assert len(set(said.values())) > 1


def test_an_answer_of_a_text_to_text_model_is_below_what_was_asked(folder):
    save_experts(folder, "t5")
    lines = generate("base", "--prompt", "one two", "--max-new-tokens", "3").stdout.splitlines()
    assert lines[0] == "base: one two" and lines[1].startswith("  answer:")


def test_images_are_classified_and_what_a_model_does_not_read_is_one_line(folder):
    from PIL import Image

    save_experts(folder, "vit")
    write_images(folder / "images", 1)
    lines = generate("base", "expert-a", "--image", "images/cat/0.png").stdout.splitlines()
    pixels = ViTImageProcessor.from_pretrained("base")(Image.open("images/cat/0.png"), return_tensors="pt")
    for model, asked, answer in zip(("base", "expert-a"), lines[::2], lines[1::2], strict=True):
        classifier = AutoModelForImageClassification.from_pretrained(model)
        with torch.no_grad():
            share, found = classifier(**pixels).logits.softmax(-1).max(-1)
        assert asked == f"{model}: images/cat/0.png"
        assert answer == f"  answer:  {classifier.config.id2label[found.item()]} ({share.item():.0%})"
    assert "classifies images; give --image" in generate("base", "--prompt", "one", code=1).stderr
    assert "cannot be read as an image" in generate("base", "--image", "base/config.json", code=1).stderr


def test_what_cannot_be_asked_is_one_line(folder):
    save_experts(folder, "llama")
    for line, told in (
        (["base", "nothing", "--prompt", "x"], "nothing"),
        (["base", "--image", "x.png"], "reads text; give --prompt"),
        (["base", "--prompt", ""], "no token in it"),
        (["base", "--prompt", "one", "--max-new-tokens", "100000"], "are more than the context of"),
    ):
        (said,) = generate(*line, code=1).stderr.splitlines()
        assert told in said and "unexpected" not in said
    assert "--sample is for one routed model" in generate("base", "--prompt", "x", "--sample", code=2).stderr


def test_a_yaml_is_read_on_stdin(folder):
    save_experts(folder, "llama")
    text = "merge_method: linear\nmodels: [{model: base, parameters: {weight: 1}}]\n"
    result = CliRunner().invoke(main, ["merge", "-", "out", "--dry-run"], input=text)
    assert result.exit_code == 0 and result.stdout.startswith("linear of 1 model")
    result = CliRunner().invoke(main, ["merge", "-", "out"], input="merge_method: [")
    assert result.exit_code == 1 and result.stderr.startswith("error: the YAML, line 1")
    assert CliRunner().invoke(main, ["merge", "-", "out"], input=b"\xff").stderr == (
        "error: the YAML on stdin: cannot be read (not UTF-8)\n"
    )
