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


def test_quiet_shows_no_bars(measured, tmp_path):
    for options, shown in (((), True), (("--quiet",), False), ((), True)):
        data = f"words={measured.parent / 'texts.jsonl'}"
        result = run(measured.parent / "model", "--data", data, "-o", tmp_path / "p.safetensors", "--force", *options)
        assert result.exit_code == 0, result.output
        assert ("words: 0 of " in result.stderr) == shown
        assert result.stdout.startswith("words: 12 samples, ")


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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny.save_model("llama", folder / "model")
    data = tiny.write_texts(folder / "texts.jsonl", 12)
    options = ["--inputs", "--rows", 20, "--samples", 10, "--generate", 3, "--answers-only"]
    result = run(model, "--data", f"words={data}:input", "-o", folder / "i.safetensors", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("inputs of 15 linear modules, 9 of them different, 16 to 24 wide: up to 20 rows")
    assert "\nwords: 10 samples\ni.safetensors: 15 modules, 9 factors of " in result.stdout
    return folder / "i.safetensors"


def test_the_overview_of_inputs(inputs):
    lines = run("show", inputs).stdout.splitlines()
    assert lines[0].startswith("model      model (llama): 9 factors of 15 modules' inputs, ")
    assert "rows 20" in lines[1] and "generate 3, answers_only True" in lines[1]
    assert lines[2] == "source     words: 10 samples of texts.jsonl:input"
    assert lines[4].split()[:4] == ["factor", "rows", "inputs", "tokens"]
    first = "model.layers.0.self_attn"
    assert lines[5].split()[:3] == ["0", "16", "16"] and lines[5].split()[4] == "0"
    assert lines[5].endswith(f"{first}.q_proj, {first}.k_proj, {first}.v_proj")
    down = next(line.split() for line in lines if "down_proj" in line)
    assert down[1:3] == ["20", "24"] and 0 < float(down[4]) <= 1 / 21
    assert len(lines) == 5 + 9


def test_inputs_have_no_neurons_to_show(inputs):
    shown = run("show", inputs, "--layer", "0")
    assert shown.exit_code == 2 and "holds inputs of modules, which have no --layer" in shown.stderr


@pytest.mark.parametrize("option", [["--gradients"], ["--top", "10"], ["--context", "3"]])
def test_options_of_neurons_go_without_inputs(option):
    result = run("model", "--data", "a=b", "-o", "p.safetensors", "--inputs", *option)
    assert result.exit_code == 2 and f"{option[0]} goes without --inputs" in result.stderr


@pytest.mark.parametrize("option", [["--rows", "1024"], ["--generate"], ["--answers-only"]])
def test_options_of_inputs_need_it(option):
    result = run("model", "--data", "a=b", "-o", "p.safetensors", *option)
    assert result.exit_code == 2 and f"{option[0]} needs --inputs" in result.stderr


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
    assert "neuron_response reads" in measure and "‖F‖²/(rows + 1)" in measure
    assert "Usage: main profile show [OPTIONS] FILE" in show


def test_a_mistake_is_one_line(tmp_path):
    result = run(tmp_path / "none", "--data", "a=none.jsonl", "-o", tmp_path / "p.safetensors")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: --data a=none.jsonl: there is no file or folder 'none.jsonl'\n"
