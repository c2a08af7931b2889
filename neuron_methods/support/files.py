"""Files of this package: written whole or not at all.

A directory is complete or absent: written beside its place, verified, moved into place. What stood there before is
touched only at the very end, and put back if the move fails. Whatever ends the run before that, an error or a signal,
takes the unfinished directory with it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from neuron_methods.support.errors import UserError
from neuron_methods.support.runs import beside, parents_of, remove
from neuron_methods.support.text import format_bytes

_DISK_FULL = ("No space left on device", "File too large", "Disk quota exceeded", "PytorchStreamWriter failed writing")
_MISTAKEN = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file beside `path` and move it into place; one that says so already is left alone.

    Raises:
        UserError: it cannot be written; what was at `path` is still there.
    """
    path = Path(path)
    data = text.encode()
    if path.is_file() and path.read_bytes() == data:
        return
    with file_in_place_after(path) as beside:
        beside.write_bytes(data)


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write a JSON file as `write_text` does; errors likewise."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


@contextmanager
def file_in_place_after(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the place beside `path` to write to, and move what is there to `path` once the block has succeeded.

    Raises:
        UserError: it cannot be written; what was at `path` is still there.
    """
    with _finished(Path(path)) as unfinished:
        yield unfinished
        _settle(unfinished)
        os.replace(unfinished, path)


def within(directory: Path, *names: str) -> Path:
    """Find a file of a directory, which may be a link only to what is in the directory or in the Hub's cache around it.

    Raises:
        UserError: it leads out of there.
    """
    path = directory.joinpath(*names)
    root, found = Path(os.path.realpath(directory)), Path(os.path.realpath(path))
    roots = [root]
    for snapshot in (root, *root.parents):  # a model's own directory, or one of several within a repository
        if snapshot.parent.name == "snapshots" and snapshot.parents[1].name.startswith("models--"):
            # The repository's, and what Xet shares.
            roots += [snapshot.parents[1] / "blobs", snapshot.parents[2] / "blobs"]
    if not any(found == allowed or allowed in found.parents for allowed in roots):
        raise UserError(f"{path}: a link that leads out of {directory}; put the file itself there")
    return path


@contextmanager
def pair_in_place_after(
    first: str | os.PathLike[str], second: str | os.PathLike[str], *, extends: bool = False
) -> Iterator[tuple[Path, Path]]:
    """Write two files that belong together as `file_in_place_after` does one; at no moment does one go with a stranger.

    A run that is killed leaves the old pair, the new one, or no `first`: then it was about to put the new one there.

    Args:
        first: what is looked for.
        second: what `first` refers to.
        extends: the new `second` serves the old `first`, too.

    Raises:
        UserError: one of them cannot be written; both are as they were.
    """
    first, second = Path(first), Path(second)
    with _finished(first) as one, _finished(second) as other:
        yield one, other
        _settle(one)
        _settle(other)
        with signals_held():
            if not extends:
                first.unlink(missing_ok=True)
            os.replace(other, second)
            os.replace(one, first)


@contextmanager
def _finished(path: Path) -> Iterator[Path]:
    """The unfinished file of `path`, gone after the block; what goes wrong with it becomes one line."""
    unfinished = beside(path, "partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise UserError(f"{path}: cannot be written (no space left on the disk, or for a file)") from None
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
        raise
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _settle(file: Path) -> None:
    """Give a finished file its permissions, and have it on the disk before anything refers to it."""
    file.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
    with file.open("rb") as written:
        os.fsync(written.fileno())


@contextmanager
def staging_directory(target: Path) -> Iterator[Path]:
    """Give a directory beside `target` to write into; gone at the end of the block unless it was moved away.

    Raises:
        UserError: the place cannot be written to.
    """
    staging = beside(target, "partial")
    with parents_of(target):
        try:
            staging.mkdir()
            yield staging
        except OSError as error:
            if error.filename != str(staging):
                raise
            raise UserError(f"{target.parent}: cannot write here ({error.strerror})") from None
        finally:
            with signals_held():
                remove(staging)


def move_into_place(staging: Path, target: Path, force: bool) -> None:
    """Rename the finished directory to `target`; what was there is put back if that fails, and removed if not.

    Raises:
        UserError: `target` came into being meanwhile, or cannot be replaced.
    """
    for folder, _, files in os.walk(staging):
        for name in files:
            _settle(Path(folder, name))
    with signals_held():
        if not os.path.lexists(target):
            staging.rename(target)
            return
        if not force:  # it appeared while the merge ran
            raise UserError(f"{target}: exists already; choose another name, or --force to replace it")
        old = beside(target, "old")
        try:
            old.mkdir()
            target.rename(old / target.name)
            try:
                staging.rename(target)
            except BaseException:
                (old / target.name).rename(target)
                raise
        except OSError as error:
            raise UserError(f"{target}: cannot be replaced ({error.strerror}); choose another name") from None
        finally:
            if os.path.lexists(target):
                remove(old)


@contextmanager
def signals_held() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP wait until the block is done; they are delivered then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {n: signal.signal(n, lambda number, _frame: arrived.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            if handler is not None:  # None: set by something else than Python
                signal.signal(number, handler)
        for number in arrived:
            signal.raise_signal(number)


def check_space(directory: Path, need: float) -> None:
    """Refuse where so many bytes will not fit on the disk.

    Raises:
        UserError: naming the directory, what is free and what is needed.
    """
    free = shutil.disk_usage(next(place for place in (directory, *directory.parents) if place.exists())).free
    if need > free:
        raise UserError(
            f"{directory}: {format_bytes(need)} to write, {format_bytes(free)} free; make room or choose another disk"
        )


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error says that the output does not fit: of the system, or as safetensors and torch wrap it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return any(text in str(error) for text in _DISK_FULL)


def is_own_fault(error: BaseException) -> bool:
    """Tell whether work failed by a mistake in what it was given, and would again, not by the system: a full disk, say.

    What became a `UserError` is judged by what it came of. A file that is not there, or is a directory, is a mistake.
    """
    cause = error if isinstance(error, UserError) else None
    while (cause := cause and (cause.__cause__ or cause.__context__)) is not None:
        of_system = isinstance(cause, OSError) and cause.errno is not None  # others raise OSError of their own accord
        if is_disk_full(cause) or (of_system and not isinstance(cause, _MISTAKEN)):
            return False
    return isinstance(error, UserError)
