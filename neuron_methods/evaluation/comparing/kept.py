"""The directory of a comparison: finished rows are kept with what they were made from, and not made again."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from neuron_methods.evaluation.comparing.rows import AGAIN, Rows, as_stored
from neuron_methods.evaluation.tuning.trace import Score
from neuron_methods.models.processes import of_first, process_state
from neuron_methods.support.documents import Foreign, Given, validated
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_json
from neuron_methods.support.runs import LOCK
from neuron_methods.support.targets import json_of
from neuron_methods.support.text import listed

FORMAT = "mergekit-neuron-comparison"
VERSION = 1
SUMMARY = "compare.json"
ROWS = "rows"


class _Task(Foreign):
    """What is read of a task's record."""

    name: str
    metric: str
    score: Score
    count: int
    seconds: float


class _Result(Given):
    """What a row holds."""

    tasks: Annotated[list[_Task], Field(min_length=1)]
    outcomes: dict[str, Annotated[list[Score], Field(min_length=1)]]
    method: str = ""
    source: str = ""
    point: dict[str, bool | int | float | str] = Field(default_factory=dict)
    points: int = 0
    validation: Score | None = None
    merge_seconds: float | None = None


class _Kept(Given):
    """A file of a row."""

    key: dict[str, Any]
    result: _Result


class _Rows(Rows):
    def check(self, content: Mapping[str, Any], place: Path) -> None:
        """Refuse what is no row of a comparison; raises UserError."""
        validated(content, _Kept, str(place), AGAIN)

    def read(self, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Refuse a row whose tasks are not those of its key, too, or that lacks scores of examples."""
        found = super().read(name, key)
        names = [task["name"] for task in key["tasks"]]
        if found is not None:
            counts = {task["name"]: task["count"] for task in found["tasks"]}
            scored = {task: len(scores) for task, scores in found["outcomes"].items()}
            if list(counts) != names or counts != scored:
                what = f"expected the scores of every example of {listed(names)}"
                raise UserError(f"{self.place(name)}: result.outcomes: {what}; {AGAIN}")
        return found


class Kept:
    """The rows of a comparison; each is on disk when it is done, by the first process."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], force: bool) -> None:
        """Open a directory of ours, or begin one.

        Args:
            folder: of the comparison.
            identity: what every row depends on, beside its own key.
            force: forget the rows that are there.
        """
        self.folder, self.identity = folder, identity
        self.rows = _Rows(folder / ROWS)
        self.writes = process_state().is_main_process
        if not self.writes:
            return
        if not (folder / SUMMARY).exists():  # first, as a directory is told to be ours by it
            write_json(folder / SUMMARY, {"format": FORMAT, "version": VERSION})
        self.rows.folder.mkdir(exist_ok=True)
        if force:
            for file in self.rows.folder.glob(f"*-{'[0-9a-f]' * 8}.json"):
                file.unlink()

    def make(self, name: str, key: Mapping[str, Any], build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Give the result of a row as it is kept, or build it now."""
        found = self.read(name, key)
        if found is not None:
            return found
        result = build()
        return self.rows.make(name, {**self.identity, **key}, lambda: result) if self.writes else as_stored(result)

    def read(self, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Read a row that was made from the same; None where there is none. All processes get what the first finds."""
        return of_first(self.rows.read(name, {**self.identity, **key}) if self.writes else None)


def check_folder(folder: Path) -> None:
    """Refuse a directory that holds something else than a comparison; raises UserError."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"-o {folder}: a file; name a directory")
    others = [name for name in os.listdir(folder) if name != LOCK and not name.endswith(".partial")]
    if others and not json_of(FORMAT)(folder / SUMMARY):
        raise UserError(f"-o {folder}: holds files that compare did not write; name another directory")
