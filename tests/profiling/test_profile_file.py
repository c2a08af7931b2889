"""Profiles as files: what they answer, and every way in which one can be wrong."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from neuron_methods.neurons import neuron_map
from neuron_methods.neurons.profile_file import exemplars_path
from neuron_methods.profiling import NeuronProfile, Settings, measure_profile
from neuron_methods.support.errors import UserError
from tests.support import tiny


@pytest.fixture
def path(llama, texts, tmp_path):
    output = tmp_path / "out" / "p.safetensors"
    measure_profile(str(llama), [f"a={texts}"], output, Settings(top=3))
    return output


def rewritten(path, tensors=None, **metadata):
    """The file with other tensors or metadata."""
    with safe_open(path, "pt") as file:
        values = {**file.metadata(), **metadata}
    save_file(load_file(path) if tensors is None else tensors, path, metadata=values)
    return path


def refused(path, match):
    with pytest.raises(UserError, match=match) as caught:
        NeuronProfile.load(path)
    assert str(path) in str(caught.value)


def test_what_it_says(path, llama, tmp_path):
    profile = NeuronProfile.load(path)
    assert profile.info.model == llama.name
    assert profile.info.model_type == "llama"
    assert profile.layers == {"layers.0": 24, "layers.1": 24}
    assert profile.info.gated == ["layers.0", "layers.1"]
    assert profile.sources == ("a",)
    assert profile.info.sources["a"].samples == 20
    assert profile.info.sources["a"].source == "texts.jsonl"
    assert set(profile.info.statistics) == {"mean_abs", "second_moment", "firing_rate"}
    assert profile.statistic("mean_abs", "a", "layers.1").shape == (24,)
    top = profile.top_activations("a", "layers.0")
    assert top.shape == (24, 3)
    assert (top.abs().diff(dim=1) <= 0).all()
    assert path.stat().st_mode == exemplars_path(path).stat().st_mode
    assert str(tmp_path) not in path.read_bytes().decode("latin-1")
    assert str(tmp_path) not in exemplars_path(path).read_text()


def test_each_exemplar_is_stored_once_and_its_text_is_that_of_the_sample(path, texts):
    lines = [json.loads(line) for line in exemplars_path(path).read_text().splitlines()]
    assert len({(line["row"], line["position"]) for line in lines}) == len(lines)
    samples = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    profile = NeuronProfile.load(path)
    for neuron in range(24):
        for exemplar in profile.exemplars("a", "layers.1", neuron):
            words = ["<s>", *samples[exemplar.row].split()]
            text = exemplar.text
            assert text["token"].strip() == words[exemplar.position]
            assert text["before"].split() == words[max(0, exemplar.position - 8) : exemplar.position]
            assert text["after"].split() == words[exemplar.position + 1 : exemplar.position + 9]


def test_questions_it_cannot_answer(path):
    profile = NeuronProfile.load(path)
    for question, match in (
        (lambda: profile.statistic("taylor", "a", "layers.0"), "no 'taylor' in it .*--gradients"),
        (lambda: profile.statistic("median", "a", "layers.0"), "no 'median' in it .there are: mean_abs"),
        (lambda: profile.statistic("mean_abs", "b", "layers.0"), "no data source 'b' in it .there are: a"),
        (lambda: profile.statistic("mean_abs", "a", "layers.7"), "no layer 'layers.7' in it .there are: layers.0"),
        (lambda: profile.exemplars("a", "layers.0", 24), "layers.0 has neurons 0 to 23, not 24"),
    ):
        with pytest.raises(UserError, match=match):
            question()


def test_there_is_none(tmp_path):
    refused(tmp_path / "none.safetensors", "there is no such profile")


@pytest.mark.parametrize("size", [0, 7, 500, -1])
def test_truncated(size, path):
    path.write_bytes(path.read_bytes()[:size])
    refused(path, "truncated or no safetensors")


def test_another_kind_of_file(path):
    save_file({"weight": torch.zeros(2)}, path)
    refused(path, "is no profile")


def test_another_version(path):
    refused(rewritten(path, version="7"), "has version 7, this program reads version 1")


def test_damaged_metadata(path):
    refused(rewritten(path, profile="{}"), "metadata of this profile is damaged")


def test_a_missing_layer(path):
    tensors = {name: tensor for name, tensor in load_file(path).items() if "layers.1" not in name}
    refused(rewritten(path, tensors), "layer layers.1, data source 'a', is missing")


def test_a_layer_of_another_width(path):
    tensors = load_file(path)
    tensors["a/layers.1/mean_abs"] = torch.zeros(25)
    refused(rewritten(path, tensors), r"mean_abs of layer layers.1.* is of shape \(25,\), expected for 24")


def test_exemplars_that_are_missing_or_cut_off(path):
    lines = exemplars_path(path).read_text().splitlines(keepends=True)
    for content, match in (("".join(lines[:-1]), "exemplars, expected"), ("{nonsense", "truncated, or not valid JSON")):
        exemplars_path(path).write_text(content)
        with pytest.raises(UserError, match=match):
            NeuronProfile.load(path).exemplars("a", "layers.0", 0)
    exemplars_path(path).unlink()
    profile = NeuronProfile.load(path)
    profile.statistic("mean_abs", "a", "layers.0")  # needs none of them
    with pytest.raises(UserError, match=r"the exemplars of p\.safetensors belong there"):
        profile.exemplars("a", "layers.0", 0)


def test_exemplars_of_an_interrupted_run_do_no_harm(path):
    before = NeuronProfile.load(path).exemplars("a", "layers.0", 0)
    with exemplars_path(path).open("a") as file:
        file.write('{"source": "b", "row"')
    assert NeuronProfile.load(path).exemplars("a", "layers.0", 0) == before


def test_of_another_model(path):
    profile = NeuronProfile.load(path)
    profile.check_model(neuron_map(transformers.LlamaConfig(**tiny.DECODER)))
    for config, match in (
        (transformers.MistralConfig(**tiny.DECODER), "model_type 'llama'.* is a 'mistral'"),
        (transformers.LlamaConfig(**{**tiny.DECODER, "num_hidden_layers": 3}), "has no neurons in layers.2"),
        (transformers.LlamaConfig(**{**tiny.DECODER, "num_hidden_layers": 1}), "24 neurons in layers.1; .*has none"),
        (transformers.LlamaConfig(**{**tiny.DECODER, "intermediate_size": 32}), "24 neurons in layers.0; .*has 32"),
    ):
        with pytest.raises(UserError, match=match):
            profile.check_model(neuron_map(config))
