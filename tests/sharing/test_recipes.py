"""Every recipe, run as it stands on stand-ins of the models that it names."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import click.testing
import huggingface_hub
import pytest
import torch
import yaml
from mergekit.merge_methods import registry
from safetensors.torch import load_file

import neuron_methods
from neuron_methods.cli import main
from neuron_methods.cli.groups import groups
from neuron_methods.cli.profile import profile
from neuron_methods.plugin.configuration import read_configuration
from neuron_methods.sharing.recipes import Recipe, all_recipes, find_recipe, new_recipe, recipes_directory
from tests.sharing.stand_ins import BASES, entries, make_base, make_expert, prepare, run_model

RECIPES = all_recipes()
# As many of a recipe's experts are merged: what holds for three holds for eight, at a third of the time.
EXPERTS = 3


def run(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, list(arguments))


def shortened(recipe: Recipe) -> Recipe:
    """The recipe without the models after the third; nothing else is changed."""
    lines, models = [], 0
    for line in recipe.text.splitlines(keepends=True):
        models += line.startswith("  - model:")
        if line.startswith((" ", "#")) and models > EXPERTS and not line.startswith("#"):
            continue
        models = 0 if not line.startswith((" ", "#")) else models
        lines.append(line)
    return replace(recipe, text="".join(lines))


def merge(recipe: Recipe, out: str) -> None:
    Path("recipe.yml").write_text(recipe.text)
    if len(recipe.stages) > 1:
        from mergekit.scripts.multimerge import main as multimerge

        done = click.testing.CliRunner().invoke(
            multimerge, ["recipe.yml", "-I", "stages", "--out-path", out], catch_exceptions=False
        )
    else:
        done = run("merge", "recipe.yml", out, "--quiet")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_it_merges_and_the_result_loads_and_runs(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    neuron_methods.register()
    for stage in recipe.stages:
        read_configuration(yaml.safe_dump({key: stage[key] for key in stage if key != "name"}), recipe.name)
    recipe = shortened(recipe)
    assert all(2 <= len(stage["models"]) <= EXPERTS for stage in recipe.stages)
    prepare(recipe.stages, tmp_path)
    merge(recipe, "out")
    base = str(recipe.stages[0]["base_model"])
    merged, origin = load_file("out/model.safetensors"), load_file(Path(base) / "model.safetensors")
    assert merged.keys() == origin.keys()
    changed = [name for name in merged if not torch.equal(merged[name].float(), origin[name].float())]
    adapters = all("+" in entry["model"] for entry in entries(recipe.stages))
    assert len(changed) > (len(merged) // 8 if adapters else len(merged) // 2)
    before, after = run_model(Path(base), base), run_model(Path("out"), base)
    assert bool(after.isfinite().all()) and not torch.equal(before, after)
    if len(recipe.stages) == 1:
        card = huggingface_hub.ModelCard.load("out/README.md")
        assert card.data.tags[-1] == recipe.method and card.text.count("(a local directory)") >= 3


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_its_text_teaches_and_keeps_the_form(recipe):
    lines = recipe.text.splitlines()
    assert lines[0].startswith("# ") and lines[0].endswith(".") and lines[1] == "#"
    assert max(map(len, lines)) <= 120
    assert sum("# " in line for line in lines) >= 4
    assert f"{recipe.family}/{recipe.method}" in recipe.name or len(recipe.stages) > 1
    for stage in recipe.stages:
        assert stage["base_model"] in BASES
        for entry in stage["models"]:
            for part in entry["model"].split("+"):
                # An id of the Hub, a directory that a command of the recipe's text makes, or a place to fill.
                assert re.fullmatch(r"[\w.-]+/[\w.-]+|path/to/your/[\w-]+|\S+(/\S+){2,3}|languages", part), part
    assert ("placeholders" in recipe.text) == (not recipe.is_filled)


def test_every_family_has_every_method_of_ours():
    neuron_methods.register()
    ours = {m.spec.name for m in registry.registered_methods() if type(m).__module__.startswith("neuron_methods")}
    for family in ("llama", "t5", "vit"):
        assert {recipe.method for recipe in RECIPES if recipe.family == family} == ours
        assert any(recipe.name == f"{family}/neuro_merging-small" for recipe in RECIPES)
    for method in ours:
        texts = [recipe for recipe in RECIPES if recipe.method == method]
        assert any("+" in str(recipe.stages[0]["models"]) for recipe in texts), method


def test_list_and_show():
    listed = run("recipes", "list")
    assert listed.output == run("recipes").output
    assert [line.split()[0] for line in listed.output.splitlines()] == [recipe.name for recipe in RECIPES]
    marked = {line.split()[0] for line in listed.output.splitlines() if line.split()[1] == "*"}
    assert marked == {recipe.name for recipe in RECIPES if not recipe.is_filled} != set()
    for name in ("vit/neuro_merging-clip-vit-l-14", "recipes/vit/neuro_merging-clip-vit-l-14.yml", "two-stage"):
        assert run("recipes", "show", name).output == find_recipe(name).text
    assert yaml.safe_load(run("recipes", "show", "t5/neuro_merging-t5-base").output)["merge_method"] == "neuro_merging"


def test_new_fills_in_models_and_keeps_the_comments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_base("zoo-t5/base", tmp_path)
    for seed, name in enumerate(("mine/sum", "mine/sort")):
        make_expert(tmp_path / "zoo-t5/base", tmp_path / name, seed)
    models = ["--base", "./zoo-t5/base", "--expert", "mine/sum", "--expert", "./mine/sort"]
    done = run("recipes", "new", "t5", "neuro_merging", *models, "-o", "merge.yml")
    assert (done.exit_code, done.output) == (0, "")
    text = Path("merge.yml").read_text()
    content = yaml.safe_load(text)
    assert content["base_model"] == "./zoo-t5/base"
    assert [entry["model"] for entry in content["models"]] == ["mine/sum", "./mine/sort"]
    assert "path/to/your" not in text and "# 1 / (1 - sigma)" in text
    head = text.splitlines()[:7]
    assert head[0].startswith("# After the recipe t5/neuro_merging-flan-t5-base;")
    assert head[1:] == [
        "# More of it: mergekit-neuron recipes show t5/neuro_merging-flan-t5-base",
        "#",
        "# neuro_merging of 2 experts on ./zoo-t5/base.",
        "#",
        "#   mergekit-neuron merge merge.yml ./merged --report",
        "merge_method: neuro_merging",
    ]
    assert run("merge", "merge.yml", "out", "--quiet").exit_code == 0
    again = run("recipes", "new", "t5", "neuro_merging", *models, "-o", "merge.yml")
    assert (again.exit_code, "exists already" in again.stderr) == (1, True)


@pytest.mark.parametrize("family", ["llama", "t5", "vit"])
@pytest.mark.parametrize("method", ["neuro_merging", "min_merging", "neuron_merge", "neuron_response"])
def test_new_knows_every_family_and_method(family, method):
    experts = ["./a: #1", "/data/math/full", "org/base+/data/code/full"]
    content = yaml.safe_load(new_recipe(family, method, "org/base", experts))
    assert (content["merge_method"], content["base_model"]) == (method, "org/base")
    assert [entry["model"] for entry in content["models"]] == experts
    if method == "neuron_merge":
        assert [entry["parameters"]["group"] for entry in content["models"]] == ["a-1", "math", "code"]
    else:
        assert not any("parameters" in entry for entry in content["models"])
    assert content["parameters"]


def test_new_takes_the_name_of_a_recipe_and_names_what_is_measured_on_each_expert():
    text = new_recipe("t5", "neuron_response-data-flan-t5-base", "org/base", ["./mine/sum", "org/t5-rte"])
    assert "# With inputs" not in text
    assert "After the recipe t5/neuron_response-data-flan-t5-base;" in text
    assert yaml.safe_load(text)["models"] == [
        {"model": "./mine/sum", "parameters": {"profile": "sum.inputs.safetensors"}},
        {"model": "org/t5-rte", "parameters": {"profile": "t5-rte.inputs.safetensors"}},
    ]
    for family in ("llama", "t5", "vit"):
        text = new_recipe(family, "neuron_response", "org/base", ["./a"])
        assert "inputs" not in yaml.safe_load(text)["parameters"]
        (named,) = re.findall(rf"^# With inputs .*: mergekit-neuron recipes new {family} (\S+) \.\.\.$", text, re.M)
        assert find_recipe(f"{family}/{named}").has_all("profile")


def steps_of(text):
    head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return [shlex.split(line)[2:] for line in head if line.startswith("#   ")]


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if len(recipe.stages) == 1], ids=lambda r: r.name)
def test_new_names_the_commands_that_make_what_the_merge_reads(recipe):
    experts = ["./my sum", "org/base+./b\nc: {}"]
    text = new_recipe(recipe.family, recipe.name.partition("/")[2], "org/base", experts, "my merge.yml")
    content = yaml.safe_load(text)
    *before, last = steps_of(text)
    assert last == ["merge", "my merge.yml", "./merged", "--report"]
    commands = {"profile": profile, "groups": groups}
    made = [commands[name].make_context(name, list(options)).params for name, *options in before]
    own = [entry.get("parameters", {}) for entry in content["models"]]
    if recipe.has_all("profile"):
        assert [str(given["output"]) for given in made] == [each["profile"] for each in own]
        assert made[0]["model"] == "./my sum" and all(given["inputs"] for given in made)
    elif recipe.has_all("group"):
        assert [each["group"] + "=FILE:COLUMNS" for each in own] == list(made[0]["data"])[:-1]
        assert made[0]["model"] == "org/base"
        assert [str(given["output"]) for given in made] == [str(made[1]["profile"]), content["parameters"]["groups"]]
    else:
        assert not made


def test_names_of_data_differ_whatever_the_experts_are_called():
    experts = ["p/x y", "p/x-y", "B+a", "a", "general", "B+---", "---"]
    models = yaml.safe_load(new_recipe("llama", "neuron_merge", "B", experts))["models"]
    groups = [entry["parameters"]["group"] for entry in models]
    assert groups == ["x-y", "x-y-2", "a", "a-2", "general-2", "expert", "expert-2"]


@pytest.mark.parametrize(
    "recipe", [recipe for recipe in RECIPES if recipe.has_all("profile")], ids=lambda recipe: recipe.name
)
def test_commands_of_its_text_measure_the_inputs_of_every_expert(recipe):
    """Its comments are run by a shell in which the command only says what it was told."""
    comments = "\n".join(line[1:] for line in recipe.text.splitlines() if line.startswith("#   "))
    loop = comments[comments.index("for task") : comments.index("; done") + len("; done")]
    script = f'mergekit-neuron() {{ printf "%s\\t" "$@"; echo; }}\n{loop}'
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    commands = [line.split("\t")[:-1] for line in said.splitlines()]
    assert all(name == "profile" for name, *_ in commands)
    options = [profile.make_context("profile", arguments).params for _, *arguments in commands]
    assert all(given["inputs"] and given["samples"] == 40 for given in options)
    measured = [(given["model"], str(given["output"])) for given in options]
    assert measured == [(entry["model"], entry["parameters"]["profile"]) for entry in recipe.stages[0]["models"]]


def test_new_takes_a_recipe_for_what_the_experts_are():
    plain = new_recipe("t5", "neuro_merging", "b", ["./x"])
    adapters = new_recipe("t5", "neuro_merging", "b", ["b+./x"])
    assert "After the recipe t5/neuro_merging-flan-t5-base;" in plain
    assert "After the recipe t5/neuro_merging-flan-t5-base-adapters;" in adapters


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "vit/neuro_merging-clip-vit-l14"], "did you mean 'vit/neuro_merging-clip-vit-l-14'?"),
        (["show", "neuro_merging-small"], "there are several"),
        (["new", "bert", "neuro_merging", "--base", "b", "--expert", "e"], "there are: llama, t5, vit"),
        (
            ["new", "llama", "neuron_response-data", "--base", "b", "--expert", "e"],
            "did you mean 'neuron_response-data-s",
        ),
        (["new", "vit", "ties", "--base", "b", "--expert", "e"], "no recipe for vit by ties"),
        (
            ["new", "vit", "neuro_merging", "--base", "b", "--expert", "e", "--expert", "e"],
            "--expert e: is given twice",
        ),
    ],
)
def test_what_there_is_not_is_told(arguments, said):
    done = run("recipes", *arguments)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert said in done.stderr


def test_recipes_are_found_in_a_checkout_and_in_an_installation(tmp_path, monkeypatch):
    assert recipes_directory().name == "recipes"
    package = tmp_path / "neuron_methods"
    (package / "recipes" / "llama").mkdir(parents=True)
    (package / "recipes" / "llama" / "one.yml").write_text("# One.\n")
    monkeypatch.setattr(neuron_methods, "__file__", str(package / "__init__.py"))
    assert [recipe.name for recipe in all_recipes()] == ["llama/one"]
