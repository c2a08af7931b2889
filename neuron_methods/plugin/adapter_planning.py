"""What a plan gains where experts are adapters on the merge's own base.

- A tensor that no adapter touches is copied from the base, bit for bit, by whatever method; nothing else is read.
- A method that takes task vectors gets them from the adapter's factors, not as a difference of weights.
- Touched tensors are formed in float32. What is written keeps the dtype the models are stored in, unless the YAML says
  otherwise; mergekit alone would promote the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, LoaderCache, LoadTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from torch import Tensor

from neuron_methods.adapters.loader import AdapterLoader, BaseCheckpoint
from neuron_methods.kernels.task_vectors import TaskVector
from neuron_methods.models.headers import Header
from neuron_methods.plugin.seam import method_of, stored_name
from neuron_methods.support.errors import UserError


class LoadTaskVector(LoadTensor):
    """Load the task vector of an adapter on the merge's base instead of the expert's weights."""

    low_rank: bool = False

    def execute(self) -> Tensor | None:
        """Form B·A, or zeros that take no memory where the adapter leaves the tensor alone; B and A if `low_rank`."""
        loader = LoaderCache().get(self.model)
        name = stored_name(self, loader)
        assert name is not None
        if self.low_rank and (low := loader.low_rank(name, self.device or "cpu")) is not None:
            return low
        task_vector = loader.task_vector(name, self.device or "cpu")
        if task_vector is None:
            task_vector = torch.zeros((), device=self.device or "cpu").expand(loader.header(name).shape)
        return task_vector.as_subclass(TaskVector)


class GatherTaskVectors(GatherTensors):
    """Gather the weights of some models and the task vectors of others."""

    direct: tuple[ModelReference, ...] = ()
    low_rank: bool = False

    def arguments(self) -> dict[str, Task]:
        """Ask for one load per model, by its name."""
        return {
            key: LoadTaskVector(**dict(load), low_rank=self.low_rank) if load.model in self.direct else load
            for key, load in super().arguments().items()
        }


class AdapterPlan:
    """Finds the part adapters play in a merge.

    Args:
        planner: mergekit's `MergePlanner` once it has made its tasks.
    """

    def __init__(self, planner: Any) -> None:
        self.planner = planner
        self._stored: dict[ModelReference, BaseCheckpoint] = {}
        self.adapters = {
            model: loader
            for model in planner.config.referenced_models()
            if model.lora is not None and isinstance(loader := LoaderCache().get(model), AdapterLoader)
        }

    def prepare(
        self, weight: WeightInfo, task: ExecuteMergeMethodTask, *, direct: bool
    ) -> tuple[ExecuteMergeMethodTask, LoadTensor | None, int | None]:
        """Tell what becomes of one tensor's task.

        Args:
            weight: the output tensor.
            task: mergekit's.
            direct: whether the method takes task vectors.

        Returns:
            (the task, the load of the base's tensor where it is to be copied, number of entries to merge if known).
        """
        gather = task.gather_tensors
        if not self.adapters or not isinstance(gather, GatherTensors):
            return task, None, None
        loads = {load.model: load for load in gather.arguments().values()}
        names = {model: stored_name(load, LoaderCache().get(model)) for model, load in loads.items()}
        base = task.base_model or next((m for m in loads if m.lora is None), None) or self._common_base(loads)
        if base is None or None in names.values():
            return task, None, None
        base_load = loads.get(base) or next(iter(loads.values())).model_copy(update={"model": base})
        base_name = stored_name(base_load, LoaderCache().get(base))
        if base_name is None:
            return task, None, None
        on_base = [
            model
            for model, name in names.items()
            if model in self.adapters and self._is_on(base, model) and self.adapters[model].origin(name) == base_name
        ]
        header = self._header(base, base_name)
        entries = header.entries if header.dtype.is_floating_point else 0
        others = [model for model in loads if model != base]
        untouched = set(others) <= set(on_base) and not any(self.adapters[m].touches(names[m]) for m in others)
        if untouched and _keeps_equal_inputs(method_of(self.planner).spec.name, task):
            return task, base_load, entries
        update: dict[str, Any] = {"out_dtype": task.out_dtype or self._stored_dtype(loads, names)}
        if direct and on_base and base in loads:
            low_rank = getattr(method_of(self.planner), "takes_low_rank", False)
            update["gather_tensors"] = GatherTaskVectors(**dict(gather), direct=tuple(on_base), low_rank=low_rank)
        return task.model_copy(update=update), None, entries

    def unties(self, weights: Sequence[WeightInfo]) -> bool:
        """Tell whether the output will hold a tensor that the base ties to another and does not store.

        Raises:
            UserError: it would have to, but mergekit's definition of the architecture has no such tensor.
        """
        written = {name for weight in weights for name in (weight.name, *(weight.aliases or ()))}
        for loader in self.adapters.values():
            if lost := sorted(loader.untied.keys() - written):
                raise UserError(
                    f"{loader.where}: it changes {lost[0]} and what the base ties to it differently, and a merge of "
                    f"this architecture writes the two as one ({loader.untied[lost[0]]}); train the adapter without "
                    "the embeddings"
                )
        return any(loader.untied for loader in self.adapters.values())

    def _is_on(self, base: ModelReference, model: ModelReference) -> bool:
        return base.lora is None and model.model == base.model

    def _common_base(self, models: Sequence[ModelReference]) -> ModelReference | None:
        """The one base of all models, in a merge that names none."""
        bases = {model.model_copy(update={"lora": None}) for model in models}
        return bases.pop() if len(bases) == 1 else None

    def _header(self, model: ModelReference, name: str) -> Header:
        """The header of a tensor; an adapter's dtype is its base's."""
        if model in self.adapters:
            return self.adapters[model].base.header(self.adapters[model].origin(name))
        if model not in self._stored:
            self._stored[model] = BaseCheckpoint(LoaderCache().get(model), str(model), model.config)
        return self._stored[model].header(name)

    def _stored_dtype(self, loads: dict[ModelReference, LoadTensor], names: dict[ModelReference, str]) -> str | None:
        """The dtype that the output would have if every adapter were merged into its base as that is stored."""
        if self.planner.config.out_dtype or self.planner.config.dtype:
            return None
        promoted: torch.dtype | None = None
        for model in loads:
            dtype = self._header(model, names[model]).dtype
            promoted = dtype if promoted is None else torch.promote_types(promoted, dtype)
        return str(promoted).removeprefix("torch.")


def untied_notes(configuration: MergeConfiguration) -> list[str]:
    """Say what is written apart that the base ties, because an adapter changes only one of the two; models are open."""
    loaders = {model: LoaderCache().get(model) for model in configuration.referenced_models() if model.lora}
    return [
        f"untied: {new} is written beside {old}, which the base uses for both, as {loader.where} changes them "
        "differently; this is what it computes in peft, unlike what merge_and_unload makes of it"
        for loader in loaders.values()
        for new, old in loader.untied.items()
    ]


def _keeps_equal_inputs(method: str, task: ExecuteMergeMethodTask) -> bool:
    """Whether merging equal tensors gives that tensor, as it does but where a method scales what it is given."""
    parameters = dict(task.parameters.items())
    if method == "passthrough":
        return False
    if method == "linear" and not parameters.get("normalize", True):
        return math.isclose(sum(float(values["weight"]) for values in task.input_parameters.values()), 1.0)
    return True
