"""Scores of models on tasks.

`load_tasks` reads a file of tasks, `evaluate` scores a model on disk or of the hub, `evaluate_model` one in memory,
`write_evaluation` writes what came out, and `open_model` loads whatever MODEL may be.
"""

from typing import TYPE_CHECKING

from neuron_methods.support.exports import lazily

if TYPE_CHECKING:
    from neuron_methods.evaluation.examples import Examples, Outcome, read_examples
    from neuron_methods.evaluation.models import OpenedModel, open_model
    from neuron_methods.evaluation.score_files import write_evaluation
    from neuron_methods.evaluation.scoring import Evaluation, TaskResult, evaluate, evaluate_model, start_task
    from neuron_methods.evaluation.task_file import load_tasks
    from neuron_methods.evaluation.tasks import Task

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
    "write_evaluation",
]

# Imported on first use: torch and transformers are slow to come.
__getattr__ = lazily(
    __name__,
    {
        "Evaluation": "neuron_methods.evaluation.scoring",
        "Examples": "neuron_methods.evaluation.examples",
        "OpenedModel": "neuron_methods.evaluation.models",
        "Outcome": "neuron_methods.evaluation.examples",
        "Task": "neuron_methods.evaluation.tasks",
        "TaskResult": "neuron_methods.evaluation.scoring",
        "evaluate": "neuron_methods.evaluation.scoring",
        "evaluate_model": "neuron_methods.evaluation.scoring",
        "load_tasks": "neuron_methods.evaluation.task_file",
        "open_model": "neuron_methods.evaluation.models",
        "read_examples": "neuron_methods.evaluation.examples",
        "start_task": "neuron_methods.evaluation.scoring",
        "write_evaluation": "neuron_methods.evaluation.score_files",
    },
)
