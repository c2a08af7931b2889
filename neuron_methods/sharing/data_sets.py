"""The data sets of the Hub that a merge's profiles were measured on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mergekit.config import MergeConfiguration

from neuron_methods.support.errors import UserError

# HUB-ID[@CONFIG]:SPLIT[:COLUMNS], as `mergekit-neuron profile --data` takes it.
_OF_THE_HUB = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(@[^:]*)?:.+")


def profiled_datasets(configuration: MergeConfiguration) -> list[str]:
    """Ids of the data sets behind the neuron profiles that a configuration names."""
    from neuron_methods.profiling import NeuronProfile

    found: dict[str, None] = {}
    for key, value in _values(configuration.model_dump(mode="json")):
        if key != "profile" or not value.endswith(".safetensors"):
            continue
        try:
            sources = NeuronProfile.load(value).info.sources.values()
        except UserError:
            continue  # moved away since the merge, or not a neuron profile
        for source in sources:
            if match := _OF_THE_HUB.fullmatch(source.source):
                found[match.group(1)] = None
    return list(found)


def _values(content: Any) -> Iterator[tuple[str, str]]:
    """(parameter, value) of every text in a configuration's parameters, filters resolved to their values."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            texts = value if isinstance(value, list) else [value]
            for text in texts:
                if isinstance(text, Mapping):
                    text = text.get("value")
                if isinstance(text, str):
                    yield str(key), text
            yield from _values(value)
    elif isinstance(content, list):
        for value in content:
            yield from _values(value)
