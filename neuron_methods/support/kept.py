"""What merges of the same models have in common, kept in memory while a search tries one after the other."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol


class Sized(Protocol):
    """Something that knows the memory it takes."""

    @property
    def nbytes(self) -> int:
        """Bytes."""


class Kept:
    """What is kept of each matrix, as long as it is made of the same parameters.

    Attributes:
        limit: bytes that may be kept; None for no bound.
        made: how many things were made.
        without: matrices of which nothing is kept, as there is no room.
    """

    def __init__(self, limit: int | None) -> None:
        """Keep nothing yet."""
        self.limit = limit
        self.made = 0
        self.without: set[Hashable] = set()
        self._things: dict[Hashable, tuple[str, Sized]] = {}

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        return sum(thing.nbytes for _, thing in self._things.values())

    @property
    def count(self) -> int:
        """How many things are kept."""
        return len(self._things)

    def have(self, place: Hashable, made_of: str, need: int, make: Callable[[], Any]) -> Any | None:
        """Find what is kept of a matrix, or make it; None where there is no room.

        Args:
            place: of the matrix.
            made_of: all that it depends on and that may differ from merge to merge.
            need: bytes that it takes, at most.
            make: makes it.
        """
        if place in self._things and self._things[place][0] == made_of:
            return self._things[place][1]
        self._things.pop(place, None)
        if self.limit is not None and self.nbytes + need > self.limit:
            self.without.add(place)
            return None
        self.made += 1
        self._things[place] = made_of, make()
        return self._things[place][1]
