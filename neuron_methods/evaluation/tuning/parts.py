"""A merge as a sum of parts: merged(λ) = origin + Σ_i λ_i · direction_i, recombined in memory.

For parameters that enter linearly, such as λ₁ and λ₂ of NeuroMerging (merged = θ₀ + λ₁ ψ_∥ + λ₂ ψ_⊥, arXiv:2503.05320)
and the λ of task arithmetic, k + 1 merges in float32 give all of them: one with every λ_i = 0, and one per λ_i = 1.
Another merge, with all λ_i away from these, tells whether the merge really is such a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_methods.models.processes import check_room_of_all

StateDict = dict[str, Tensor]

#: How far a recombined entry may be from the merged one: in float32's spacing at the tensor's largest weight, or in
#: shares of its largest update, whichever is more. What does not enter linearly is off by shares near 1.
SPACINGS = 64.0
SHARE = 1e-4


@dataclass(frozen=True)
class Parts:
    """The parts of a merge, float32 on the CPU.

    Attributes:
        origin: every tensor of the merge, with all of the parameters at 0.
        directions: parameter -> what 1 of it adds, by tensor; a tensor it does not change is missing.
    """

    origin: StateDict
    directions: dict[str, StateDict]

    def combine(self, values: Mapping[str, float]) -> Iterator[tuple[str, Tensor]]:
        """Recombine the tensors at a point, one after the other, float32.

        They are all there, also what these parameters do not change: a model may hold that as another merge left it.

        Args:
            values: a number for every parameter.
        """
        for name, tensor in self.origin.items():
            merged = tensor.clone()
            for parameter, direction in self.directions.items():
                if name in direction:
                    merged.add_(direction[name], alpha=float(values[parameter]))
            yield name, merged

    @property
    def bytes(self) -> int:
        """Memory taken."""
        return sum(t.nbytes for tensors in (self.origin, *self.directions.values()) for t in tensors.values())


class NotAffine(Exception):
    """The merge is no sum of its parts; the message says where it is not."""


def check_parts(entries: int, count: int) -> None:
    """Make sure that the parts fit into memory, with the merges that they are made of and held to.

    Args:
        entries: of all tensors.
        count: how many parameters there are.

    Raises:
        NoRoom: they do not.
    """
    check_room_of_all(4 * entries * (count + 3), "to keep its parts")


def find_parts(
    names: Sequence[str],
    merged_at: Callable[[dict[str, float]], StateDict],
    check_at: Mapping[str, float],
) -> Parts:
    """Find the parts by k + 1 merges, and hold them to one more.

    Args:
        names: the parameters, k of them.
        merged_at: {parameter: number} -> all tensors of the merge there, float32.
        check_at: where to check: numbers other than 0 and 1, all different from each other.

    Raises:
        NotAffine: the merge at `check_at` is not the sum of the parts.
    """
    origin = merged_at(dict.fromkeys(names, 0.0))
    directions: dict[str, StateDict] = {}
    for name in names:
        at_one = merged_at({**dict.fromkeys(names, 0.0), name: 1.0})
        updates = ((key, tensor - origin[key]) for key, tensor in at_one.items())
        directions[name] = {key: update for key, update in updates if update.any()}
        del at_one
    parts = Parts(origin, directions)
    merged = merged_at({name: float(check_at[name]) for name in names})
    for key, sum_of_parts in parts.combine(check_at):
        tensor, own = merged[key], [(name, directions[name][key]) for name in names if key in directions[name]]
        reach = sum(abs(check_at[name]) * float(direction.abs().max()) for name, direction in own)
        largest = float(origin[key].abs().max()) if origin[key].numel() else 0.0
        allowed = max(SPACINGS * torch.finfo(torch.float32).eps * (largest + reach), SHARE * reach)
        difference = float((tensor - sum_of_parts).abs().max()) if tensor.numel() else 0.0
        if not difference <= allowed:  # a NaN is not
            at = ", ".join(f"{name}={value:g}" for name, value in check_at.items())
            raise NotAffine(f"{key} differs by {difference:.2g} at {at}, of an update of {reach:.2g}")
    return parts
