"""What is to be as large as possible: one number for a point, from its scores on all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from neuron_methods.evaluation.tasks import Task
from neuron_methods.evaluation.tuning.recipe import path_parts

OBJECTIVES = ("mean", "relative", "minimum")


def goodness(score: float, metric: str) -> float:
    """Turn a score into one of which more is better: of a perplexity its inverse, a token's probability."""
    return 1.0 / score if metric == "perplexity" else score


def objective(
    name: str, scores: Mapping[str, float], metrics: Mapping[str, str], experts: Mapping[str, float] | None = None
) -> float:
    """Compute one number for the scores of a point, by task; more is better.

    It is called ``mean``, ``relative`` (the mean of shares of the experts' scores) or ``minimum``.
    """
    values = {task: goodness(score, metrics[task]) for task, score in scores.items()}
    if name == "minimum":
        return min(values.values())
    if name == "relative":
        values = {task: value / goodness(experts[task], metrics[task]) for task, value in values.items()}
    return sum(values.values()) / len(values)


def experts_of_task(task: Task, experts: Sequence[str]) -> list[str]:
    """List the models that may be a task's expert: the one whose path holds the task's name, else all."""
    named = [expert for expert in experts if task.name in path_parts(expert)]
    return named if len(named) == 1 else list(experts)
