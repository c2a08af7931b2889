"""What is compared: methods at their defaults and tuned, each as a mergekit YAML on the same base and experts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from neuron_methods.evaluation.tuning.search import Parameter, parse_search
from neuron_methods.plugin.recorded import recorded_head, with_head
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import unknown
from neuron_methods.support.yaml_source import YamlSource

AS_IT_IS = "as configured"
#: What a configuration keeps whatever the method: all but the method, its parameters, and what it holds per model.
_OF_METHOD = ("merge_method", "parameters", "models")
_SYNTAX = "NAME, or NAME:PARAMETER=VALUES with more of them after ';' (ties:density=0.2,0.6;lambda=0.7:1.3:0.2)"


@dataclass(frozen=True)
class Contender:
    """A method with what is set and what is tuned.

    Attributes:
        name: of its row.
        method: mergekit's name of it; None: the configuration as it is.
        settings: its parameters.
        search: of those that are tuned, each as ``--search`` takes it; empty: one point.
        asked: the text of ``--method`` that it was read from.
    """

    name: str
    method: str | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    search: tuple[str, ...] = ()
    asked: str = ""

    @property
    def parameters(self) -> list[Parameter]:
        """What is searched."""
        return parse_search(self.search) if self.search else []

    def source(self, configuration: str, name: str) -> str:
        """Write its YAML: the configuration with this method and its parameters."""
        if self.method is None:
            return configuration
        content = copy.deepcopy(YamlSource.parse(configuration, name, "a merge").content)
        kept = {key: value for key, value in content.items() if key not in _OF_METHOD}
        models = [{"model": entry["model"]} for entry in content["models"]]
        whole: dict[str, Any] = {"merge_method": self.method, **kept, "models": models}
        if self.settings:
            whole["parameters"] = dict(self.settings)
        if counts_base(self.method):  # as one of the experts, which it is not
            if "weight" in self.settings:
                models.append({"model": content["base_model"], "parameters": {"weight": 0.0}})
            else:
                del whole["base_model"]
        text = yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=1000)
        return with_head(text, recorded_head(configuration))


def contenders(experts: int) -> list[Contender]:
    """List what is compared where nothing is asked for: mergekit's usual methods and ours, as they are and tuned.

    Args:
        experts: how many are merged; scales of sums go by it.
    """
    sums = ",".join(f"{x / experts:.4g}" for x in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0))
    few = ",".join(f"{x / experts:.4g}" for x in (1.0, 1.75, 2.5, 4.0))
    weighted = {"weight": 1.0}
    return [
        Contender("average", "linear", weighted),
        Contender("task_arithmetic", "task_arithmetic", {**weighted, "lambda": 0.4}),
        Contender("task_arithmetic, tuned", "task_arithmetic", weighted, (f"lambda={sums}",)),
        Contender("ties", "ties", {**weighted, "density": 0.2}),
        Contender("ties, tuned", "ties", weighted, ("density=0.2,0.6", "lambda=0.5,0.8,1.1,1.5")),
        Contender("neuro_merging", "neuro_merging"),
        Contender(
            "neuro_merging, tuned", "neuro_merging", {}, ("density=0.15,0.5", "lambda_orthogonal=0.8,1.4,2.2,3.2")
        ),
        Contender("min_merging", "min_merging"),
        Contender("min_merging, tuned", "min_merging", {"conflict": "sum"}, ("density=0.3,0.7", f"lambda={few}")),
        Contender("neuron_response", "neuron_response"),
        Contender("neuron_response, tuned", "neuron_response", {}, ("ridge=auto,0.03", "lambda=0.7,1.0,1.3,1.8")),
    ]


def parse_methods(texts: Sequence[str]) -> list[Contender]:
    """Read ``--method``: a parameter with one value is set, one with several is tuned.

    Raises:
        UserError: one is not readable, or there is no such method.
    """
    return [_parse(text) for text in texts]


def _parse(text: str) -> Contender:
    name, colon, given = text.partition(":")
    name = name.strip()
    if not name or (colon and not given.strip()):
        raise UserError(f"--method {text!r}: expected {_SYNTAX}")
    check_method(name, f"--method {text!r}")
    parts = [part.strip() for part in given.split(";") if part.strip()]
    try:
        parameters = parse_search(parts) if parts else []
    except UserError as error:
        raise UserError(f"--method {text!r}: {str(error).removeprefix('--search ')}") from None
    settings: dict[str, Any] = {}
    search = []
    for part, parameter in zip(parts, parameters, strict=True):
        one_value = not parameter.is_range and len(parameter.values or ()) == 1
        if one_value and "@" not in parameter.name:  # one expert's has its place by the search alone
            settings[parameter.name] = (parameter.values or ())[0]
        else:
            search.append(part)
    if "weight" not in {parameter.name for parameter in parameters} and needs_weight(name):
        settings["weight"] = 1.0
    shown = f"{name} ({', '.join(parts)})" if parts else name
    return Contender(shown, name, settings, tuple(search), text)


def counts_base(method: str) -> bool:
    """Tell whether a method merges a YAML's base like its other models."""
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import BasePolicy

    return registry.get(method).spec.contract.base is BasePolicy.IGNORED


def needs_weight(method: str) -> bool:
    """Tell whether a method has to be given every expert's weight."""
    from mergekit.merge_methods import registry

    spec = registry.get(method).spec
    return any(parameter.name == "weight" and parameter.required for parameter in spec.parameters)


def check_method(name: str, shown: str) -> None:
    """Raise UserError unless there is a method of that name."""
    from mergekit.merge_methods import registry

    from neuron_methods.plugin.patches import register

    register()
    known = [method.spec.name for method in registry.registered_methods()]
    if name not in known:
        raise UserError(f"{shown}: {unknown('method', name, known)}")
