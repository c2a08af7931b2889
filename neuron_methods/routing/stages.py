"""Finished parts of a long run are kept in a working directory, and taken from there when the run is started again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from neuron_methods.support.errors import UserError

_STAMP = "stage.json"
T = TypeVar("T")


class WorkDirectory:
    """A directory of finished stages, each named by its kind and by a digest of what it was made from."""

    def __init__(self, path: Path) -> None:
        """Use `path`, which is made where it is not there."""
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot write here ({error.strerror}); name another --work-dir") from None

    def stage(self, name: str, key: Any, build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any], bool]:
        """What `build` makes from `key`, made now or taken as it is.

        Args:
            name: of the stage, for the directory.
            key: JSON of everything the outcome depends on.
            build: fills the directory it is given, and returns JSON to keep with it.

        Returns:
            The stage's directory, what `build` returned, and whether it had been made before.
        """
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        place = self.path / f"{name}-{digest}"
        try:
            return place, json.loads((place / _STAMP).read_text(encoding="utf-8")), True
        except (OSError, ValueError):
            pass
        partial = self.path / f".{place.name}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            result = build(partial)
            (partial / _STAMP).write_text(json.dumps(result), encoding="utf-8")
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return place, json.loads(json.dumps(result)), False

    def remove(self) -> None:
        """Remove everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)


def fingerprint(reference: str) -> list[Any]:
    """Tells apart models and adapters: the files of a directory by name, size and time, or a hub id."""
    if not os.path.isdir(reference):
        return [reference]
    files = sorted(Path(reference).glob("*.safetensors")) + sorted(Path(reference).glob("*config.json"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [os.path.realpath(reference), stats]
