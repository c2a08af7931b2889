"""Functional groups as a file: which group every MLP neuron of a base model works for.

JSON, made by `mergekit-neuron groups`. `labels` holds one number per neuron, an index into `groups`:

    {"format": "mergekit-neuron groups", "version": 1, "model": "base", "model_type": "llama",
     "groups": ["general", "math", "code"], "labels": {"layers.0": [0, 2, 0, …], …}, "made_from": {…}}
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from neuron_methods.support.documents import Given, read_json, validated
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_json
from neuron_methods.support.text import shortened

FORMAT = "mergekit-neuron groups"
VERSION = 1
GENERAL = "general"


class _GroupsFile(Given):
    format: str
    version: int
    model: str
    model_type: str
    groups: list[str]
    labels: dict[str, list[Annotated[int, Field(ge=0)]]]
    made_from: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class NeuronGroups:
    """The functional group of every MLP neuron.

    Attributes:
        model: name of the base model, for messages.
        model_type: its config's.
        groups: names; the first is `general`.
        labels: layer -> index into `groups`, int64 (neurons,).
        made_from: how the groups were made.
    """

    model: str
    model_type: str
    groups: tuple[str, ...]
    labels: dict[str, Tensor]
    made_from: Mapping[str, Any] = field(default_factory=dict)

    def neurons_of(self, group: str, layer: str) -> Tensor:
        """Find the indices of a layer's neurons of a group, ascending int64."""
        return (self.labels[layer] == self.groups.index(group)).nonzero().squeeze(1)

    def counts(self) -> dict[str, dict[str, int]]:
        """Count the neurons of each group: {layer: {group: how many}}."""
        return {
            layer: {group: int((labels == i).sum()) for i, group in enumerate(self.groups)}
            for layer, labels in self.labels.items()
        }

    def totals(self) -> dict[str, int]:
        """Count the neurons of each group over all layers."""
        counts = self.counts().values()
        return {group: sum(of_layer[group] for of_layer in counts) for group in self.groups}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, complete or not at all."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "model_type": self.model_type,
            "groups": list(self.groups),
            "made_from": dict(self.made_from),
            "labels": {layer: labels.tolist() for layer, labels in self.labels.items()},
        }
        write_json(path, content)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> NeuronGroups:
        """Read a file.

        Raises:
            UserError: it is missing, no groups file, of another version, or truncated or damaged.
        """
        again = "make it again with `mergekit-neuron groups`"
        shown = f"groups {path}"
        content = read_json(path, "groups", format=FORMAT, version=VERSION, again=again)
        found = validated(content, _GroupsFile, shown, again)
        groups = found.groups
        if not groups or groups[0] != GENERAL or len(set(groups)) != len(groups):
            raise UserError(f"{shown}: groups must begin with {GENERAL!r}, each once; {again}")
        for layer, values in found.labels.items():
            if values and max(values) >= len(groups):
                layer = shortened(layer, quote=False)
                raise UserError(
                    f"{shown}: labels.{layer}: {max(values)} is no group (there are {len(groups)}); {again}"
                )
        labels = {layer: torch.tensor(values, dtype=torch.int64) for layer, values in found.labels.items()}
        return cls(found.model, found.model_type, tuple(groups), labels, found.made_from)

    def check_experts(self, path: str, experts: Mapping[Any, str]) -> None:
        """Raise UserError unless experts and groups match.

        Args:
            path: the file, for messages.
            experts: {expert: the group it was trained for}.
        """
        known = ", ".join(self.groups)
        for expert, group in experts.items():
            if not group:
                raise UserError(
                    f"{expert} has no group; say which it was trained for with group: NAME (in {path}: {known})"
                )
            if group not in self.groups:
                raise UserError(f"{expert}: group {group!r} is not in {path} (there are: {known})")
        unnamed = [g for g, count in self.totals().items() if count and g != GENERAL and g not in experts.values()]
        if unnamed:
            raise UserError(
                f"groups {path}: no expert names the group {unnamed[0]!r}, so its neurons would take part of every "
                "expert and all of none; give an expert group: "
                f"{unnamed[0]}, or make the groups again without it"
            )


def groups_from_labels(
    model: str,
    model_type: str,
    labels: Mapping[str, Sequence[str]],
    made_from: Mapping[str, Any],
    domains: Sequence[str] = (),
) -> NeuronGroups:
    """Make groups from one name per neuron; `domains` are groups even if no neuron has them, for experts to name."""
    names = sorted({name for values in labels.values() for name in values}.union(domains) - {GENERAL})
    groups = (GENERAL, *names)
    index = {name: i for i, name in enumerate(groups)}
    tensors = {layer: torch.tensor([index[name] for name in values]) for layer, values in labels.items()}
    return NeuronGroups(model, model_type, groups, tensors, made_from)
