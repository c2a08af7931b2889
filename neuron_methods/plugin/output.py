"""A directory that is complete or absent: written beside its place, verified, moved into place.

What stands in OUT before is touched only at the very end, and put back if the move fails. Whatever ends the run before
that, an error or a signal, takes the unfinished directory with it.
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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mergekit.options import MergeOptions

from neuron_methods.plugin.preflight import Header, HeaderCache, MergePlan, header_of, open_safetensors
from neuron_methods.support.errors import UserError

_DISK_FULL = ("No space left on device", "File too large", "Disk quota exceeded", "PytorchStreamWriter failed writing")


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
            raise UserError(f"{out_path}: is or holds {path}, which the merge reads; choose another name")
    names = os.listdir(target)
    if names and not any(n == "config.json" or n.endswith((".safetensors", ".bin")) for n in names):
        raise UserError(f"{out_path}: holds no model, so --force does not replace it; choose another name")
    return target


@contextmanager
def staging_directory(target: Path) -> Iterator[Path]:
    """A directory beside `target` to write into; gone at the end of the block unless it was moved away.

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
def file_in_place_after(path: Path, text: str) -> Iterator[None]:
    """Write a file now and give it its name once the block has succeeded; else it is gone."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        yield
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    """Whether an error says that the output does not fit: of the system, or as safetensors and torch wrap it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return any(text in str(error) for text in _DISK_FULL)


def verify_output(path: str | os.PathLike[str], plan: MergePlan, *, aligned: bool, options: MergeOptions) -> None:
    """Make sure that a written model is whole: every planned tensor there, with the base's shape.

    That every value is finite was checked on each tensor before it was written.

    Args:
        path: the directory.
        plan: what was to be written; it holds every tensor of the base.
        aligned: whether vocabularies were aligned, so that their axis may have another length than the base's.
        options: mergekit's.

    Raises:
        UserError: naming the tensor that is missing or wrong, or the file that is damaged.
    """
    config = Path(path) / "config.json"
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError("verification failed: config.json was not written completely") from None
    written = written_headers(Path(path), options.safe_serialization)
    vocabulary: int | None = None
    for weight, inputs, size in plan.tensors:
        if not size:
            continue
        if weight.name not in written:
            raise UserError(f"verification failed: tensor {weight.name} is missing from the output")
        shape = list(written[weight.name].shape)
        expected = list((inputs.get(plan.base) or next(iter(inputs.values()))).shape)
        axis = weight.vocabulary_axis
        if axis is not None and (aligned or options.unsafe_truncate_embeddings) and axis < len(shape):
            vocabulary = shape[axis] if vocabulary is None else vocabulary
            expected[axis] = vocabulary
        if shape != expected:
            raise UserError(f"verification failed: {weight.name} has shape {shape}, expected {expected}")


def written_headers(path: Path, safe: bool = True) -> dict[str, Header]:
    """Headers of all tensors of a model directory, by its index or its single file.

    Args:
        path: the directory.
        safe: safetensors files, else pickles.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    stem = "model.safetensors" if safe else "pytorch_model.bin"
    index, whole = path / f"{stem}.index.json", path / stem
    if index.exists():
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    elif whole.exists():
        names = open_safetensors(str(whole)).keys() if safe else _unpickled(whole)
        weight_map = dict.fromkeys(names, stem)
    else:
        raise UserError(f"verification failed: {stem} was not written")
    if not safe:
        tensors: dict[str, Any] = {}
        for file in set(weight_map.values()):
            tensors |= _unpickled(path / file)
        return {name: header_of(tensors[name]) for name in weight_map if name in tensors}
    headers = HeaderCache()
    return {name: headers.in_file(str(path / file), name) for name, file in weight_map.items()}


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    """Tensors without data."""
    try:
        return torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        raise UserError(f"verification failed: {file.name} cannot be read back ({type(error).__name__})") from None
