"""The finished rows of one zoo, a file each, on which several processes may work side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from neuron_methods.support.files import write_json


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


class Rows:
    """Results by name, each with the key of what it was made from. Rows are written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        """`folder` need not be there yet."""
        self.folder = folder

    def read(self, name: str, key: Mapping[str, Any]) -> Any:
        """Read the result of that name and key; None where there is none."""
        path = self._path(name)
        if not path.is_file():
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored["result"] if stored["key"] == json.loads(json.dumps(key)) else None

    def make(self, name: str, key: Mapping[str, Any], build: Callable[[], Any], wait: bool = True) -> Any:
        """Give the result as it is kept, or build it now.

        Raises:
            Busy: another process is building it, and `wait` is false.
        """
        path = self._path(name)
        with held(path, wait):
            result = self.read(name, key)
            if result is None:
                result = build()
                write_json(path, {"key": key, "result": result})
            return result

    def _path(self, name: str) -> Path:
        return self.folder / (re.sub(r"[^\w-]+", "_", name) + ".json")
