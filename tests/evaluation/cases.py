"""Data, tasks and merges for the tests of this room."""

from __future__ import annotations

from pathlib import Path

import yaml

from neuron_methods.evaluation import load_tasks
from neuron_methods.evaluation.tasks import Task
from tests.support import tiny

QUESTIONS = [
    {"prompt": text, "answer": " ".join(text.split()[:2]), "choices": ["cat dog", "red", "two"], "right": len(text) % 3}
    for text in tiny.sentences(30)
]


def write_tasks(folder: Path, *tasks: dict) -> Path:
    """A file of tasks."""
    path = folder / "tasks.yml"
    path.write_text(yaml.safe_dump({"tasks": list(tasks)}, sort_keys=False), encoding="utf-8")
    return path


def tasks_of(folder: Path, *tasks: dict) -> list[Task]:
    """The same, loaded."""
    return load_tasks(write_tasks(folder, *tasks))


def questions(folder: Path, rows: list[dict] | None = None) -> Path:
    """questions.jsonl with prompt, answer, choices and right."""
    return tiny.write_jsonl(folder / "questions.jsonl", QUESTIONS if rows is None else rows)


def choice_task(**changes: object) -> dict:
    """A multiple-choice task with test and validation rows."""
    return {
        "name": "choices",
        "kind": "multiple-choice",
        "data": {"source": "questions.jsonl", "split": "[:12]", "validation_split": "[12:]"},
        "columns": {"input": "prompt", "label": "right"},
        **changes,
    }


def perplexity_task(**changes: object) -> dict:
    """A perplexity task with test and validation rows."""
    return {
        "name": "words",
        "kind": "perplexity",
        "data": {"source": "questions.jsonl", "split": "[:12]", "validation_split": "[12:]"},
        "columns": {"text": "prompt"},
        **changes,
    }


def merge_yaml(
    folder: Path, method: str = "neuro_merging", dtype: str | None = "bfloat16", **parameters: object
) -> str:
    """YAML of a merge of the experts of `tests.support.tiny.save_experts`."""
    content = {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in ("expert-a", "expert-b")],
        "parameters": parameters,
    }
    return yaml.safe_dump(content | ({"dtype": dtype} if dtype else {}), sort_keys=False)
