"""Scores of models on tasks.

`load_tasks` reads a file of tasks, `evaluate` scores a model on disk or of the hub, `evaluate_model` one in memory,
`write_evaluation` writes what came out, and `open_model` loads whatever MODEL may be.
"""

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
