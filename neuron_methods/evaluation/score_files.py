"""What an evaluation leaves: a table for the screen, a JSON with the scores, a JSONL with every example's outcome."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from neuron_methods import __version__
from neuron_methods.evaluation.scores import is_share
from neuron_methods.evaluation.scoring import Evaluation, TaskResult
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import pair_in_place_after
from neuron_methods.support.targets import beginning_with, check_file, json_of
from neuron_methods.support.text import columns

FORMAT = "mergekit-neuron-evaluation"
VERSION = 1
_OUTCOMES = beginning_with(r'\{"task": ')


def format_score(value: float, metric: str) -> str:
    """Write a share in percent, and any other score, such as a perplexity, as it is."""
    return f"{100 * value:.1f} %" if is_share(metric) else f"{value:.3f}"


def table(evaluation: Evaluation) -> list[str]:
    """Lay out lines for the screen: one per task, and the mean."""
    rows = [("task", "score", "95 % interval", "examples", "metric", "split")]
    for task in evaluation.tasks:
        score, low, high = (format_score(value, task.metric) for value in (task.score, task.low, task.high))
        interval = f"{low.removesuffix(' %')} to {high}"
        rows.append((task.name, score, interval, str(task.count), task.metric, task.split))
    if evaluation.mean is not None and len(evaluation.tasks) > 1:
        rows.append(("mean", format_score(evaluation.mean, ""), "", "", "", ""))
    lines = columns(rows, left=(0, 4, 5))
    lines += [f"{task.name}: {note}" for task in evaluation.tasks for note in task.notes]
    return lines


def task_record(result: TaskResult) -> dict[str, Any]:
    """Turn a result into what JSON holds of it: all but its outcomes."""
    record = {key: value for key, value in asdict(result).items() if key != "outcomes"}
    return {key: value for key, value in record.items() if key not in ("notes", "prompts") or value}


def check_place(output: Path, force: bool, inputs: Iterable[str | os.PathLike[str]] = ()) -> Path:
    """Refuse a file that is no ``.json``, or may not be written; see `targets.check_file`.

    Outcomes without scores were left by a run that was killed between the two, and are replaced in any case.

    Returns:
        The absolute path.
    """
    if output.suffix != ".json":
        raise UserError(f"-o {output}: expected a file name that ends in .json")
    place = check_file(output, f"-o {output}", json_of(FORMAT), force, inputs)
    if not place.parent.is_dir():
        raise UserError(f"-o {output}: its directory is missing")
    beside = outcomes_file(place)
    check_file(beside, f"-o {output}: {beside.name}", _OUTCOMES, force or not place.exists(), inputs)
    return place


def outcomes_file(output: Path) -> Path:
    """Name the JSONL beside a JSON."""
    return output.with_suffix(".examples.jsonl")


def write_evaluation(evaluation: Evaluation, output: Path) -> None:
    """Write scores to `output`, and every example's outcome beside it."""
    lines = [
        json.dumps({"task": task.name, **_brief(asdict(outcome))}, ensure_ascii=False) + "\n"
        for task in evaluation.tasks
        for outcome in task.outcomes
    ]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": evaluation.model,
        "tasks": [task_record(task) for task in evaluation.tasks],
        "mean": evaluation.mean,
        "seed": evaluation.seed,
        "processes": evaluation.processes,
        "outcomes": outcomes_file(output).name,
        "made_with": {name: version(name) for name in ("transformers", "torch", "datasets")}
        | {"mergekit-neuron": __version__},
    }
    with pair_in_place_after(output, outcomes_file(output)) as (scores, outcomes):
        outcomes.write_text("".join(lines), encoding="utf-8")
        scores.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _brief(outcome: dict[str, Any]) -> dict[str, Any]:
    """Leave out of an outcome what holds for almost all."""
    usual = {"weight": 1.0, "truncated": False, "prediction": None, "target": None}
    return {key: value for key, value in outcome.items() if key not in usual or value != usual[key]}
