"""Work that is cut for several workers."""

from __future__ import annotations

from collections.abc import Sequence


def largest_first(costs: Sequence[int], count: int, before: Sequence[int] | None = None) -> list[list[int]]:
    """Share out pieces of work: the largest first, each to whom has least to do.

    Args:
        costs: of the pieces.
        count: of the workers.
        before: what each of them has to do already.

    Returns:
        Which pieces each gets, ascending; the same for the same arguments.
    """
    loads, shares = list(before or [0] * count), [[] for _ in range(count)]
    for piece in sorted(range(len(costs)), key=lambda piece: (-costs[piece], piece)):
        worker = min(range(count), key=lambda worker: (loads[worker], worker))
        loads[worker] += costs[piece]
        shares[worker].append(piece)
    return [sorted(pieces) for pieces in shares]
