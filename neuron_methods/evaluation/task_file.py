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

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuron_methods.data.files import format_of
from neuron_methods.evaluation.kinds import KINDS
from neuron_methods.evaluation.kinds.code import PASS_AT_1
from neuron_methods.evaluation.kinds.scorer import Scorer
from neuron_methods.evaluation.kinds.setting_checks import whole_number
from neuron_methods.evaluation.tasks import Rows, Task
from neuron_methods.models.reference import looks_local
from neuron_methods.support.errors import UserError, explained_by
from neuron_methods.support.text import shortened, unknown
from neuron_methods.support.yaml_source import YamlPart, YamlSource

#: Keys that a task of any kind may have.
COMMON_KEYS = ("name", "kind", "data", "columns", "metric", "batch_size", "limit")
_LONGEST_NAME = 200
_DATA_KEYS = ("source", "split", "validation_source", "validation_split", "name")
_RANGE = re.compile(r"(?P<split>[\w.-]*)(\[(?P<start>[0-9]{0,15}):(?P<stop>[0-9]{0,15})\])?")


@explained_by("tasks")
def load_tasks(path: str | Path) -> list[Task]:
    """Read a file of tasks; no data is opened and no model is looked at.

    Raises:
        UserError: the file cannot be read, or a key, kind, column or metric is not known.
    """
    expected = "the key tasks with a list of tasks"
    source = YamlSource.read(path, expected)
    entries = source.content.get("tasks")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: expected {expected}")
    YamlPart(source).check_keys(source.content, ("tasks",))
    tasks: dict[str, Task] = {}
    for number, entry in enumerate(entries):
        name = entry.get("name", number + 1) if isinstance(entry, dict) else number + 1
        place = YamlPart(source, ("tasks", number), f"task {shortened(name)}: ")
        if not isinstance(entry, dict):
            raise place.error(f"expected keys such as name, kind and data, found {shortened(entry)}")
        task = _parse(entry, Path(path).parent, place)
        if task.name in tasks:
            raise place.error("another task has the same name", "name")
        tasks[task.name] = task
    return list(tasks.values())


def choose_tasks(
    tasks: Sequence[Task],
    only: Sequence[str] = (),
    batch_size: int | None = None,
    allow_code_execution: bool = False,
) -> list[Task]:
    """Choose the tasks called so, all if `only` is empty, with another batch size if one is given.

    Raises:
        UserError: there is no task of that name, or one runs what a model writes and that is not allowed.
    """
    names = [task.name for task in tasks]
    for name in only:
        if name not in names:
            raise UserError(f"--only: {unknown('task', name, names)}")
    chosen = [task for task in tasks if not only or task.name in only]
    for task in chosen:
        if task.metric == PASS_AT_1 and not allow_code_execution:
            raise UserError(
                f"task {task.name!r}: metric {PASS_AT_1} runs programs that the model writes; --allow-code-execution "
                "lets it, in a process with limits"
            )
    return [replace(task, batch_size=batch_size) for task in chosen] if batch_size is not None else chosen


def _parse(entry: Mapping[str, Any], folder: Path, place: YamlPart) -> Task:
    """Read one task; local sources are relative to `folder`."""
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise place.error(unknown("kind", kind, KINDS), "kind")
    scorer = KINDS[kind]
    place.check_keys(entry, (*COMMON_KEYS, *scorer.settings))
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise place.error(f"expected a name of up to {_LONGEST_NAME} characters, found {shortened(name)}", "name")
    metric = entry.get("metric", scorer.metrics[0] if scorer.metrics else None)
    if scorer.metrics and metric not in scorer.metrics:
        raise place.error(f"{unknown('metric', metric, scorer.metrics)} for kind {kind}", "metric")
    if metric is not None and not isinstance(metric, str):
        raise place.error(f"metric: expected a name, found {shortened(metric)}", "metric")
    checks = {"limit": whole_number(0), "batch_size": whole_number(1), **scorer.settings}
    for key, check in checks.items():
        if (key in entry or key in scorer.required) and (expected := check(entry.get(key))) is not None:
            raise place.error(f"{key}: expected {expected}, found {shortened(entry.get(key))}", key)
    if scorer.reads_data:
        source, test, validation = _data(entry.get("data"), folder, place.at("data", shown="data: "))
    elif "data" in entry:
        raise place.error(f"data: kind {kind} brings its own; remove the key", "data")
    else:
        source, test, validation = name, None, None
    return Task(
        name=name,
        kind=kind,
        source=source,
        test=test,
        validation=validation,
        columns=_columns(entry.get("columns"), scorer, place.at("columns", shown="columns: ")),
        metric=metric,
        batch_size=entry.get("batch_size", scorer.batch_size),
        limit=entry.get("limit", 0),
        settings=_settings(entry, scorer, folder, place),
    )


def _settings(entry: Mapping[str, Any], scorer: type[Scorer], folder: Path, place: YamlPart) -> dict[str, Any]:
    settings = {key: entry[key] for key in scorer.settings if key in entry}
    for key in scorer.path_settings:
        if key in settings:
            settings[key] = str(folder / str(settings[key]))
            if not os.path.exists(settings[key]):
                raise place.error(f"{key}: there is no file or folder {entry[key]!r}", key)
    if (found := scorer.check_settings(settings)) is not None:
        key, problem = found
        raise place.error(f"{key}: {problem}", key)
    return settings


def _data(data: Any, folder: Path, place: YamlPart) -> tuple[str, Rows, Rows | None]:
    if isinstance(data, str):
        data = {"source": data}
    if not isinstance(data, dict) or not isinstance(data.get("source"), str) or not data["source"]:
        raise place.error(f"expected {{source: PATH or hub id, split: NAME}}, found {shortened(data)}")
    place.check_keys(data, _DATA_KEYS)
    for key in _DATA_KEYS:
        if data.get(key) is not None and not isinstance(data[key], str):
            raise place.error(f"{key}: expected text, found {shortened(data[key])}", key)
    test = _rows(data, "source", "split", folder, place)
    if data.get("validation_split") is None and data.get("validation_source") is None:
        return data["source"], test, None
    key = "validation_source" if data.get("validation_source") is not None else "source"
    return data["source"], test, _rows(data, key, "validation_split", folder, place)


def _rows(data: Mapping[str, str], source_key: str, split_key: str, folder: Path, place: YamlPart) -> Rows:
    """Read the rows that two keys of `data` name, a source and a split."""
    source, split, config = data[source_key], data.get(split_key), data.get("name")
    found = _RANGE.fullmatch(split or "")
    if found is None:
        problem = f"expected a name or a name with rows, such as train[:200], found {shortened(split)}"
        raise place.error(f"{split_key}: {problem}", split_key)
    name, start, stop = found["split"] or None, int(found["start"] or 0), found["stop"]
    rows = {"start": start, "stop": int(stop) if stop else None}
    if stop and int(stop) <= start:
        raise place.error(f"{split_key}: {shortened(split)} holds no rows", split_key)
    path = folder / source
    if not os.path.exists(path):
        path = folder / os.path.expanduser(source)
    if not os.path.exists(path):
        if format_of(source) or looks_local(source) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
            raise place.error(f"{source_key}: there is no file or folder {shortened(source)}", source_key)
        return Rows(source, False, config, name or "test", **rows)
    if config is not None:
        raise place.error("name: only data sets of the hub have configurations", "name")
    if path.is_file():
        if name not in (None, "train"):
            problem = f"{source} is a file, which has no split {name!r}; leave it away, or give [a:b]"
            raise place.error(f"{split_key}: {problem}", split_key)
        return Rows(str(path), True, **rows)
    return Rows(str(path), True, None, name or "test", **rows)


def _columns(given: Any, scorer: type[Scorer], place: YamlPart) -> dict[str, str]:
    given = {} if given is None else given
    if not isinstance(given, dict) or not all(isinstance(column, str) for column in given.values()):
        raise place.error(f"expected a column for each of {', '.join(scorer.columns)}, found {shortened(given)}")
    place.check_keys(given, (*scorer.columns, *scorer.optional_columns))
    return {**scorer.columns, **given}
