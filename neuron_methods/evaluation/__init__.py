"""Scores of models on tasks.

`load_tasks` reads a file of tasks, `evaluate` scores a model on disk or of the hub, `evaluate_model` one in memory,
and `open_model` loads whatever MODEL may be.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuron_methods.evaluation.examples import Examples, Outcome, read_examples
    from neuron_methods.evaluation.models import OpenedModel, open_model
    from neuron_methods.evaluation.scoring import Evaluation, TaskResult, evaluate, evaluate_model, start_task
    from neuron_methods.evaluation.tasks import Task, load_tasks

__all__ = [
    "Evaluation",
    "Examples",
    "OpenedModel",
    "Outcome",
    "Task",
    "TaskResult",
    "evaluate",
    "evaluate_model",
    "load_tasks",
    "open_model",
    "read_examples",
    "start_task",
]

_EXPORTS = {
    "Evaluation": "scoring",
    "Examples": "examples",
    "OpenedModel": "models",
    "Outcome": "examples",
    "Task": "tasks",
    "TaskResult": "scoring",
    "evaluate": "scoring",
    "evaluate_model": "scoring",
    "load_tasks": "tasks",
    "open_model": "models",
    "read_examples": "examples",
    "start_task": "scoring",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch and transformers are slow to come."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
