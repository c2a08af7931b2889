"""What an evaluation leaves: a table for the screen, a JSON with the scores, a JSONL with every example's outcome."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from neuron_methods import __version__
from neuron_methods.evaluation.scoring import Evaluation, TaskResult
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_json, write_text
from neuron_methods.support.text import columns

FORMAT = "mergekit-neuron-evaluation"
VERSION = 1


def format_score(value: float, metric: str) -> str:
    """Write a perplexity as it is, any other score in percent."""
    return f"{value:.3f}" if metric == "perplexity" else f"{100 * value:.1f} %"


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
    return {key: value for key, value in record.items() if key != "notes" or value}


def check_place(output: Path, force: bool) -> None:
    """Refuse a file that cannot be written, or that holds something else.

    Raises:
        UserError: it is a directory, is no ``.json``, or exists and is not forced.
    """
    if output.suffix != ".json" or output.is_dir():
        raise UserError(f"-o {output}: expected a file name that ends in .json")
    for place in (output, outcomes_file(output)):
        if place.exists() and not force:
            raise UserError(f"-o {output}: {place.name} exists; name another file, or give --force to replace it")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise UserError(f"-o {output}: its directory is missing or cannot be written to")


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
    write_text(outcomes_file(output), "".join(lines))
    write_json(output, content, indent=2)


def _brief(outcome: dict[str, Any]) -> dict[str, Any]:
    """Leave out of an outcome what holds for almost all."""
    usual = {"weight": 1.0, "truncated": False, "prediction": None, "target": None}
    return {key: value for key, value in outcome.items() if key not in usual or value != usual[key]}
