"""What differs between devices: where float64 is, and how much is best worked on at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Found = TypeVar("Found")

#: Threads at most that work side by side: more would wait for the memory.
THREADS = 4

# On an accelerator, where every operation is a launch of its own, and memory is fast throughout.
_LAUNCHED = 1 << 28


def with_float64(device: torch.device | str) -> torch.device:
    """Give the device that takes what is computed in float64 for another: itself, the CPU for Apple's GPUs."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def bytes_at_once(cached: int, device: torch.device | None) -> int:
    """Give how much is worked on at a time: `cached`, which stays in a CPU's cache, or what fills an accelerator."""
    return cached if device is None or device.type == "cpu" else max(cached, _LAUNCHED)


def threads_of(device: torch.device | str) -> int:
    """Tell how many threads a crew has: on a CPU as many as torch, up to `THREADS`."""
    return min(torch.get_num_threads(), THREADS) if torch.device(device).type == "cpu" else 1


class Crew:
    """Threads that work side by side on a CPU, each of which computes by itself, until the block is done.

    Operations of torch on a few megabytes wait for each other longer than they compute when they are shared out one by
    one, and numpy's are not shared out at all.

    Attributes:
        own: what each thread keeps for itself.
    """

    def __init__(self) -> None:
        self.own = threading.local()
        self._threads, self._count = torch.get_num_threads(), threads_of("cpu")
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Crew:
        if self._count > 1:
            self._pool = ThreadPoolExecutor(
                self._count, "side by side", initializer=torch.set_num_threads, initargs=(1,)
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)  # which holds for threads that are yet to begin, too
        self._pool = None

    def work(self, work: Callable[[Piece], Found], pieces: Sequence[Piece], *, alone: bool = False) -> Iterator[Found]:
        """Work on pieces, twice as many as there are threads begun at a time; give what is found in their order.

        Args:
            work: on one piece.
            pieces: all of them.
            alone: let the caller's thread do it all.
        """
        pool = self._pool
        if pool is None or alone:
            yield from map(work, pieces)
            return
        work = torch.no_grad()(work)  # which each thread says for itself
        left = iter(pieces)
        waiting = deque(pool.submit(work, piece) for piece in islice(left, 2 * self._count))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(work, piece) for piece in islice(left, 1))
