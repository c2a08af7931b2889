"""The directory of a comparison: finished rows are kept with what they were made from, and not made again."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from neuron_methods.support.documents import Foreign, read_object, validated
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_json
from neuron_methods.support.runs import LOCK
from neuron_methods.support.targets import json_of

FORMAT = "mergekit-neuron-comparison"
VERSION = 1
SUMMARY = "compare.json"
ROWS = "rows"


class _Kept(Foreign):
    """A file of a row."""

    key: dict[str, Any]
    result: dict[str, Any]


class Kept:
    """Rows by name; each is on disk when it is done."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], force: bool) -> None:
        """Open a directory of ours, or begin one.

        Args:
            folder: of the comparison.
            identity: what every row depends on, beside its own key.
            force: forget the rows that are there.
        """
        self.folder, self.identity = folder, identity
        (folder / ROWS).mkdir(parents=True, exist_ok=True)
        if not (folder / SUMMARY).exists():
            write_json(folder / SUMMARY, {"format": FORMAT, "version": VERSION})
        if force:
            for file in (folder / ROWS).glob("*.json"):
                file.unlink()

    def make(self, name: str, key: Mapping[str, Any], build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Give the result of a row as it is kept, or build it now."""
        key = json.loads(json.dumps({**self.identity, **key}))
        place = self._place(name)
        found = self.read(name, key)
        if found is None:
            found = json.loads(json.dumps(build()))
            write_json(place, {"key": key, "result": found})
        return found

    def read(self, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Read a row that was made from the same; None where there is none."""
        place = self._place(name)
        if not place.is_file():
            return None
        again = "remove it, or give --force to begin anew"
        kept = validated(read_object(place, again=again), _Kept, str(place), again)
        return kept.result if kept.key == json.loads(json.dumps({**self.identity, **key})) else None

    def _place(self, name: str) -> Path:
        # Names differ where their shortened forms do not.
        short = re.sub(r"[^\w-]+", "_", name)[:60]
        return self.folder / ROWS / f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.json"


def check_folder(folder: Path) -> None:
    """Refuse a directory that holds something else than a comparison; raises UserError."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"-o {folder}: a file; name a directory")
    others = [name for name in os.listdir(folder) if name not in (LOCK, ROWS) and not name.endswith(".partial")]
    if others and not json_of(FORMAT)(folder / SUMMARY):
        raise UserError(f"-o {folder}: holds files that compare did not write; name another directory")
