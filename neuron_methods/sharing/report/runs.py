"""The report of a run of mergekit: while it merges, or afterwards from the files of the models and of the output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.common import ModelPath, ModelReference
from mergekit.io.tasks import LoadTensor
from torch import Tensor

from neuron_methods.plugin.planning import PlannedMergeTask, evaluate_task
from neuron_methods.plugin.run import MergeRun
from neuron_methods.plugin.seam import models_in_order, planned_tasks, tokenizer_task
from neuron_methods.sharing.model_names import ModelNames
from neuron_methods.sharing.report.collect import Collector
from neuron_methods.support.errors import UserError
from neuron_methods.support.progress import progress_bar


def collector_for(run: MergeRun, limit: int | None) -> Collector:
    """Make a collector for the models of a run.

    Raises:
        UserError: there is no base to take differences from, or nothing beside it.
    """
    base = run.configuration.base_model
    if base is None:
        raise UserError(f"{run.name}: the report tells how models differ from their base; name it as base_model")
    experts = [model for model in dict.fromkeys(models_in_order(run.configuration)) if model != base]
    if not experts:
        raise UserError(f"{run.name}: the report compares experts with the base, and there is none")
    return Collector(base, experts, limit)


def document_of(collector: Collector, run: MergeRun, names: ModelNames, state: Any) -> dict[str, Any]:
    """Make the report's JSON of a run, once every tensor was looked at."""
    labels = {model: names.of(model) for model in (collector.base, *collector.experts)}
    return collector.document(run.configuration.merge_method, labels, state)


def report_from_files(
    place: Path, run: MergeRun, names: ModelNames, *, limit: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """Make the report's JSON of a merge that is done, from the models of its run and what it has written.

    The output is a model, or an adapter on the base. `limit` neurons are looked at per weight; None: all.

    Raises:
        UserError: models or output are not there, or do not belong together.
    """
    document: dict[str, Any] = {}

    def look(planner: Any) -> None:
        collector = collector_for(run, limit)
        output = _output_reference(place, run)
        tokenizer = tokenizer_task(planner)  # embeddings have to be aligned before they can be compared
        known = {} if tokenizer is None else {tokenizer: evaluate_task(tokenizer, {})}
        tensors = [(weight, task) for weight, task in planned_tasks(planner) if isinstance(task, PlannedMergeTask)]
        matched = 0
        for weight, task in progress_bar(tensors, what="Looking at the neurons", unit="tensor", shown=progress):
            merged = _load(output, weight) if task.copy_of is None else None
            matched += merged is not None or task.copy_of is not None
            if merged is not None:
                inputs = evaluate_task(task.gather_tensors, known)
                there = {model: tensor for model, tensor in inputs.items() if tensor is not None}
                if (found := collector.look(weight.name, there, merged)) is not None:
                    collector.take(weight.name, found)
        if not matched:
            raise UserError(f"{place}: none of the tensors of {run.name} is in it; do they belong together?")
        document.update(document_of(collector, run, names, _measured(planner, known)))

    run.plan_only(look, quiet=not progress)
    return document


def _output_reference(place: Path, run: MergeRun) -> ModelReference:
    if (place / "adapter_config.json").exists() and not (place / "config.json").exists():
        base = run.configuration.base_model
        assert base is not None
        return ModelReference(model=base.model, lora=ModelPath(path=str(place)))
    return ModelReference(model=ModelPath(path=str(place)))


def _measured(planner: Any, known: dict[Any, Any]) -> Any:
    """What our method measures over the model; None for mergekit's own."""
    measures = [task.measure for _, task in planned_tasks(planner) if getattr(task, "measure", None) is not None]
    if not measures:
        return None
    plan = measures[0].plan
    plan.known_values.update(known)
    plan.prepared.measure(plan.settings)
    return plan.prepared


def _load(output: ModelReference, weight: WeightInfo) -> Tensor | None:
    load = LoadTensor(
        model=output, tensor=weight.name, optional=True, aliases=weight.aliases, tied_names=weight.tied_names
    )
    return load.execute()
