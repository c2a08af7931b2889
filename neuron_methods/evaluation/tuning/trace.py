"""The directory of a search: what was tried, resumable; the best configuration."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr

from neuron_methods.evaluation.examples import Examples
from neuron_methods.evaluation.tuning.search import Point, key_of
from neuron_methods.models.processes import of_first, process_state
from neuron_methods.support.documents import (
    Foreign,
    Given,
    parse_json,
    read_json,
    read_object,
    read_text,
    validated,
)
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_json, write_text
from neuron_methods.support.runs import LOCK
from neuron_methods.support.targets import json_of
from neuron_methods.support.text import listed

FORMAT = "mergekit-neuron-tune"
VERSION = 1


@dataclass(frozen=True)
class Trial:
    """A point and what it scored on validation data, by task; its weights were ``recombined`` or ``merged``."""

    point: Point
    scores: dict[str, float]
    weights: str
    seconds: float


#: A perplexity may be infinite; a score that is no number belongs to no run.
Score = Annotated[float, Field(strict=True, ge=float("-inf"), allow_inf_nan=True)]


class _Trial(Given):
    """A line of trace.jsonl."""

    point: dict[str, StrictBool | StrictInt | StrictFloat | StrictStr]
    scores: dict[str, Score]
    weights: Literal["recombined", "merged"]
    seconds: float


class _Best(Foreign):
    point: dict[str, Any]


class _Summary(Foreign):
    """What is read of tune.json."""

    search: dict[str, Any] = Field(default_factory=dict)
    best: _Best | None = None


class Trace:
    """All trials of a search, in the order in which they were run, and in a file.

    Attributes:
        folder: where.
        trials: by the key of their point.
        experts: task -> {expert: score}.
        summary: what an earlier run told at its end.
        writes: whether this is the process that keeps what all have found.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], force: bool) -> None:
        """Open a directory, with what an earlier run of the same search left there.

        Args:
            folder: made if it is not there.
            identity: what the scores depend on, besides the point.
            force: forget the search that is there.

        Raises:
            UserError: it holds something else, or the trials of another search.
        """
        self.folder = folder
        self._identity = json.loads(json.dumps(identity))
        self.trials: dict[str, Trial] = {}
        self.experts: dict[str, dict[str, float]] = {}
        self.summary: dict[str, Any] = {}
        self.writes = process_state().is_main_process
        if self.writes:
            self._open(force)
        self.trials, self.experts, self.summary = of_first((self.trials, self.experts, self.summary))

    def _open(self, force: bool) -> None:
        if not is_new(self.folder) and not force:
            self._resume()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("trace.jsonl", "experts.json", "best.yml", "scores.png"):
            (self.folder / name).unlink(missing_ok=True)
        self.finish({})

    def add(self, trial: Trial) -> None:
        """Keep a trial; it is on disk when this returns in the first process."""
        self.trials[key_of(trial.point)] = trial
        if not self.writes:
            return
        with (self.folder / "trace.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(trial), ensure_ascii=False) + "\n")

    def get(self, point: Point) -> Trial | None:
        """Look up what a point scored, if it was tried."""
        return self.trials.get(key_of(point))

    def add_expert(self, task: str, expert: str, score: float) -> None:
        """Keep an expert's score."""
        self.experts.setdefault(task, {})[expert] = score
        if self.writes:
            write_json(self.folder / "experts.json", self.experts, indent=2)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary of the search."""
        if not self.writes:
            return
        content = {"format": FORMAT, "version": VERSION, "search": self._identity, **summary}
        write_json(self.folder / "tune.json", content, indent=2)

    def _resume(self) -> None:
        again = "name another directory, or give --force"
        self.summary = read_json(self.folder / "tune.json", "", format=FORMAT, version=VERSION, again=again)
        search = validated(self.summary, _Summary, str(self.folder / "tune.json"), again).search
        changed = [
            key + _told_apart(search.get(key), now) for key, now in self._identity.items() if search.get(key) != now
        ]
        if changed:
            raise UserError(
                f"-o {self.folder}: holds a search with another {' and another '.join(changed)}; name another "
                "directory, or give --force to begin anew"
            )
        trace = self.folder / "trace.jsonl"
        text = read_text(trace) if os.path.lexists(trace) else ""
        whole, _, _ = text.rpartition("\n")  # a run that was killed while it wrote left part of a line behind
        names = [task["name"] for task in self._identity["set of tasks"]]
        for number, line in enumerate(whole.split("\n") if whole else [], 1):
            where = f"{trace}, line {number}"
            found = validated(parse_json(line, where, again), _Trial, where, again)
            for what, given, expected in (
                ("point", found.point, self._identity["set of parameters"]),
                ("scores", found.scores, names),
            ):
                if sorted(given) != sorted(expected):
                    raise UserError(f"{where}: {what}: expected {', '.join(expected)}; {again}")
            trial = Trial(**found.model_dump())
            self.trials[key_of(trial.point)] = trial
        if text and not text.endswith("\n"):
            write_text(trace, f"{whole}\n" if whole else "")
        experts = self.folder / "experts.json"
        if os.path.lexists(experts):
            content = read_object(experts, again=again)
            self.experts = validated(content, dict[str, dict[str, Score]], str(experts), again)


def is_new(folder: Path) -> bool:
    """Tell whether a search may begin in a directory: it is not there, or holds nothing.

    Raises:
        UserError: it is none, or holds something else than a search.
    """
    if not folder.exists():
        return True
    if not folder.is_dir():
        raise UserError(f"-o {folder}: a file; name a directory")
    if not any(name != LOCK and not name.endswith(".partial") for name in os.listdir(folder)):
        return True
    if not json_of(FORMAT)(folder / "tune.json"):
        raise UserError(f"-o {folder}: holds files that tune did not write; name another directory")
    return False


def _told_apart(before: Any, now: Any) -> str:
    """Name the entries that differ, where both are mappings."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return ""
    return f" ({listed([key for key in now | before if now.get(key) != before.get(key)])})"


def fingerprint_of_examples(examples: Examples) -> str:
    """Digest examples: the same questions with the same answers give the same digest."""
    digest = hashlib.sha256()
    for sample in examples.samples:
        digest.update(repr((sample.row, sample.values)).encode())
    return digest.hexdigest()[:16]
