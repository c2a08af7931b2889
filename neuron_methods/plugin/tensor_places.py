"""Where the tensors of an output stand in its model: what each is to its module, as the model's class has it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from neuron_methods.adapters.placement import place_parameter
from neuron_methods.methods.contract import Role, TensorPlace
from neuron_methods.models.skeleton import Renamed, Skeleton

_ROLES: dict[str, Role] = {
    "transposed": "transposed",
    "experts": "packed",
    "experts_transposed": "packed_transposed",
}


class TensorPlaces:
    """The places of a model's tensors; the class is built, without weights, when the first is asked for.

    Args:
        config: of the model.
        names: of its tensors, as they are stored.
    """

    def __init__(self, config: Any, names: Sequence[str]) -> None:
        self._config = config
        self._names = names

    def of(self, name: str) -> TensorPlace | None:
        """Find a tensor's place; None where the class is not to be had, or does not read it."""
        skeleton, new = self._skeleton, self._renamed.get(name)
        if skeleton is None or new is None or new.path not in skeleton.tensors:
            return None
        found = place_parameter(skeleton, new.path)
        if new.path in skeleton.token_embeddings:
            return TensorPlace(found.module, "tokens")
        # What is stacked as it is loaded is stored as single matrices, in the order that layers have.
        role: Role = "matrix" if new.converted else _ROLES.get(found.kind, "matrix")
        shape = skeleton.tensors[new.path].shape
        if found.kind not in ("linear", "transposed", "convolution"):
            return TensorPlace(found.module, role)
        return TensorPlace(found.module, role, shape[0] if found.kind == "transposed" else math.prod(shape[1:]))

    @cached_property
    def _skeleton(self) -> Skeleton | None:
        return Skeleton.of(self._config)

    @cached_property
    def _renamed(self) -> dict[str, Renamed]:
        return self._skeleton.renamed(self._names) if self._skeleton is not None else {}
