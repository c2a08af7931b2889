"""Methods that divide their tensors among other methods: which ones a configuration names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit.merge_methods.base import MergeMethod
from pydantic import BaseModel

from neuron_methods.methods.delegation import DelegatingMethod, configured_values


def configured(method: MergeMethod, configuration: BaseModel) -> MergeMethod:
    """Give the method as a configuration uses it: one that delegates tensors also declares the others' parameters.

    Args:
        method: any registered method.
        configuration: of a merge by it, mergekit's `MergeConfiguration` or `RawPyTorchMergeConfig`.

    Returns:
        `method` itself, or a copy whose spec is wider.

    Raises:
        UserError: the configuration names a method that there is not.
    """
    if not isinstance(method, DelegatingMethod):
        return method
    words: dict[str, list[Any]] = {slot: [] for slot in method.slots}
    for parameters in _parameters(configuration):
        for slot in method.slots:
            if slot in parameters:
                words[slot] += configured_values(parameters[slot])
    return method.configured(words)


def _parameters(node: Any) -> Iterator[Mapping[str, Any]]:
    """Every mapping of parameters in a configuration, of whatever part."""
    if isinstance(node, BaseModel):
        for name in type(node).model_fields:
            value = getattr(node, name)
            if name == "parameters":
                yield value or {}
            else:
                yield from _parameters(value)
    elif isinstance(node, dict):
        for value in node.values():
            yield from _parameters(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _parameters(value)
