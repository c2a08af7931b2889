"""Between mergekit's planner and our methods: the plan of a merge, as a method of ours sees it.

mergekit's planner has made one `ExecuteMergeMethodTask` per output tensor. Here each becomes a `PlannedMergeTask` that
also waits for one `MeasureTask`, which streams over all tensors first. Both are ordinary tasks of mergekit's graph, so
its executors schedule them.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, LoaderCache, LoadTensor, SaveTensor
from mergekit.merge_methods import registry
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from torch import Tensor

from neuron_methods.adapters.loader import AdapterLoader
from neuron_methods.methods.contract import (
    PREPARED,
    MergeSettings,
    ModelFacts,
    PlannedMethod,
    PlannedTensor,
    PreparedMerge,
)
from neuron_methods.models.headers import HeaderFiles
from neuron_methods.plugin.adapter_planning import AdapterPlan
from neuron_methods.plugin.composite import configured
from neuron_methods.plugin.inputs import state_of
from neuron_methods.plugin.layer_lists import move_layer_lists
from neuron_methods.plugin.seam import method_of, planned_tasks, replan, tokenizer_task, use_method
from neuron_methods.plugin.session import MergeSession, session_of
from neuron_methods.plugin.stored_architecture import statistics_of
from neuron_methods.plugin.structure import left_over
from neuron_methods.plugin.tensor_places import TensorPlaces
from neuron_methods.support.progress import progress_bar


@dataclass(eq=False)
class MethodPlan:
    """The plan of one merge by a method of ours.

    Attributes:
        prepared: the merge.
        settings: how it is run.
        known_values: what tasks that are not to be run again have returned; planned tensors are read with them.
    """

    prepared: PreparedMerge
    settings: MergeSettings
    known_values: dict[Task, Any]


class MeasureTask(Task[PreparedMerge], arbitrary_types_allowed=True):
    """Stream over all tensors of a merge before the first is merged."""

    plan: MethodPlan
    tokenizer_task: Task | None = None

    def arguments(self) -> dict[str, Task]:
        """Ask for the tokenizer, where embeddings have to be aligned before they can be measured."""
        return {"tokenizer_info": self.tokenizer_task} if self.tokenizer_task is not None else {}

    def execute(self, **kwargs: Any) -> PreparedMerge:
        """Measure; the merge carries what was found to every tensor."""
        if self.tokenizer_task is not None:
            self.plan.known_values[self.tokenizer_task] = kwargs["tokenizer_info"]
        self.plan.prepared.measure(self.plan.settings)
        return self.plan.prepared

    def priority(self) -> int:
        """Come before anything else that is ready."""
        return 100000

    def main_thread_only(self) -> bool:
        """Run on the main thread, as a leading task of the multi-GPU executor."""
        return True


# mergekit 0.1.5's in-memory planner wraps a task in one that demands a `Task[Tensor]`; its own is a
# `Task[Optional[Tensor]]`, and planning in memory ends in a TypeError whatever the method.
class PlannedMergeTask(ExecuteMergeMethodTask, Task[Tensor], arbitrary_types_allowed=True):
    """Merge one tensor as part of the whole merge."""

    measure: MeasureTask | None = None
    session: MergeSession | None = None
    copy_of: LoadTensor | None = None
    entries: int | None = None
    averaged: tuple[ModelReference, ...] | None = None

    def arguments(self) -> dict[str, Task]:
        """Ask for the tensors, and for the merge where the method is ours; only for a base that is to be copied."""
        arguments = super().arguments() if self.copy_of is None else {"base": self.copy_of}
        if self.measure is not None:
            arguments["prepared"] = self.measure
        return arguments

    def group_label(self) -> str | None:
        """Stay with the base's tensor, where only that is read."""
        return super().group_label() if self.copy_of is None else self.copy_of.group_label()

    def execute(
        self,
        tensors: dict[Hashable, Tensor] | None = None,
        prepared: PreparedMerge | None = None,
        base: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """Merge, or copy, and let the session look at what came out."""
        if self.copy_of is not None:
            if self.session is None:
                return base
            with self.session.merging(self.output_weight.name, {self.copy_of.model: base}) as inspect:
                return inspect(base)
        assert tensors is not None
        if self.averaged is not None:
            return _mean_of_statistics({m: tensors[m] for m in self.averaged if m in tensors}, self.input_parameters)
        task = self
        if prepared is not None:
            parameters = ImmutableMap({**dict(self.parameters.items()), PREPARED: prepared})
            task = self.model_copy(update={"parameters": parameters})
        if self.session is None:
            return ExecuteMergeMethodTask.execute(task, tensors=tensors)
        with self.session.merging(self.output_weight.name, tensors) as inspect:
            return inspect(ExecuteMergeMethodTask.execute(task, tensors=tensors))


def _mean_of_statistics(tensors: Mapping[Hashable, Tensor], parameters: Mapping[Hashable, Mapping[str, Any]]) -> Tensor:
    """The mean of what was measured, by the weights of the method where it has such; of counts the first."""
    first = next(iter(tensors.values()))
    if not first.is_floating_point():
        return first
    weights = {model: parameters[model]["weight"] for model in tensors if "weight" in parameters.get(model, {})}
    # A variance that is a difference of others may be negative.
    if not weights or min(weights.values()) < 0 or sum(weights.values()) == 0:
        weights = dict.fromkeys(tensors, 1.0)
    total = sum(tensors[model].double() * weight for model, weight in weights.items())
    return (total / sum(weights.values())).to(first.dtype)


def configure_planner(planner: Any) -> frozenset[ModelReference]:
    """Precede `MergePlanner._plan`: a method that divides its tensors among others also takes their parameters.

    Returns:
        The models that the YAML lists; the planner adds the base to them.

    Raises:
        UserError: the YAML names a method that there is not.
    """
    config = planner.config
    use_method(planner, configured(method_of(planner), config))
    parts = [config, *(config.modules or {}).values()]
    listed = {source.model for part in parts for output in part.slices or () for source in output.sources}
    return frozenset(listed.union(source.model for part in parts for source in part.models or ()))


def attach_to_planner(planner: Any, listed: Collection[ModelReference]) -> None:
    """Follow `MergePlanner._plan`: give a method of ours the plan, and the session of our command a look at it.

    Args:
        planner: mergekit's.
        listed: from `configure_planner`.

    Raises:
        UserError: what the method or the session refuses, before any tensor is read.
    """
    session = session_of(planner.options)
    method = method_of(planner)
    adapters = AdapterPlan(planner)
    tasks = [(w, _with_adapters(adapters, method, w, task)) for w, task in planned_tasks(planner)]
    if adapters.unties([weight for weight, _ in tasks]):
        planner.out_model_config.tie_word_embeddings = False
    move_layer_lists(planner)
    # A batch norm's running mean is no weight: no method has anything to say of it.
    measured = statistics_of(planner.arch_info)
    statistics = [
        (w, PlannedMergeTask(**{**dict(t), "averaged": tuple(m for m in t.model_order if m in listed)}))
        for w, t in tasks
        if w.name in measured
    ]
    tasks = [(w, t) for w, t in tasks if w.name not in measured]
    if isinstance(method, PlannedMethod):
        # `dtype` would round inputs before their difference is taken. Our methods compute in float32 from the stored
        # dtype whatever is written, so `dtype` can only mean the dtype of the output.
        config = planner.config
        planner.config = config.model_copy(update={"dtype": None, "out_dtype": config.out_dtype or config.dtype})
        tasks = attach(
            method,
            [(weight, _without_input_dtype(task)) for weight, task in tasks],
            out_dtype=planner.config.out_dtype,
            device=planner.options.device or "cpu",
            quiet=planner.options.quiet,
            session=session,
            tokenizer_task=tokenizer_task(planner),
            model=ModelFacts(planner.out_model_config, cache(partial(state_of, planner.config.base_model))),
        )
    tasks = [*tasks, *statistics]
    if session is not None:
        tasks = [(weight, PlannedMergeTask(**{**dict(task), "session": session})) for weight, task in tasks]
    else:  # mergekit's own commands; ours carry over, and say so, what they have checked
        base = planner.config.base_model or planner.config.referenced_models()[0]
        tasks += carried(base, left_over(planner.config, planner.arch_info, planner.options)[base])
    replan(planner, tasks)
    if session is not None:
        session.planned(planner)


def carried(model: ModelReference, names: Iterable[str]) -> list[tuple[WeightInfo, LoadTensor]]:
    """Plan to copy what a model stores as it is stored, whatever dtype the merge is written in.

    Args:
        model: its loader is open.
        names: under which it stores them.
    """
    headers, loader = HeaderFiles(), LoaderCache().get(model)
    dtypes = {name: str(headers.behind(loader, name).dtype).removeprefix("torch.") for name in sorted(names)}
    return [
        (WeightInfo(name=name, force_dtype=dtype), LoadTensor(model=model, tensor=name))
        for name, dtype in dtypes.items()
    ]


def attach_to_flat_merge(config: Any, tasks: Sequence[Task], *, device: str = "cpu", quiet: bool = False) -> list[Task]:
    """Follow `plan_flat_merge` of mergekit-pytorch, likewise.

    Args:
        config: its `RawPyTorchMergeConfig`.
        tasks: one `SaveTensor` per tensor, then a `FinalizeModel`.
        device: where to measure.
        quiet: no progress bars.
    """
    method = registry.get(config.merge_method)
    if not isinstance(method, PlannedMethod):
        return list(tasks)
    # mergekit-pytorch takes the names from a set; sums over all tensors are to come out the same in every run.
    saves = sorted((task for task in tasks if isinstance(task, SaveTensor)), key=lambda save: save.tensor_name)
    out_dtype = config.out_dtype or config.dtype
    attached = attach(
        method,
        [(save.tensor_task.output_weight, _without_input_dtype(save.tensor_task)) for save in saves],
        out_dtype=out_dtype,
        device=device,
        quiet=quiet,
    )
    new_saves = [s.model_copy(update={"tensor_task": task}) for s, (_, task) in zip(saves, attached, strict=True)]
    (finalize,) = [task for task in tasks if not isinstance(task, SaveTensor)]
    return [*new_saves, finalize.model_copy(update={"tensor_save_tasks": tuple(new_saves)})]


def attach(
    method: PlannedMethod,
    tasks: Sequence[tuple[WeightInfo, ExecuteMergeMethodTask]],
    *,
    out_dtype: str | None,
    device: str,
    quiet: bool,
    session: MergeSession | None = None,
    tokenizer_task: Task | None = None,
    model: ModelFacts | None = None,
) -> list[tuple[WeightInfo, ExecuteMergeMethodTask]]:
    """Turn mergekit's merge tasks into planned ones.

    Args:
        method: ours.
        tasks: (weight, task) per output tensor.
        out_dtype: dtype to write, as mergekit spells it.
        device: where to measure.
        quiet: no progress bars.
        session: of our command, if it is one.
        tokenizer_task: builds the tokenizer, where the YAML asks for one.
        model: the model that the merge writes, where it is known to be one.

    Returns:
        The same list with `PlannedMergeTask`s.
    """
    known_values: dict[Task, Any] = {}

    @cache
    def repeating() -> frozenset[str]:
        counted: set[str] = set()
        for weight, task in tasks:
            if not repeats_tied(weight, task, counted):
                counted.add(weight.name)
        return frozenset(weight.name for weight, _ in tasks) - counted

    places = TensorPlaces(model.config, [weight.name for weight, _ in tasks]) if model is not None else None
    prepared = method.prepare(
        [
            replace(
                _planned_tensor(known_values, device, weight, task),
                repeats=lambda name=weight.name: name in repeating(),
                model=model,
                place=lambda name=weight.name: places.of(name) if places is not None else None,
            )
            for weight, task in tasks
        ]
    )
    settings = MergeSettings()
    if session is not None:
        session.adopt(prepared)
        quiet, settings = session.quiet, MergeSettings(session.allow_nonfinite, share=session.share)
    if not quiet:
        settings = replace(
            settings, progress=lambda what, tensors: iter(progress_bar(tensors, what=what, unit="tensor"))
        )
    plan = MethodPlan(prepared, settings, known_values)
    measure = MeasureTask(plan=plan, tokenizer_task=tokenizer_task)
    return [
        (weight, PlannedMergeTask(**{**dict(task), "measure": measure, "out_dtype": out_dtype or task.out_dtype}))
        for weight, task in tasks
    ]


def _with_adapters(
    adapters: AdapterPlan, method: Any, weight: WeightInfo, task: ExecuteMergeMethodTask
) -> ExecuteMergeMethodTask:
    direct = isinstance(method, PlannedMethod)
    prepared, copy_of, entries = adapters.prepare(weight, task, direct=direct)
    if entries is None:
        return prepared
    return PlannedMergeTask(**{**dict(prepared), "copy_of": copy_of, "entries": entries})


def _planned_tensor(
    known_values: Mapping[Task, Any], device: str, weight: WeightInfo, task: ExecuteMergeMethodTask
) -> PlannedTensor:
    expert_parameters: dict[str, dict[Hashable, Any]] = {}
    for model in task.model_order:
        for name, value in task.input_parameters[model].items():
            expert_parameters.setdefault(name, {})[model] = value

    def load() -> tuple[Tensor | None, dict[Hashable, Tensor]]:
        # mergekit-pytorch hands out None for what a model lacks.
        found = evaluate_task(task.gather_tensors, known_values)
        tensors = {model: tensor for model, tensor in found.items() if tensor is not None}
        if device != "cpu":
            tensors = {model: tensor.to(device) for model, tensor in tensors.items()}
        return tensors.pop(task.base_model, None), tensors

    return PlannedTensor(
        name=weight.name,
        load=load,
        parameters=dict(task.parameters.items()),
        expert_parameters=expert_parameters,
        entries=getattr(task, "entries", None),
        untouched=getattr(task, "copy_of", None) is not None,
    )


def repeats_tied(weight: WeightInfo, task: ExecuteMergeMethodTask, counted: set[str]) -> bool:
    """Tell whether every input stores this weight as a copy of one that is already counted, or not at all.

    Older checkpoints store tied weights under each of their names; they are one set of entries all the same.
    """
    gather = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
    tied_names = counted.intersection(weight.tied_names or ())
    if not weight.optional or not tied_names or not isinstance(gather, GatherTensors):
        return False
    for load in gather.arguments().values():
        loader = LoaderCache().get(load.model)
        stored = loader.index.tensor_paths
        own = next((n for n in (load.tensor, *(load.aliases or ())) if n in stored), None)
        tied = next((n for n in tied_names if n in stored), None)
        if isinstance(loader, AdapterLoader) and own in loader.untied.keys() - loader.updates.keys():
            continue  # the base's, which its adapter has left alone
        if own is not None and (tied is None or not torch.equal(loader.get_tensor(own), loader.get_tensor(tied))):
            return False
    return True


def evaluate_task(task: Task, known: Mapping[Task, Any]) -> Any:
    """Run a task and what it depends on, outside of an executor; what is `known` is not run again."""
    if task in known:
        return known[task]
    return task.execute(**{name: evaluate_task(needed, known) for name, needed in task.arguments().items()})


def _without_input_dtype(task: ExecuteMergeMethodTask) -> ExecuteMergeMethodTask:
    update: dict[str, Any] = {"gather_tensors": _without_dtype(task.gather_tensors), "dtype": None}
    if getattr(task, "copy_of", None) is not None:
        update["copy_of"] = task.copy_of.model_copy(update={"dtype": task.output_weight.force_dtype})
    return task.model_copy(update=update)


def _without_dtype(task: Task) -> Task:
    update: dict[str, Any] = {}
    if "dtype" in type(task).model_fields:
        update["dtype"] = None
    if "gather_tensors" in type(task).model_fields:
        update["gather_tensors"] = _without_dtype(task.gather_tensors)
    if "tensors" in type(task).model_fields:  # mergekit-pytorch: {model: task that loads}
        update["tensors"] = type(task.tensors)({model: _without_dtype(load) for model, load in task.tensors.items()})
    return task.model_copy(update=update)
