"""Whether a file is still what it was: by its size, its time, and a digest of what tells files of its kind apart."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from neuron_methods.support.documents import open_file
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import listed

_WHOLE = 4 << 20  # files up to here are read whole, and need no time
_SAMPLE = 4096  # bytes at the beginning, in the middle and at the end of a tensor, or of another file
_MOST_HEADER = 100 << 20


def content_digest(path: str | os.PathLike[str]) -> str:
    """Digest a file: small ones whole, safetensors by header and samples of every tensor, others by samples.

    It is the same for copies, wherever and whenever they were made.

    Raises:
        UserError: it cannot be opened, or is no regular file: a pipe would be waited for.
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_file(path, str(path)) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(str(size).encode())
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            for start, end in _stretches(file, size, digest.update):
                for place in sorted({start, max(start, (start + end - _SAMPLE) // 2), max(start, end - _SAMPLE)}):
                    file.seek(place)
                    digest.update(file.read(min(_SAMPLE, end - place)))
    return digest.hexdigest()[:16]


def file_state(path: str | os.PathLike[str]) -> list[Any]:
    """Say what a file is: size, time of its last change in ns (0 of those that are digested whole), digest; for JSON.

    A file that cannot be read is `[]`.
    """
    try:
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns if status.st_size > _WHOLE else 0, content_digest(path)]
    except (OSError, UserError):
        return []


def code_digest(directory: Path) -> str:
    """Digest a package's own modules, by their names and all that is in them."""
    digest = hashlib.sha256()
    for file in sorted(directory.rglob("*.py")):
        digest.update(file.relative_to(directory).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def tree_state(place: str | os.PathLike[str]) -> list[Any]:
    """Say what a file is, or a directory with all below it: by paths, sizes and times, which are digested; for JSON."""
    if not os.path.isdir(place):
        return file_state(place)
    digest, count = hashlib.sha256(), 0
    for file in sorted(path for path in Path(place).rglob("*") if path.is_file()):
        status = file.stat()
        count += 1
        digest.update(repr((file.relative_to(place).as_posix(), status.st_size, status.st_mtime_ns)).encode())
    return [count, digest.hexdigest()[:16]]


class Watch:
    """Notices that one of several files has changed meanwhile.

    Attributes:
        before: {file: its state at first}.
    """

    def __init__(self, files: Iterable[str | os.PathLike[str]], state: Callable[[Any], Any] = file_state) -> None:
        """Take note of what `files` are now."""
        self._state = state
        self.before = {os.fspath(file): state(file) for file in files}

    def check(self) -> None:
        """Raise UserError if one is something else by now."""
        changed = [file for file, before in self.before.items() if self._state(file) != before]
        if changed:
            raise UserError(
                f"{listed(changed)}: changed while it was read, so the result would be of both; nothing is kept, run "
                "again"
            )


def _stretches(file: BinaryIO, size: int, update: Callable[[bytes], Any]) -> list[tuple[int, int]]:
    """Where to take samples: the tensors of a safetensors file, after its header; else the file as a whole."""
    length = int.from_bytes(file.read(8), "little")
    if 2 <= length <= min(size - 8, _MOST_HEADER):
        header = file.read(length)
        try:
            entries = json.loads(header)
            found = [(e["data_offsets"][0], e["data_offsets"][1]) for n, e in entries.items() if n != "__metadata__"]
            stretches = [(8 + length + int(start), 8 + length + int(end)) for start, end in found]
            if all(0 <= start <= end <= size for start, end in stretches):
                update(header)
                return stretches
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            pass
    return [(0, size)]
