"""Values that a method's parameter cannot take: one line with key and value, for every parameter that is declared."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import ParameterScope, ParameterSpec

import neuron_methods
from neuron_methods.plugin.configuration import read_configuration
from neuron_methods.support.errors import UserError

neuron_methods.register()

NUMBERS = [math.nan, math.inf, -math.inf, 10**400, True, [], [math.nan], [1.0, "x"], [[]], [{"value": math.inf}], None]
WORDS = [5, True, math.nan, [], ["x", 7], {"a": 1}, [{"value": 3}], None]
METHODS = sorted(method.spec.name for method in registry.registered_methods())
OURS = ("neuro_merging", "min_merging", "neuron_merge")
PARAMETERS = [
    pytest.param(name, parameter, id=f"{name}-{parameter.name}")
    for name in METHODS
    for parameter in registry.get(name).spec.parameters
]


def takes_numbers(parameter: ParameterSpec) -> bool:
    try:
        return isinstance(parameter.validate(0.5), float)
    except ValueError:
        return False
    except UserError:
        return False


def source(name: str, parameter: ParameterSpec, value: Any, of_model: bool) -> str:
    given = {parameter.name: value}
    models: list[dict[str, Any]] = [{"model": "a"}, {"model": "b"}]
    content: dict[str, Any] = {"merge_method": name, "base_model": "base", "models": models}
    if of_model:
        models[0]["parameters"] = given
    else:
        content["parameters"] = given
    return yaml.safe_dump(content)


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS)
def test_what_is_no_value_of_it_is_refused_by_name(name: str, parameter: ParameterSpec) -> None:
    wrong = NUMBERS if takes_numbers(parameter) else WORDS if name in OURS else [[], {"a": 1}]
    for value in wrong:
        if value is None and name not in OURS:
            continue
        for of_model in (False, True) if parameter.scope != ParameterScope.SHARED else (False,):
            with pytest.raises(UserError) as error:
                read_configuration(source(name, parameter, value, of_model), "merge.yml")
            line = str(error.value)
            assert line.startswith("merge.yml: ")
            assert parameter.name in line
            assert "\n" not in line
            assert len(line) < 600


@pytest.mark.parametrize(
    "name", [n for n in METHODS if any(p.name == "density" for p in registry.get(n).spec.parameters)]
)
@pytest.mark.parametrize("value", [-0.1, 1.1, 10**30, "-1"])
def test_a_density_is_a_share(name: str, value: object) -> None:
    parameter = next(p for p in registry.get(name).spec.parameters if p.name == "density")
    with pytest.raises(UserError, match=r"density must be a number in [\[(]0, 1\]; got "):
        read_configuration(source(name, parameter, value, True), "merge.yml")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("base_model", "", "model '': empty"),
        ("base_model", "base+", "model 'base[^']*': empty, or nothing beside"),
        ("base_model", ".@main", r"model '.@main': \. is a directory, which has no revisions; leave @main away"),
        ("base_model", 5.5, "base_model: .*found 5.5"),
        ("base_model", math.nan, "base_model: .*found nan"),
        ("base_model", True, "base_model: .*found True"),
    ],
)
def test_what_is_no_name_of_a_model(key: str, value: Any, told: str) -> None:
    content = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}], key: value}
    with pytest.raises(UserError, match=f"^merge.yml: {told}"):
        read_configuration(yaml.safe_dump(content), "merge.yml")
