"""`mergekit-neuron profile` and `profile show`, as a user calls them."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from neuron_methods.cli import main
from neuron_methods.profiling import NeuronProfile
from tests.support import tiny


def run(*arguments: object):
    return CliRunner().invoke(main, ["profile", *map(str, arguments)])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    model = tiny.save_model("llama", folder / "model")
    data = tiny.write_texts(folder / "texts.jsonl", 12)
    result = run(model, "--data", f"words={data}", "-o", folder / "p.safetensors", "--gradients", "--samples", 10)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("words: 10 samples, ")
    return folder / "p.safetensors"


def test_the_overview(measured):
    shown = run("show", measured)
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert lines[0] == "model      model (llama): 48 MLP neurons in 2 layers"
    assert any(line.startswith("source     words: 10 samples, ") and line.endswith("of texts.jsonl") for line in lines)
    assert [line.split()[:2] for line in lines[-2:]] == [["layers.0", "24"], ["layers.1", "24"]]


@pytest.mark.parametrize("layer", ["layers.1", "1"])
def test_a_layer(measured, layer):
    shown = run("show", measured, "--layer", layer).stdout.splitlines()
    mean = NeuronProfile.load(measured).statistic("mean_abs", "words", "layers.1")
    assert shown[0].startswith("layers.1, words: most active of 24 neurons")
    assert [int(line.split()[0]) for line in shown[2:12]] == mean.argsort(descending=True)[:10].tolist()


def test_a_neuron(measured):
    shown = run("show", measured, "--layer", "layers.0", "--neuron", 5).stdout
    exemplars = NeuronProfile.load(measured).exemplars("words", "layers.0", 5)
    assert "layers.0, neuron 5 of 24 (fires: the gate is open)" in shown
    assert "taylor" in shown
    for exemplar in exemplars:
        assert f"»{exemplar.text['token'].strip()}«" in shown
        assert f"(row {exemplar.row}, position {exemplar.position})" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "9"], "error: --layer 9: layer '9' is none of layers.0"),
        (["--layer", "0", "--neuron", "24"], "error: .*neurons 0 to 23, not 24"),
    ],
)
def test_what_is_not_there(measured, arguments, message):
    shown = run("show", measured, *arguments)
    assert shown.exit_code == 1
    assert shown.stderr.count("\n") == 1
    import re

    assert re.match(message, shown.stderr)


def test_wrong_usage():
    assert run().exit_code == 2
    assert run("model").exit_code == 2
    assert run("show").exit_code == 2
    assert run("show", "p.safetensors", "--neuron", 3).exit_code == 2
    assert "--neuron needs --layer" in run("show", "p.safetensors", "--neuron", 3).stderr


def test_help_says_how_and_what():
    measure, show = run("--help").stdout, run("show", "--help").stdout
    assert "Usage: main profile [OPTIONS] MODEL" in measure and "profile show FILE" in measure
    assert "HUB-ID[@CONFIG]:SPLIT[:COLUMNS]" in measure
    assert "Usage: main profile show [OPTIONS] FILE" in show


def test_a_mistake_is_one_line(tmp_path):
    result = run(tmp_path / "none", "--data", "a=none.jsonl", "-o", tmp_path / "p.safetensors")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: --data a=none.jsonl: there is no file or folder 'none.jsonl'\n"
