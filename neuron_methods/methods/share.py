"""What of a measurement over the whole model this process does, where several measure it together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from neuron_methods.support.shares import largest_first


@dataclass(frozen=True, eq=False)
class Share:
    """One process's share, and how the shares come together.

    Everything that is added up in floating point is added up in the order of the plan, by every process, so that the
    outcome is that of one process to the last bit.

    Attributes:
        rank: which process this is.
        count: of how many.
        cost: tells the bytes that are read for a tensor of this name.
        exchange: gives the values that all processes give, in their order.
        add_up: adds up a tensor of integers over them.
    """

    rank: int = 0
    count: int = 1
    cost: Callable[[str], int] = lambda _name: 1
    exchange: Callable[[Any], list[Any]] = lambda value: [value]
    add_up: Callable[[Tensor], Tensor] = lambda values: values

    def mine(self, groups: Sequence[Sequence[str]]) -> list[int]:
        """Tell which of these groups of tensors, by name, are this process's to look at."""
        return largest_first([sum(map(self.cost, names)) for names in groups], self.count)[self.rank]

    def together(self, found: dict[int, Any]) -> dict[int, Any]:
        """Put together what the processes found, by the number of the group; in the order of the groups."""
        everything = {number: value for part in self.exchange(found) for number, value in part.items()}
        return {number: everything[number] for number in sorted(everything)}
