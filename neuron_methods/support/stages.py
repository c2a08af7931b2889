"""Finished parts of a long run are kept, and not made again by the next run.

A stage is a directory. It is built beside its place and moved in whole; a record apart from it tells what it was made
from, what came out and what its files were then, so that nothing of ours lies in a directory that is for others. An
interrupted run leaves finished stages and nothing of the unfinished one; what a killed process left is removed by the
next run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuron_methods.support.documents import read_object
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_json
from neuron_methods.support.fingerprints import file_state
from neuron_methods.support.runs import LOCK, beside, claimed, remove, remove_leftovers
from neuron_methods.support.targets import written_in

_PARTIAL = "partial"


@dataclass(frozen=True)
class Stage:
    """The outcome of a stage.

    Attributes:
        place: its directory.
        result: what `build` returned, as read back from the record.
        seconds: time it took when it was built.
        built: whether that was in this run.
    """

    place: Path
    result: Any
    seconds: float
    built: bool


class Stages:
    """The stages of one run.

    Args:
        records: directory of one JSON per stage; made with the first.
        writer: what wrote the stages, for messages: "the demo".
    """

    def __init__(self, records: Path, writer: str) -> None:
        self.records = records
        self.writer = writer

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs away from the stages as long as the block lasts, and remove what killed ones left unfinished.

        Raises:
            UserError: another run is at them, the place cannot be written to, or holds something else.
        """
        with claimed(self.records, inside=True):
            remove_leftovers(self.records.parent, self.records.name)
            for name in sorted(os.listdir(self.records)):
                place = self.records / name
                record = place if place.suffix == ".json" else self._record(place)
                if name not in (LOCK, _PARTIAL) and not name.endswith(".partial") and _read_record(record) is None:
                    raise UserError(
                        f"{self.records}: holds {name}, which {self.writer} did not write; choose another directory"
                    )
            remove(self.records / _PARTIAL)
            yield

    def run(self, place: Path, made_from: Any, build: Callable[[Path], Any], *, redo: bool = False) -> Stage:
        """Make sure that `place` holds what `build` makes from `made_from`.

        Args:
            place: the stage's directory.
            made_from: JSON of everything the outcome depends on.
            build: creates and fills the directory it is given, which has the name of `place` and is not there yet;
                returns something JSON can hold.
            redo: build even if it is there.

        Raises:
            UserError: `place` exists and no stage wrote it, or cannot be written.
        """
        kept = self.kept(place, made_from)
        if kept is not None and not redo:
            return kept
        file = self._record(place)
        record = _read_record(file)
        if place.exists() and record is None:
            raise UserError(f"{place}: was not written by {self.writer}; move it away, or choose another directory")
        if place.exists() and self.records not in place.parents:
            self._check_replaceable(place, record or {}, redo)
        started = time.perf_counter()
        partial = self.records / _PARTIAL / place.name
        remove(partial)
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.records}: cannot write here ({error.strerror}); choose another directory") from None
        try:
            result = build(partial)
            seconds = round(time.perf_counter() - started, 2)
            # In this order no interruption leaves a record beside a directory it does not describe.
            outdated = partial.with_name(f"{place.name}.outdated")
            remove(outdated)
            if place.exists():
                place.rename(outdated)
            record = {"made_from": made_from, "result": result, "seconds": seconds, "files": _files_of(partial)}
            write_json(file, record, indent=1)
            partial.rename(place)
            remove(outdated)
        finally:
            remove(partial)
            with suppress(OSError):
                partial.parent.rmdir()
        return Stage(place, json.loads(json.dumps(result)), seconds, built=True)

    def kept(self, place: Path, made_from: Any) -> Stage | None:
        """Look up a finished stage; None where `place` holds none that was made from `made_from`, as it was then."""
        record = _read_record(self._record(place))
        if record is None or not place.is_dir() or record["made_from"] != json.loads(json.dumps(made_from)):
            return None
        if _is_changed(place, record):
            return None
        return Stage(place, record["result"], record["seconds"], built=False)

    def _check_replaceable(self, place: Path, record: dict[str, Any], redo: bool) -> None:
        """Raise UserError where a stage that the user can see holds work of theirs."""
        if _is_changed(place, record) and not redo:
            raise UserError(
                f"{place}: was changed since {self.writer} wrote it, or copied without its times (cp -a keeps them); "
                "move it away, or give --force to make it again"
            )
        added = sorted(_files_of(place).keys() - record.get("files", _files_of(place)).keys() - written_in(place))
        if added:
            raise UserError(f"{place}: {added[0]} in it was not written by {self.writer}; move it away")

    def _record(self, place: Path) -> Path:
        return self.records / f"{_record_name(place, self.records)}.json"

    def remove(self) -> None:
        """Remove the records and, where they lie within, the stages: all at once, or the next run does."""
        gone = beside(self.records, "partial")
        with suppress(OSError):
            self.records.rename(gone)
        remove(gone)


def own_directory(path: Path, mark: str, about: Mapping[str, Any], shown: str, writer: str) -> Path:
    """Make a directory that one of our commands fills over several runs, or find that it is one.

    Args:
        path: as the user gave it.
        mark: name of the JSON file that marks such a directory.
        about: what the mark holds.
        shown: what messages begin with, the option and the path: "--out demo".
        writer: what fills the directory, for messages: "the demo".

    Returns:
        Its absolute path.

    Raises:
        UserError: it is no directory, holds something else, or has a name that mergekit cannot take.
    """
    path = path.resolve()
    if "+" in str(path):
        raise UserError(f"{shown}: mergekit takes a '+' in a model's path for 'base+adapter'; choose another")
    if path.exists() and not path.is_dir():
        raise UserError(f"{shown}: exists and is not a directory; choose another")
    if path.is_dir() and not _is_marked(path, mark, about):
        raise UserError(f"{shown}: holds files that {writer} did not write; choose another")
    write_json(path / mark, about)
    return path


def _is_marked(path: Path, mark: str, about: Mapping[str, Any]) -> bool:
    """Whether a directory holds the mark, or nothing but what a run that was killed before it left."""
    if not any(name != LOCK and not name.endswith(".partial") for name in os.listdir(path)):
        return True
    try:
        return read_object(path / mark).keys() == about.keys()
    except UserError:
        return False


def _files_of(place: Path) -> dict[str, Any]:
    """What the files of a stage are, by path; cards are for people to edit, and nothing is made from them."""
    files = (path for path in sorted(place.rglob("*")) if path.is_file() and path.name != "README.md")
    return {path.relative_to(place).as_posix(): file_state(path) for path in files}


def _is_changed(place: Path, record: dict[str, Any]) -> bool:
    """Whether a file of a stage is no longer what was built; of earlier releases that is not known."""
    return any(file_state(place / name) != state for name, state in record.get("files", {}).items())


def _record_name(place: Path, records: Path) -> str:
    """Name a stage apart from others of the run: by its place, seen from the directory of the records."""
    root = records.parent.resolve()
    full = place.resolve()
    parts = full.relative_to(root).parts if full.is_relative_to(root) else full.parts[1:]
    return "-".join(parts)


def _read_record(file: Path) -> dict[str, Any] | None:
    """Read a record; None where there is none or it is not whole."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.keys() >= {"made_from", "result", "seconds"} else None
