"""Reading ahead: while one tensor is merged, a thread has the system read the next ones from the disk.

Checkpoints are mapped into memory, so that a tensor is read when a kernel first touches it, which then waits for the
disk piece by piece. What is read ahead lies in the system's cache: it takes no memory of the process, and a hint that
comes to nothing changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit.io.tasks import LoaderCache

from neuron_methods.models.headers import header_entries
from neuron_methods.plugin.checkpoints import CheckpointLoader
from neuron_methods.support.errors import UserError

#: Tensors that are read ahead of the one that is at work.
AHEAD = 2


class Order:
    """In which order a merge reads the tensors of one checkpoint, pass by pass."""

    def __init__(self, passes: Sequence[Sequence[str]]) -> None:
        self._passes = [list(names) for names in passes if names]
        self._pass, self._place, self._told = 0, 0, 0

    def after(self, name: str) -> list[str]:
        """List the tensors that come next, now that `name` is read, as far as they have not been listed before.

        What is read out of order, or again, is followed by nothing.
        """
        for number, names in enumerate(self._passes[self._pass :]):
            # The next pass may begin with what was the last of this one.
            if name in (names[: 1 + AHEAD] if number else names[self._place :]):
                break
        else:
            return []
        if number:
            self._pass, self._place, self._told = self._pass + number, 0, 0
        self._place = names.index(name, self._place)
        begin, self._told = max(self._told, self._place + 1), max(self._told, self._place + 1 + AHEAD)
        return names[begin : self._told]


class ReadAhead:
    """Reads ahead in all checkpoints of a merge.

    Args:
        passes: gives the names of the tensors in the order in which each pass reads them; empty as long as there is no
            plan.
    """

    def __init__(self, passes: Callable[[], Sequence[Sequence[str]]]) -> None:
        self._passes = passes
        self._orders: dict[int, Order] = {}
        self._offsets: dict[Path, dict[str, tuple[int, int]]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read ahead")

    def reached(self, loader: CheckpointLoader, name: str) -> None:
        """Take note that a tensor is being read, and have the next ones read."""
        if id(loader) not in self._orders:
            if not (passes := self._passes()):
                return
            stored = loader.index.tensor_paths
            self._orders[id(loader)] = Order([[name for name in names if name in stored] for names in passes])
        for following in self._orders[id(loader)].after(name):
            self._thread.submit(self._read, loader.file_of(following), loader.stored_as(following))

    def close(self) -> None:
        """End the thread; what it has not begun is not read."""
        self._thread.shutdown(cancel_futures=True)

    def _read(self, file: Path, name: str) -> None:
        # What is wrong with the file is said where the tensor is needed.
        with suppress(OSError, UserError):
            if file not in self._offsets:
                begin, entries = header_entries(file)
                self._offsets[file] = {
                    key: (begin + entry.data_offsets[0], entry.data_offsets[1] - entry.data_offsets[0])
                    for key, entry in entries.items()
                }
            if name in self._offsets[file]:
                descriptor = os.open(file, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, *self._offsets[file][name], os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)


@contextmanager
def reading_ahead(passes: Callable[[], Sequence[Sequence[str]]]) -> Iterator[None]:
    """Read ahead in all checkpoints that are open, while the block lasts; see `ReadAhead`."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        yield
        return
    ahead = ReadAhead(passes)
    opened = [loader for loader in LoaderCache().loaders.values() if isinstance(loader, CheckpointLoader)]
    opened = [loader for loader in opened if loader.index.is_safetensors]
    for loader in opened:
        loader.on_read = ahead.reached
    try:
        yield
    finally:
        for loader in opened:
            loader.on_read = None
        ahead.close()
