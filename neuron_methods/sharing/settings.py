"""What a merge's YAML sets, as far as a card tells it: what of the method is ours, and the profiles' data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mergekit.config import MergeConfiguration

from neuron_methods.methods.parameters import OwnMethodSpec
from neuron_methods.support.errors import UserError

# HUB-ID[@CONFIG]:SPLIT[:COLUMNS], as `mergekit-neuron profile --data` takes it.
_OF_THE_HUB = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(@[^:]*)?:.+")


def own_choices(configuration: MergeConfiguration, spec: OwnMethodSpec) -> list[str]:
    """Tell what of the merge is ours, a clause each, by what its YAML sets anywhere, else by the defaults."""
    values: dict[str, list[Any]] = {parameter.name: [] for parameter in spec.parameters}
    for name, value in _settings(configuration.model_dump(exclude_none=True)):
        values.setdefault(name, []).append(value)
    for parameter in spec.parameters:
        values[parameter.name] = values[parameter.name] or [parameter.default]
    return [own.text for own in spec.ours if own.holds(values)]


def profiled_datasets(configuration: MergeConfiguration) -> list[str]:
    """Find the ids of the data sets behind the neuron profiles that a configuration names."""
    from neuron_methods.profiling import NeuronProfile

    found: dict[str, None] = {}
    for name, value in _settings(configuration.model_dump(exclude_none=True)):
        if name != "profile" or not str(value).endswith(".safetensors"):
            continue
        try:
            sources = NeuronProfile.load(value).info.sources.values()
        except UserError:
            continue  # moved away since the merge, or not a neuron profile
        found.update({match.group(1): None for s in sources if (match := _OF_THE_HUB.fullmatch(s.source))})
    return list(found)


def _settings(content: Any) -> Iterator[tuple[str, Any]]:
    """Every parameter and each of its values, wherever a configuration sets one: filters and gradients have several."""
    if isinstance(content, list):
        for part in content:
            yield from _settings(part)
    elif isinstance(content, dict):
        for name, value in content.items():
            if name == "parameters":
                for parameter, values in (value or {}).items():
                    for one in values if isinstance(values, list) else [values]:
                        yield parameter, one["value"] if isinstance(one, dict) and "value" in one else one
            else:
                yield from _settings(value)
