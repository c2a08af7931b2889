"""The merge whose parameters are searched: its YAML at any point, and which parameters enter linearly."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from neuron_methods.evaluation.tasks import Task
from neuron_methods.evaluation.tuning.search import Parameter, Point
from neuron_methods.models.reference import ModelName
from neuron_methods.plugin.recorded import recorded_head, with_head
from neuron_methods.support.errors import UserError
from neuron_methods.support.yaml_source import YamlSource

#: What can be searched that is no parameter: words of the top level.
METHOD = "merge_method"
TOP_LEVEL = (METHOD, "dtype", "out_dtype")
_LAMBDA = re.compile(r"(rest_|within_)?lambda(_parallel|_orthogonal)?")


class Recipe:
    """A mergekit configuration with places for the searched parameters.

    Attributes:
        name: file name for messages.
        method: the merge method.
        experts: the models that are merged, as the YAML names them.
        base: the model that the output's config and tokenizer come from.
        names_base: whether the YAML names a base and models, as methods on task vectors need.
    """

    def __init__(self, source: str, name: str, parameters: Sequence[Parameter]) -> None:
        """Check the configuration and that it has the parameters.

        Raises:
            UserError: the configuration is wrong, or a parameter is none of its method's, or set where it would win
                over the searched one, or does not take a searched value.
        """
        from neuron_methods.plugin.configuration import read_configuration
        from neuron_methods.plugin.patches import register

        register()
        self.name = name
        configuration = read_configuration(source, name)
        self._content = YamlSource.parse(source, name, "a merge").content
        self._head = recorded_head(source)
        self.method = configuration.merge_method
        self.names_base = configuration.base_model is not None and bool(configuration.models)
        self.experts = [str(entry.model) for entry in configuration.models or ()]
        self.base = str(configuration.base_model or configuration.referenced_models()[0])
        self.experts = [expert for expert in self.experts if expert != self.base]
        for parameter in parameters:
            self._check_place(parameter.name)
            for value in parameter.extremes:
                try:
                    read_configuration(self.source_at({parameter.name: value}), "")
                except UserError as error:
                    # The configuration itself has been found sound: what is wrong is the parameter or its value.
                    what = str(error).removeprefix(": ").removeprefix("parameters: ")
                    raise UserError(f"--search {parameter.name}: {what}") from None

    def source_at(self, point: Mapping[str, Any], exact: bool = False) -> str:
        """Write the YAML with the parameters at `point`; with `exact` computed and written in float32."""
        content = copy.deepcopy(self._content)
        for name, value in point.items():
            parameter, at, expert = name.partition("@")
            if name in TOP_LEVEL:
                content[name] = value
                continue
            holder = content["models"][self._expert(expert, name)] if at else content
            if not isinstance(holder.get("parameters"), dict):
                holder["parameters"] = {}
            holder["parameters"][parameter] = value
        if exact:
            content |= {"dtype": "float32", "out_dtype": "float32"}
        return with_head(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000), self._head)

    def reads(self, tasks: Sequence[Task]) -> list[str]:
        """List what is read here of models, and of the data of tasks."""
        models = [path for model in (self.base, *self.experts) for path in ModelName.find(model).here()]
        return [*models, *(file for task in tasks for file in task.files())]

    @property
    def out_dtype(self) -> str | None:
        """What the output is written in, as the YAML says; None: as the base is stored."""
        return self._content.get("out_dtype") or self._content.get("dtype")

    def linear(self, names: Sequence[str], others: Mapping[str, Any] | None = None) -> list[str]:
        """Choose those of `names` that the merged weights are expected to be jointly affine in.

        It is an expectation: `parts` holds the merge to it. λ of any method scales a sum that does not depend on it.
        In `neuron_merge` with plain task arithmetic within groups, the groups' factors scale sums of task vectors; so
        do the experts' weights there and in `task_arithmetic`. Products of these (λ times a weight) are not affine.

        Args:
            names: searched parameters.
            others: what further parameters are set to at the point; decides where it matters.
        """
        settings = {**(self._content.get("parameters") or {}), **(others or {})}
        families: list[list[str]] = [[name for name in names if _LAMBDA.fullmatch(name)]]
        method = (others or {}).get("merge_method", self.method)
        plain = method == "neuron_merge" and settings.get("within", "task_arithmetic") == "task_arithmetic"
        if plain:
            families.append([name for name in names if name in ("general", "in_group", "out_group")])
        if (plain or method == "task_arithmetic") and not settings.get("normalize"):
            families.append([name for name in names if name.partition("@")[0] == "weight"])
        return max(families, key=len)

    def cheap(self, point: Mapping[str, Any]) -> list[str]:
        """List the parameters of a point whose values cost the method little, once one merge has been made."""
        from mergekit.merge_methods import registry

        known = getattr(registry.get(point.get("merge_method", self.method)), "cheap", ())
        return [name for name in point if name in known]

    def _check_place(self, name: str) -> None:
        """Refuse a parameter of a model that is not there, or that another setting would win over."""
        parameter, at, expert = name.partition("@")
        if name in TOP_LEVEL:
            return
        if at:
            self._expert(expert, name)
            return
        for place, settings in _settings(self._content):
            if place and parameter in settings:
                raise UserError(
                    f"--search {name}: {self.name} sets {parameter} in {place}, which wins over what is searched; "
                    "remove it there" + (f", or search {parameter}@EXPERT" if place.startswith("models") else "")
                )

    def _expert(self, given: str, name: str) -> int:
        """Find the place in `models` of ``NAME@EXPERT``: a number from 1 on, or a part of the expert's path."""
        models = self._content.get("models") or []
        if given.isdecimal() and 1 <= int(given) <= len(models):
            return int(given) - 1
        found = [i for i, entry in enumerate(models) if given and given in path_parts(str(entry.get("model")))]
        if len(found) != 1:
            known = ", ".join(str(entry.get("model")) for entry in models)
            many = "several experts" if found else "no expert"
            raise UserError(
                f"--search {name}: {given!r} names {many} of {self.name} (there are: {known}); give 1 to {len(models)}"
            )
        return found[0]


def path_parts(model: str) -> list[str]:
    """Split a model's path into its name and the names of the directories above it; an adapter's, too."""
    return [part for path in model.split("+") for part in Path(path).parts]


def _settings(content: Any, place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Find every `parameters` of a configuration, with its place."""
    if isinstance(content, dict):
        if isinstance(content.get("parameters"), dict):
            yield place, content["parameters"]
        for key, value in content.items():
            if key != "parameters":
                yield from _settings(value, f"{place}.{key}".lstrip("."))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from _settings(value, f"{place}[{number}]")


def split_point(point: Point, linear: Sequence[str]) -> tuple[Point, Point]:
    """Split a point into (the linear parameters, the others)."""
    return {k: point[k] for k in linear}, {k: v for k, v in point.items() if k not in linear}


def is_number(value: Any) -> bool:
    """Tell whether a parameter's value is a number, not a word such as ``auto``."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
