"""Finished work is kept: a stage is built beside its place, stamped with its settings, and moved in whole.

A stage whose stamp matches its settings is not built again. A run that is interrupted leaves finished stages and
nothing of the unfinished one; what a killed process left in ``.partial`` is removed when the stage is built next.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuron_methods.support.errors import UserError

#: The stamp inside a finished stage's directory: what it was built from, what came out, and how long it took.
STAMP = "demo-stage.json"


@dataclass(frozen=True)
class Stage:
    """The outcome of `run_stage`.

    Attributes:
        result: what `build` returned, as read back from the stamp.
        seconds: time it took when it was built.
        built: whether that was in this run.
    """

    result: Any
    seconds: float
    built: bool


def run_stage(directory: Path, settings: dict[str, Any], build: Callable[[Path], Any], *, redo: bool = False) -> Stage:
    """Make sure that `directory` holds what `build` makes under `settings`.

    Args:
        directory: the stage's place.
        settings: a JSON object with all that determines the outcome.
        build: creates and fills the directory it is given, which has the name of `directory` and is not there yet;
            returns something JSON can hold.
        redo: build even if it is there.

    Raises:
        UserError: `directory` exists and no stage wrote it.
    """
    settings = json.loads(json.dumps(settings))
    stamp = _read_stamp(directory / STAMP)
    if stamp is None and directory.exists():
        raise UserError(f"{directory}: was not written by the demo; choose another --out, or move it away")
    if stamp is not None and stamp["settings"] == settings and not redo:
        return Stage(stamp["result"], stamp["seconds"], built=False)
    started = time.perf_counter()
    partial = directory.parent / ".partial" / directory.name
    _remove(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = build(partial)
        seconds = round(time.perf_counter() - started, 2)
        stamp = {"settings": settings, "result": result, "seconds": seconds}
        (partial / STAMP).write_text(json.dumps(stamp, indent=1, ensure_ascii=False), encoding="utf-8")
        _move_into_place(partial, directory)
    finally:
        _remove(partial)
        with suppress(OSError):
            partial.parent.rmdir()
    return Stage(json.loads(json.dumps(result)), seconds, built=True)


def _read_stamp(path: Path) -> dict[str, Any] | None:
    """The stamp, or None where there is none. A stage is moved in whole, so its stamp is whole too."""
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) and stamp.keys() >= {"settings", "result", "seconds"} else None


def _move_into_place(partial: Path, directory: Path) -> None:
    if directory.exists():
        outdated = partial.parent / f"{directory.name}.outdated"
        _remove(outdated)
        os.replace(directory, outdated)
        os.replace(partial, directory)
        _remove(outdated)
    else:
        os.replace(partial, directory)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all; one that says so already is left alone."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_bytes(text.encode())
    os.replace(beside, path)
