"""Where a searched parameter goes in the YAML, and which parameters enter linearly."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from neuron_methods.evaluation.tuning import Recipe, parse_search
from neuron_methods.support.errors import UserError
from tests.evaluation import cases

HERE = Path("/somewhere/run")


def recipe(*searches, method="neuro_merging", content=None, **parameters):
    source = cases.merge_yaml(HERE, method, **parameters)
    if content:
        source = yaml.safe_dump({**yaml.safe_load(source), **content}, sort_keys=False)
    return Recipe(source, "merge.yml", parse_search(searches))


def test_a_point_is_an_ordinary_configuration():
    made = recipe("lambda_orthogonal=0:1:1", density=0.3)
    content = yaml.safe_load(made.source_at({"lambda_orthogonal": 0.5}))
    assert content["parameters"] == {"density": 0.3, "lambda_orthogonal": 0.5}
    assert content["dtype"] == "bfloat16"
    exact = yaml.safe_load(made.source_at({}, exact=True))
    assert (exact["dtype"], exact["out_dtype"]) == ("float32", "float32")
    assert made.out_dtype == "bfloat16"
    assert made.experts == [str(HERE / "expert-a"), str(HERE / "expert-b")]
    assert made.base == str(HERE / "base")


@pytest.mark.parametrize("expert", ["2", "expert-b"])
def test_one_expert_s_parameter(expert):
    name = f"weight@{expert}"
    made = recipe(f"{name}=0:1:1")
    content = yaml.safe_load(made.source_at({name: 0.5}))
    assert "weight" not in content["parameters"]
    assert [entry.get("parameters") for entry in content["models"]] == [None, {"weight": 0.5}]


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ("lambda_ortogonal=1,2", "--search lambda_ortogonal: neuro_merging has no parameter 'lambda_ortogonal'; did"),
        ("density=0:1:0.5", "--search density: density must be a number in .0, 1.; got 0.0"),
        ("lambda_orthogonal=1,fast", "--search lambda_orthogonal: .*'fast'"),
        ("trim=model,global", "--search trim: .*'global'"),
        ("weight@expert-c=0,1", "'expert-c' names no expert of merge.yml .there are: .*expert-a.*; give 1 to 2"),
        ("weight@run=0,1", "'run' names several experts"),
        ("weight@3=0,1", "'3' names no expert"),
        ("wieght@1=0,1", "no parameter 'wieght'; did you mean 'weight'"),
    ],
)
def test_what_is_no_parameter_or_no_value_of_it(search, message):
    with pytest.raises(UserError, match=message) as caught:
        recipe(search)
    assert "\n" not in str(caught.value)


def test_a_setting_that_would_win():
    models = [{"model": "a", "parameters": {"density": 0.5}}, {"model": "b"}]
    with pytest.raises(UserError, match=r"merge.yml sets density in models\[0\].*or search density@EXPERT"):
        recipe("density=0.1,0.2", content={"models": models})


def test_a_key_that_appears_twice():
    """A merge refuses it; a search must not go on with the last of the two."""
    source = cases.merge_yaml(HERE, density=0.3) + "merge_method: ties\n"
    with pytest.raises(UserError, match=r"merge.yml, line \d+.*: key 'merge_method' appears twice"):
        Recipe(source, "merge.yml", parse_search(["density=0.1,0.2"]))


def test_a_configuration_that_is_wrong_itself():
    with pytest.raises(UserError, match=r"merge.yml: parameters: neuro_merging has no parameter 'densty'"):
        recipe("density=0.1,0.2", densty=0.1)


@pytest.mark.parametrize(
    ("method", "names", "linear", "settings"),
    [
        ("neuro_merging", ["lambda_parallel", "density"], ["lambda_parallel"], {}),
        ("neuro_merging", ["lambda_parallel", "lambda_orthogonal"], ["lambda_parallel", "lambda_orthogonal"], {}),
        ("neuro_merging", ["density"], [], {}),
        ("neuro_merging", ["weight"], [], {}),
        ("ties", ["lambda", "density"], ["lambda"], {}),
        ("ties", ["weight"], [], {}),
        ("task_arithmetic", ["weight@1", "weight@2"], ["weight@1", "weight@2"], {}),
        ("task_arithmetic", ["weight@1", "weight@2"], [], {"normalize": True}),
        ("task_arithmetic", ["weight@1", "weight@2", "lambda"], ["weight@1", "weight@2"], {}),
        ("min_merging", ["lambda", "density"], ["lambda"], {}),
        ("neuron_merge", ["lambda", "general"], ["lambda"], {}),
        ("neuron_merge", ["general", "in_group", "out_group"], ["general", "in_group", "out_group"], {}),
        ("neuron_merge", ["general", "in_group"], [], {"within": "ties"}),
    ],
)  # fmt: skip
def test_what_is_expected_to_be_linear(method, names, linear, settings):
    required = {"weight": 1.0} if method in ("ties", "task_arithmetic") else {}
    assert (
        recipe(
            "lambda=1" if method != "neuro_merging" else "density=1", method=method, **{**required, **settings}
        ).linear(names)
        == linear
    )


def test_what_else_is_searched_decides_what_is_linear():
    made = recipe("general=0:1:0.5", "within=task_arithmetic,ties", method="neuron_merge")
    assert made.linear(["general", "within"], {"within": "task_arithmetic"}) == ["general"]
    assert made.linear(["general", "within"], {"within": "ties"}) == []
