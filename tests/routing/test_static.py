"""`mergekit-neuron route --static`: the adapters of a routed model in one checkpoint."""

import os
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from neuron_methods.cli import main
from neuron_methods.methods.inputs_file import InputsFile
from tests.support.routed import settings

EXPERTS = ["numbers", "colours", "animals"]


def route(content, *options, code=0):
    Path("new.yaml").write_text(yaml.safe_dump(content))
    result = CliRunner().invoke(main, ["route", "new.yaml", "one", "--static", *options])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("kind", ["llama", "t5", "vit"])
def test_it_is_what_profile_and_merge_make_of_the_adapters(workspace, kind):
    workspace(kind)
    content = settings(kind)
    assert [expert["name"] for expert in content["experts"]] == EXPERTS
    route(content)
    recipe = yaml.safe_load(Path("one/mergekit_config.yml").read_text())
    assert (recipe["merge_method"], recipe["parameters"]) == ("neuron_response", {"inputs": "both"})
    for model, expert in zip(recipe["models"], content["experts"], strict=True):
        assert model["model"] == f"{recipe['base_model']}+{os.path.abspath(expert['adapter'])}"
        info = InputsFile.open(model["parameters"]["profile"]).info
        (source,) = info.made_from["sources"].values()
        assert source[0].startswith(os.path.basename(expert["data"]["source"]))
        assert 0 < info.made_from["samples"][expert["name"]] <= 40
    done = CliRunner().invoke(main, ["merge", "one/mergekit_config.yml", "again", "--quiet"])
    assert done.exit_code == 0, done.output
    one, again, base = (load_file(f"{name}/model.safetensors") for name in ("one", "again", "base"))
    assert all((one[name] == again[name]).all() for name in base)
    assert any((one[name] != base[name]).any() for name in base)


def test_the_data_decide(workspace):
    workspace("llama")
    route(settings("llama"))
    measured = load_file("one/model.safetensors")
    recipe = yaml.safe_load(Path("one/mergekit_config.yml").read_text())
    recipe.pop("parameters")
    for model in recipe["models"]:
        model.pop("parameters")
    Path("data_free.yaml").write_text(yaml.safe_dump(recipe))
    assert CliRunner().invoke(main, ["merge", "data_free.yaml", "free", "--quiet"]).exit_code == 0
    free = load_file("free/model.safetensors")
    assert any((measured[name] != free[name]).any() for name in free)


def test_run_again_it_measures_nothing_again(workspace):
    workspace("llama")
    route(settings("llama"))
    before = {name: os.stat(f"one.inputs/{name}").st_mtime_ns for name in os.listdir("one.inputs")}
    assert sorted(before) == sorted(f"{name}.safetensors" for name in EXPERTS)
    assert "one: exists already" in route(settings("llama"), code=1).stderr
    shutil.rmtree("one")
    assert route(settings("llama")).output.count("already in") == 3
    assert before == {name: os.stat(f"one.inputs/{name}").st_mtime_ns for name in os.listdir("one.inputs")}


def test_a_dry_run_writes_nothing(workspace):
    workspace("llama")
    before = sorted(os.listdir())
    output = route(settings("llama"), "--dry-run").output
    assert "neuron_response" in output and "one.inputs" in output
    assert sorted(os.listdir()) == sorted([*before, "new.yaml"])


@pytest.mark.parametrize("option", ["--device", "--work-dir"])
def test_what_it_has_no_use_for_is_refused(workspace, option):
    workspace("llama")
    assert f"{option} goes without --static" in route(settings("llama"), option, "cpu", code=2).stderr


def test_what_is_wrong_is_told_before_anything_is_measured(workspace):
    workspace("llama")
    content = settings("llama")
    content["experts"][2]["data"]["source"] = "data/nowhere.jsonl"
    (line,) = route(content, code=1).stderr.splitlines()
    assert "expert 'animals': data.source" in line and "nowhere.jsonl" in line
    assert not Path("one").exists() and not Path("one.inputs").exists()
