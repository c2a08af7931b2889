"""Every mistake in a YAML is one line that names the file, the place and what was expected."""

import pytest
import yaml

from neuron_methods.plugin.configuration import read_configuration
from neuron_methods.plugin.patches import register
from neuron_methods.support.errors import UserError

register()

MODELS = [{"model": "expert-a"}, {"model": "expert-b"}]


def text(**keys):
    content = {"merge_method": "neuro_merging", "base_model": "base", "models": MODELS, **keys}
    return yaml.safe_dump({key: value for key, value in content.items() if value is not None})


def with_parameters(**parameters):
    return text(parameters=parameters)


WRONG = {
    "empty": ("", "merge.yaml: expected keys such as merge_method and models; it is empty"),
    "a list": ("- a\n", "merge.yaml: expected keys such as merge_method and models; found a list"),
    "unreadable": (
        "merge_method: linear\nmodels:\n  - model: a\n   - model: b\n",
        "merge.yaml, line 4, column 4: not read",
    ),
    "a tab": ("merge_method: linear\n\tmodels: []\n", "merge.yaml, line 2, column 1"),
    "two documents": ("merge_method: linear\n---\nmerge_method: linear\n", "merge.yaml, line 2"),
    "a key twice": (
        "merge_method: linear\nmodels: []\nmerge_method: slerp\n",
        "line 3, column 1: .*'merge_method' appears twice",
    ),
    "an unknown key": (text(merge_methods="x"), "unknown key 'merge_methods'; did you mean 'merge_method'"),
    "a key beside nothing known": (text(zzz=1), r"merge.yaml: unknown key 'zzz' \(there are: .*merge_method, "),
    "a key of a model": (
        text(models=[{"model": "a", "parameter": {}}]),
        r"models\[0\]: unknown key 'parameter'; did you mean 'parameters'",
    ),
    "a key of a source": (
        text(models=None, slices=[{"sources": [{"model": "a", "layer_range": [0, 1], "weight": 1}]}]),
        r"slices\[0\].sources\[0\]: weight stands beside model; indent it under parameters:",
    ),
    "a key of a module": (
        text(models=None, modules={"encoder": {"model": []}}),
        r"modules\[encoder\]: unknown key 'model'",
    ),
    "a key of a condition": (
        with_parameters(density=[{"fliter": "mlp", "value": 1}]),
        "parameters.density: unknown key 'fliter'; did you mean 'filter'",
    ),
    "a key of the tokenizer": (
        text(tokenizer={"sources": "base"}),
        "tokenizer: unknown key 'sources'; did you mean 'source'",
    ),
    "no method": (text(merge_method=None), "merge_method: Field required"),
    "an unknown method": (
        text(merge_method="neuro_mergin"),
        "unknown merge_method 'neuro_mergin'; did you mean 'neuro_merging'",
    ),
    "a method like no other": (text(merge_method="zzz"), r"'zzz' \(there are: .*neuro_merging"),
    "models that are no list": (text(models=3), "models: Input should be a valid list"),
    "a model without path": (text(models=[{"parameters": {}}]), "models.0.model: Field required"),
    "neither models nor slices": (text(models=None), "Exactly one of 'models', 'slices', or 'modules'"),
    "parameters that are none": (text(parameters=3), "parameters: Input should be a valid dictionary"),
    "a parameter that is none": (
        with_parameters(density={"foo": 1}),
        "parameters.density: unknown key 'foo'",
    ),
    "a condition without value": (with_parameters(density=[{"filter": "mlp"}]), "parameters.density: expected a value"),
    "no base": (text(base_model=None), "neuro_merging needs base_model"),
    "a model twice": (text(models=[*MODELS, MODELS[0]]), "model expert-a is listed twice"),
    "a path with two revisions": (text(models=[{"model": "a@b@c"}]), "multiple @: a@b@c"),
    "an unknown dtype": (text(dtype="float17"), "dtype: 'float17' is none of bfloat16, float16, float32, float64"),
    "dtype auto": (text(dtype="auto"), "dtype: 'auto' is none of"),
    "an integer dtype": (text(out_dtype="int64"), "out_dtype: 'int64' is none of"),
    "an unknown parameter": (
        with_parameters(densty=0.5),
        r"parameters: neuro_merging has no parameter 'densty'; did you mean 'density'\? \(it has: weight, density",
    ),
    "an unknown parameter of a model": (
        text(models=[{"model": "expert-a", "parameters": {"wieght": 1}}]),
        "model expert-a: neuro_merging has no parameter 'wieght'; did you mean 'weight'",
    ),
    "an unknown parameter of a module": (
        text(models=None, modules={"default": {"models": MODELS, "parameters": {"x": 1}}}),
        "module default: neuro_merging has no parameter 'x'",
    ),
    "density above its range": (
        with_parameters(density=1.5),
        r"parameters: density must be a number in \(0, 1\]; got 1.5",
    ),
    "density 0": (with_parameters(density=0), r"density must be a number in \(0, 1\]; got 0"),
    "density of one model": (
        text(models=[{"model": "expert-a", "parameters": {"density": -1}}]),
        r"model expert-a: density must be a number in \(0, 1\]; got -1",
    ),
    "density within a gradient": (with_parameters(density=[0.1, 2]), r"density must be a number in \(0, 1\]; got 2"),
    "density behind a filter": (
        with_parameters(density=[{"filter": "mlp", "value": "abc"}, {"value": 0.1}]),
        "density must be a number .*; got 'abc'",
    ),
    "rank_energy": (with_parameters(rank_energy=0), r"rank_energy must be a number in \(0, 1\]"),
    "weight nan": (with_parameters(weight=float("nan")), "weight must be a finite number; got nan"),
    "weight true": (with_parameters(weight=True), "weight must be a finite number; got True"),
    "lambda_orthogonal": (
        with_parameters(lambda_orthogonal="full"),
        "lambda_orthogonal must be a finite number or 'auto'",
    ),
    "trim": (with_parameters(trim="modle"), "trim must be one of model, tensor, differing; got 'modle'"),
    "consensus": (with_parameters(consensus=1), "consensus must be one of mean, sum; got 1"),
    "profile": (with_parameters(profile=7), "parameters: profile must be a text; got 7"),
    "no profile": (with_parameters(profile=" "), "parameters: profile must be a text, or be left out; got ' '"),
    "an empty gradient": (with_parameters(density=[]), "parameters: density: an empty list"),
    "a parameter of mergekit's": (
        text(merge_method="linear", base_model=None, parameters={"weight": "x"}),
        "parameters: weight: Input should be a valid number.*; got 'x'",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_named_in_one_line(mistake):
    source, message = WRONG[mistake]
    with pytest.raises(UserError, match=message) as caught:
        read_configuration(source, "merge.yaml")
    assert str(caught.value).startswith("merge.yaml")
    assert "\n" not in str(caught.value)


RIGHT = {
    "plain": text(),
    "scientific notation, which YAML 1.1 takes for a string": with_parameters(weight="1e-3"),
    "gradient and filter": with_parameters(
        trim="tensor", density=[0.1, 0.9], weight=[{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]
    ),
    "one condition without a list": with_parameters(weight={"filter": "mlp", "value": 2}),
    "an anchor merged into two mappings": """
merge_method: neuro_merging
base_model: base
models:
  - model: expert-a
    parameters: &shared {weight: 1, density: 0.1}
  - model: expert-b
    parameters: {<<: *shared, density: 0.1}
""",
    "a tokenizer with tokens": text(
        tokenizer={"source": "union", "tokens": {"<x>": {"source": "expert-a", "force": True}}, "pad_to_multiple_of": 8}
    ),
    "slices with a base of their own": text(
        base_model=None,
        models=None,
        slices=[{"base_model": "base", "sources": [{"model": m, "layer_range": [0, 1]} for m in ("base", "a")]}],
    ),
    "another method": text(merge_method="ties", parameters={"density": 0.5, "weight": 1, "normalize": True}),
    "dtypes": text(dtype="torch.float32", out_dtype="bfloat16"),
}


@pytest.mark.parametrize("form", RIGHT)
def test_what_mergekit_understands_is_accepted(form):
    configuration = read_configuration(RIGHT[form], "merge.yaml")
    assert configuration.merge_method in ("neuro_merging", "ties")
