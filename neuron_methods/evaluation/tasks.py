"""The file of tasks: what to ask of a model, on which data, and what counts as right.

```yaml
tasks:
  - name: sums
    kind: generation
    data: {source: sums, split: test, validation_split: validation}
    columns: {input: prompt, target: answer}
    metric: exact_match
    max_new_tokens: 8
    stop: "."
```

A source is a path relative to the file, or a data set of the hub. A split may end in a range of rows, ``train[:200]``,
and a file by itself, which has no splits, may be given a range alone: ``[200:]``. `validation_split`, and
`validation_source` where it is another file, say what `mergekit-neuron tune` may look at.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from neuron_methods.support.errors import UserError

#: Keys that a task of any kind may have.
COMMON_KEYS = ("name", "kind", "data", "columns", "metric", "batch_size", "limit")
_DATA_KEYS = ("source", "split", "validation_source", "validation_split", "name")
_RANGE = re.compile(r"(?P<split>[\w.-]*)(\[(?P<start>\d*):(?P<stop>\d*)\])?")


@dataclass(frozen=True)
class Rows:
    """Rows of one data set.

    Attributes:
        location: local path or hub id.
        local: whether it is a path.
        config: configuration of the hub's data set.
        split: name; None: the only one there is.
        start: first row.
        stop: the row after the last one, None: all.
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
        """Whether both have rows in common."""
        ends = [rows.stop if rows.stop is not None else float("inf") for rows in (self, other)]
        return self._holds(other) and max(self.start, other.start) < min(ends)

    def _holds(self, other: Rows) -> bool:
        """Whether both are of the same data; a file within a folder counts as the split that it is named after."""
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

    def rows(self, split: str) -> Rows:
        """The rows of ``test`` or ``validation``.

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


def load_tasks(path: str | Path) -> list[Task]:
    """Read a file of tasks; no data is opened and no model is looked at.

    Raises:
        UserError: the file cannot be read, or a key, kind, column or metric is not known.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{path}: cannot read tasks: {reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not readable as YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), list) or not content["tasks"]:
        raise UserError(f"{path}: expected the key tasks with a list of tasks")
    _check_keys(content, ("tasks",), str(path))
    tasks: list[Task] = []
    for number, entry in enumerate(content["tasks"], 1):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: task {number}: expected keys such as name, kind and data, found {entry!r}")
        task = parse_task(entry, path.parent, f"{path}: task {entry.get('name', number)!r}")
        if task.name in [other.name for other in tasks]:
            raise UserError(f"{path}: two tasks are called {task.name!r}")
        tasks.append(task)
    return tasks


def parse_task(entry: Mapping[str, Any], folder: Path, place: str) -> Task:
    """Read one task.

    Args:
        entry: its keys.
        folder: what local sources are relative to.
        place: for messages.

    Raises:
        UserError: as `load_tasks`.
    """
    from neuron_methods.evaluation.kinds import KINDS

    kind = entry.get("kind")
    if kind not in KINDS:
        raise UserError(f"{place}: {_unknown('kind', kind, KINDS)}")
    scorer = KINDS[kind]
    _check_keys(entry, (*COMMON_KEYS, *scorer.settings), place)
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{place}: expected a name, found {name!r}")
    metric = entry.get("metric", scorer.metrics[0] if scorer.metrics else None)
    if scorer.metrics and metric not in scorer.metrics:
        raise UserError(f"{place}: {_unknown('metric', metric, scorer.metrics)} for kind {kind}")
    limit, batch_size = entry.get("limit", 0), entry.get("batch_size", scorer.batch_size)
    for key, value, least in (("limit", limit, 0), ("batch_size", batch_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{place}: {key}: expected a whole number from {least} on, found {value!r}")
    source, test, validation = _data(entry.get("data"), folder, place) if scorer.reads_data else (name, None, None)
    if not scorer.reads_data and "data" in entry:
        raise UserError(f"{place}: data: kind {kind} brings its own; remove the key")
    settings = {key: entry[key] for key in scorer.settings if key in entry}
    for key in scorer.path_settings:
        if key in settings:
            settings[key] = str(folder / str(settings[key]))
            if not Path(settings[key]).exists():
                raise UserError(f"{place}: {key}: there is no file or folder {entry[key]!r}")
    task = Task(
        name=name,
        kind=kind,
        source=source,
        test=test,
        validation=validation,
        columns=_columns(entry.get("columns"), scorer.columns, scorer.optional_columns, place),
        metric=metric,
        batch_size=batch_size,
        limit=limit,
        settings=settings,
    )
    scorer.check_task(task, place)
    return task


def _data(data: Any, folder: Path, place: str) -> tuple[str, Rows, Rows | None]:
    if isinstance(data, str):
        data = {"source": data}
    if not isinstance(data, dict) or not isinstance(data.get("source"), str) or not data["source"]:
        raise UserError(f"{place}: data: expected {{source: PATH or hub id, split: NAME}}, found {data!r}")
    _check_keys(data, _DATA_KEYS, f"{place}: data")
    for key in _DATA_KEYS:
        if data.get(key) is not None and not isinstance(data[key], str):
            raise UserError(f"{place}: data: {key}: expected text, found {data[key]!r}")
    test = _rows(data["source"], data.get("split"), data.get("name"), folder, f"{place}: data: split")
    validation = None
    if data.get("validation_split") is not None or data.get("validation_source") is not None:
        where = f"{place}: data: validation_split"
        source = data.get("validation_source", data["source"])
        validation = _rows(source, data.get("validation_split"), data.get("name"), folder, where)
    return data["source"], test, validation


def _rows(source: str, split: str | None, config: str | None, folder: Path, place: str) -> Rows:
    found = _RANGE.fullmatch(split or "")
    if found is None:
        raise UserError(f"{place}: expected a name or a name with rows, such as train[:200], found {split!r}")
    name, start, stop = found["split"] or None, int(found["start"] or 0), found["stop"]
    rows = {"start": start, "stop": int(stop) if stop else None}
    if stop and int(stop) <= start:
        raise UserError(f"{place}: {split!r} holds no rows")
    path = Path(source).expanduser()
    path = path if path.is_absolute() else folder / path
    if not path.exists():
        looks_like_a_path = path.suffix in (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".gz")
        if looks_like_a_path or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
            raise UserError(f"{place.rpartition(':')[0]}: source: there is no file or folder {source!r}")
        return Rows(source, False, config, name or "test", **rows)
    if config is not None:
        raise UserError(f"{place.rpartition(':')[0]}: name: only data sets of the hub have configurations")
    if path.is_file():
        if name not in (None, "train"):
            raise UserError(f"{place}: {source} is a file, which has no split {name!r}; leave it away, or give [a:b]")
        return Rows(str(path), True, **rows)
    return Rows(str(path), True, None, name or "test", **rows)


def _columns(given: Any, needed: Mapping[str, str], optional: Iterable[str], place: str) -> dict[str, str]:
    given = {} if given is None else given
    if not isinstance(given, dict) or not all(isinstance(column, str) for column in given.values()):
        raise UserError(f"{place}: columns: expected a column for each of {', '.join(needed)}, found {given!r}")
    _check_keys(given, (*needed, *optional), f"{place}: columns")
    return {**needed, **given}


def _check_keys(content: Mapping[Any, Any], known: Iterable[str], place: str) -> None:
    known = list(known)
    for key in content:
        if key not in known:
            raise UserError(f"{place}: {_unknown('key', key, known)}")


def _unknown(what: str, word: Any, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"unknown {what} {word!r}" + (
        f"; did you mean {close[0]!r}?" if close else f" (there are: {', '.join(known)})"
    )


def choose_tasks(tasks: Sequence[Task], only: Sequence[str] = (), batch_size: int | None = None) -> list[Task]:
    """The tasks called so, all if `only` is empty, with another batch size if one is given.

    Raises:
        UserError: there is no task of that name.
    """
    for name in only:
        if name not in [task.name for task in tasks]:
            raise UserError(f"--only: {_unknown('task', name, [task.name for task in tasks])}")
    chosen = [task for task in tasks if not only or task.name in only]
    return [replace(task, batch_size=batch_size) for task in chosen] if batch_size else chosen
