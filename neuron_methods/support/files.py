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
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neuron_methods.support.errors import UserError

_DISK_FULL = ("No space left on device", "File too large", "Disk quota exceeded", "PytorchStreamWriter failed writing")


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
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        beside.unlink(missing_ok=True)


def within(directory: Path, *names: str) -> Path:
    """Find a file of a directory, which may be a link only to what is in the directory or in the Hub's cache around it.

    Raises:
        UserError: it leads out of there.
    """
    path = directory.joinpath(*names)
    root, found = Path(os.path.realpath(directory)), Path(os.path.realpath(path))
    roots = [root]
    if root.parent.name == "snapshots" and root.parents[1].name.startswith("models--"):
        roots += [root.parents[1] / "blobs", root.parents[2] / "blobs"]  # the repository's, and what Xet shares
    if not any(found == allowed or allowed in found.parents for allowed in roots):
        raise UserError(f"{path}: a link that leads out of {directory}; put the file itself there")
    return path


def check_target(out_path: str | os.PathLike[str], force: bool, inputs: Iterable[str] = ()) -> Path:
    """Make sure that the output may be written, and where.

    Args:
        out_path: as the user gave it; a link stands for what it points to.
        force: whether an existing directory may be replaced.
        inputs: files and directories that must not be replaced.

    Returns:
        The absolute path of the directory to write.

    Raises:
        UserError: it exists, or replacing it would destroy something else than an earlier output.
    """
    target = Path(os.path.realpath(out_path))
    if not os.path.lexists(target):
        return target
    if not force:
        raise UserError(f"{out_path}: exists already; choose another name, or --force to replace it")
    if not target.is_dir():
        raise UserError(f"{out_path}: exists and is not a directory; choose another name")
    if target in (here := Path.cwd()).parents or target == here:
        raise UserError(f"{out_path}: is or holds the current directory; choose another name")
    for path in inputs:
        if target in (real := Path(os.path.realpath(path))).parents or target == real:
            raise UserError(f"{out_path}: is or holds {path}, which is read; choose another name")
    names = os.listdir(target)
    if names and not any(n == "config.json" or n.endswith((".safetensors", ".bin")) for n in names):
        raise UserError(f"{out_path}: holds no model, so --force does not replace it; choose another name")
    return target


@contextmanager
def staging_directory(target: Path) -> Iterator[Path]:
    """Give a directory beside `target` to write into; gone at the end of the block unless it was moved away.

    Parents that had to be made for it are removed, too, where nothing came into them.

    Raises:
        UserError: the place cannot be written to.
    """
    made = []
    staging = None
    try:
        try:
            for parent in [p for p in (target.parent, *target.parent.parents) if not p.exists()][::-1]:
                parent.mkdir()
                made.append(parent)
            staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
            staging.chmod(0o777 & ~_umask())
        except OSError as error:
            raise UserError(f"{target.parent}: cannot write here ({error.strerror})") from None
        yield staging
    finally:
        with signals_held():
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
            for parent in made[::-1]:
                if not any(parent.iterdir()):
                    parent.rmdir()


def move_into_place(staging: Path, target: Path, force: bool) -> None:
    """Rename the finished directory to `target`; what was there is put back if that fails, and removed if not.

    Raises:
        UserError: `target` came into being meanwhile, or cannot be replaced.
    """
    if os.path.lexists(target) and not force:  # it appeared while the merge ran
        raise UserError(f"{target}: exists already; choose another name, or --force to replace it")
    with signals_held():
        if not os.path.lexists(target):
            staging.rename(target)
            return
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
        try:
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
                shutil.rmtree(old, ignore_errors=True)


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


def give_ordinary_permissions(directory: Path) -> None:
    """Let all files follow the umask: safetensors makes files that only their owner can read."""
    allowed = 0o666 & ~_umask()
    for path in directory.rglob("*"):
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != allowed:
            path.chmod(allowed)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error says that the output does not fit: of the system, or as safetensors and torch wrap it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return any(text in str(error) for text in _DISK_FULL)
