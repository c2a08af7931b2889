"""The finished rows of one zoo, a file each, on which several processes may work side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from neuron_methods.evaluation.comparing import Rows as KeptRows


class Busy(Exception):
    """Another process is at it."""


@contextmanager
def held(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock by the name of `path` for as long as the block lasts; a process that ends lets go of its locks.

    Raises:
        Busy: another process holds it, and `wait` is false.
    """
    lock = path.parent / ".locks" / f"{path.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, blocking=wait):
            yield
    except Timeout:
        raise Busy(path.name) from None


class Rows(KeptRows):
    """Results by name, each with the key of what it was made from, on which several processes work side by side."""

    def place(self, name: str) -> Path:
        """Say which file a row is in."""
        return self.folder / (re.sub(r"[^\w-]+", "_", name) + ".json")

    def make(self, name: str, key: Mapping[str, Any], build: Callable[[], Any], wait: bool = True) -> Any:
        """Give the result as it is kept, or build it now.

        Raises:
            Busy: another process is building it, and `wait` is false.
        """
        with held(self.place(name), wait):
            return super().make(name, key, build)
