"""What is asked of a model: a task, its rows, and which of them may be looked at before the test."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuron_methods.support.errors import UserError


@dataclass(frozen=True)
class Rows:
    """Rows of one data set: a split of a local path or of a hub id with its configuration, from `start` up to `stop`.

    A split of None is the only one there is, a `stop` of None the end.
    """

    location: str
    local: bool
    config: str | None = None
    split: str | None = None
    start: int = 0
    stop: int | None = None

    @property
    def split_shown(self) -> str:
        """The split as the user writes it, `all` for a whole file."""
        rows = f"[{self.start or ''}:{'' if self.stop is None else self.stop}]" if self.start or self.stop else ""
        return f"{self.split or ''}{rows}" or "all"

    def overlaps(self, other: Rows) -> bool:
        """Tell whether both have rows in common."""
        ends = [rows.stop if rows.stop is not None else float("inf") for rows in (self, other)]
        return self._holds(other) and max(self.start, other.start) < min(ends)

    def _holds(self, other: Rows) -> bool:
        """Tell whether both are of the same data; a file within a folder counts as the split that it is named after."""
        if not (self.local and other.local):
            return all(getattr(self, key) == getattr(other, key) for key in ("location", "local", "config", "split"))
        here, there = (Path(rows.location).resolve() for rows in (self, other))
        if here == there:
            return self.split == other.split
        for folder, file, split in ((here, there, self.split), (there, here, other.split)):
            if folder.is_dir() and folder in file.parents and split is not None:
                return split in re.split(r"[^a-zA-Z0-9]+", str(file.relative_to(folder)))
        return False


@dataclass(frozen=True)
class Task:
    """One task of the file.

    Attributes:
        name: unique within the file.
        kind: one of `neuron_methods.evaluation.kinds.KINDS`.
        source: as the file names it.
        test: rows that are scored; None where the kind brings its own data.
        validation: rows that tuning may look at, None: there are none.
        columns: role -> column, complete.
        metric: what the score is.
        batch_size: examples per forward pass.
        limit: how many examples are drawn at most; 0: all.
        settings: the keys of its kind.
    """

    name: str
    kind: str
    source: str
    test: Rows | None
    validation: Rows | None
    columns: Mapping[str, str]
    metric: str
    batch_size: int
    limit: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def files(self) -> list[str]:
        """List the files and folders here that its data are in."""
        return [rows.location for rows in (self.test, self.validation) if rows is not None and rows.local]

    def rows(self, split: str) -> Rows:
        """Give the rows of ``test`` or ``validation``.

        Raises:
            UserError: there is no such split.
        """
        if split not in ("test", "validation"):
            raise UserError(f"split {split!r}: a task has the splits test and validation")
        rows = self.test if split == "test" else self.validation
        if rows is None:
            raise UserError(
                f"task {self.name!r}: data: there is no validation_split; name a split that is not the test's"
            )
        return rows
