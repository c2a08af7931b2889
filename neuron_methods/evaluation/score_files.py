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

FORMAT = "mergekit-neuron-evaluation"
VERSION = 1


def format_score(value: float, metric: str) -> str:
    """A perplexity as it is, any other score in percent."""
    return f"{value:.3f}" if metric == "perplexity" else f"{100 * value:.1f} %"


def table(evaluation: Evaluation) -> list[str]:
    """Lines for the screen: one per task, and the mean."""
    rows = [("task", "score", "95 % interval", "examples", "metric", "split")]
    for task in evaluation.tasks:
        score, low, high = (format_score(value, task.metric) for value in (task.score, task.low, task.high))
        interval = f"{low.removesuffix(' %')} to {high}"
        rows.append((task.name, score, interval, str(task.count), task.metric, task.split))
    if evaluation.mean is not None and len(evaluation.tasks) > 1:
        rows.append(("mean", format_score(evaluation.mean, ""), "", "", "", ""))
    lines = align(rows, right=(1, 2, 3))
    lines += [f"{task.name}: {note}" for task in evaluation.tasks for note in task.notes]
    return lines


def align(rows: list[tuple[str, ...]], right: tuple[int, ...]) -> list[str]:
    """Rows as lines of columns; those in `right` are flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def task_record(result: TaskResult) -> dict[str, Any]:
    """A result as JSON holds it, without its outcomes."""
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
    """The JSONL beside a JSON."""
    return output.with_suffix(".examples.jsonl")


def write_evaluation(evaluation: Evaluation, output: Path) -> None:
    """Write scores to `output`, and every example's outcome beside it."""
    lines = [
        json.dumps({"task": task.name, **_brief(asdict(outcome))}, ensure_ascii=False)
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
    outcomes_file(output).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    output.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _brief(outcome: dict[str, Any]) -> dict[str, Any]:
    """An outcome without what holds for almost all."""
    usual = {"weight": 1.0, "truncated": False, "prediction": None, "target": None}
    return {key: value for key, value in outcome.items() if key not in usual or value != usual[key]}
