"""What a merge would change, tensor by tensor, without writing it: each expert's update and the merge's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from torch import Tensor

from neuron_methods.kernels.task_vectors import fill_task_vector
from neuron_methods.plugin.planning import PlannedMergeTask, evaluate_task
from neuron_methods.plugin.run import MergeRun
from neuron_methods.plugin.seam import planned_tasks
from neuron_methods.support.errors import UserError


@dataclass(frozen=True)
class TensorUpdates:
    """Updates of one tensor, all float32 and of one shape.

    Attributes:
        base: θ₀.
        experts: {expert: τ_t}.
        weights: {expert: its `weight` in the configuration; 1 where the method has none}.
        merged: what the merge adds to θ₀.
    """

    base: Tensor
    experts: dict[str, Tensor]
    weights: dict[str, float]
    merged: Tensor


@dataclass
class PlannedUpdates:
    """A planned merge whose tensors are formed one by one, on demand.

    Attributes:
        base: the base model, as the configuration names it.
        method: the merge method's name.
        inputs: files and directories here that are read.
        names: of all tensors that it merges.
    """

    base: ModelReference
    method: str
    inputs: list[str] = field(default_factory=list)
    _tasks: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that would be merged."""
        return tuple(self._tasks)

    def of(self, name: str) -> TensorUpdates:
        """Read and merge one tensor."""
        task = self._tasks[name]
        tensors: Mapping[ModelReference, Tensor] = evaluate_task(task.gather_tensors, {})
        base = tensors[self.base].float()
        experts, weights = {}, {}
        shown = _short_names(model for model in tensors if model != self.base)
        for model, short in shown.items():
            experts[short] = fill_task_vector(torch.empty_like(base), tensors[model], base)
            weights[short] = float(dict(task.input_parameters[model].items()).get("weight", 1.0))
        return TensorUpdates(base, experts, weights, evaluate_task(task, {}).float() - base)


def plan_updates(source: str, name: str = "the configuration") -> PlannedUpdates:
    """Plan the merge of a configuration.

    Args:
        source: text of a mergekit YAML with a base model.
        name: file name for messages.

    Raises:
        UserError: what the merge itself would refuse before it starts, or the configuration names no base model.
    """
    run = MergeRun(source, name, MergeOptions(quiet=True))
    if run.configuration.base_model is None:
        raise UserError(f"{name}: no base_model; an update is the difference to a base")
    # Nothing is written, so nothing is rounded to what would be.
    run.configuration.dtype, run.configuration.out_dtype = None, "float32"
    tasks: dict[str, Any] = {}

    def look(planner: Any) -> None:
        tasks.update((w.name, task) for w, task in planned_tasks(planner) if isinstance(task, PlannedMergeTask))

    run.plan_only(look)
    # Only now: planning writes an adapter that stands by itself as base+adapter.
    return PlannedUpdates(run.configuration.base_model, run.configuration.merge_method, run.paths_read(), tasks)


def _short_names(models: Iterable[ModelReference]) -> dict[ModelReference, str]:
    """Of each model as much of the end of its path as tells it from the others."""
    parts = {model: str(model).replace("\\", "/").rstrip("/").split("/") for model in models}
    names = {}
    for model, path in parts.items():
        length = 1
        while length < len(path) and any(
            other[-length:] == path[-length:] for key, other in parts.items() if key != model
        ):
            length += 1
        names[model] = "/".join(path[-length:])
    return names
