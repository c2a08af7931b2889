"""A merge that comes out as a LoRA adapter on its base: `mergekit-neuron merge --as-adapter`.

mergekit plans and runs the merge as ever. Behind every tensor's merge stands one more task, which hands what the merge
adds to the base to `adapters.export` and passes nothing on to mergekit's writer; no merged model is written.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions
from torch import Tensor

from neuron_methods.adapters.export import AdapterBuilder, AdapterSummary, Precision
from neuron_methods.adapters.loader import BaseCheckpoint
from neuron_methods.adapters.placement import Place, holds_modules, place, settle
from neuron_methods.plugin.merging import Companion, MergeRun
from neuron_methods.plugin.planning import repeats_tied
from neuron_methods.plugin.session import MergeSession
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import check_target, give_ordinary_permissions, move_into_place, staging_directory
from neuron_methods.support.text import format_bytes


@dataclass
class AdapterMergeSummary:
    """What a merge into an adapter did.

    Attributes:
        out_path: where the adapter is.
        method: the method's name.
        seconds: time from start to the written adapter.
        base: the model the adapter is for.
        adapter: what it keeps of the merged update.
        notes: what the user should know.
    """

    out_path: str
    method: str
    seconds: float
    base: str
    adapter: AdapterSummary
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.method}: a LoRA adapter for {self.base}, {format_bytes(self.adapter.bytes)} written, "
            f"{self.seconds:.1f} s",
            *(f"  {line}" for line in str(self.adapter).splitlines()),
            *(f"  {note}" for note in self.notes),
            f"  complete: {self.out_path}",
        ]
        return "\n".join(lines)


class KeepUpdate(Task[None], arbitrary_types_allowed=True):
    """Hand what a merge adds to a tensor of the base to the adapter that is being built."""

    name: str
    merge: Task
    base: LoadTensor
    builder: Any

    def arguments(self) -> dict[str, Task]:
        """The merged tensor and the base's."""
        return {"merged": self.merge, "base": self.base}

    def group_label(self) -> str | None:
        """As the base's tensor."""
        return self.base.group_label()

    def main_thread_only(self) -> bool:
        """The builder is not made for several threads."""
        return True

    def execute(self, merged: Tensor, base: Tensor) -> None:
        """Hand it over; mergekit's writer gets nothing.

        Raises:
            UserError: the merge has changed the tensor's shape.
        """
        if merged.shape != base.shape:
            raise UserError(
                f"{self.name}: the merge makes {list(merged.shape)} of the base's {list(base.shape)}, which no adapter "
                "can; leave tokenizer out of the YAML, or write the merge as a model"
            )
        self.builder.add(self.name, base, merged.to("cpu").float().sub_(base.to("cpu").float()))


def merge_to_adapter(
    config_source: str,
    out_path: str | os.PathLike[str],
    *,
    precision: Precision | None = None,
    options: MergeOptions | None = None,
    force: bool = False,
    progress: bool = True,
    allow_nonfinite: bool = False,
    config_name: str = "the configuration",
    companion: Companion | None = None,
) -> AdapterMergeSummary:
    """Run any mergekit configuration and leave the merged update as a LoRA adapter on the base, or nothing.

    Args:
        config_source: text of the YAML; it names a base_model, or all its models are adapters on one base.
        out_path: directory to create.
        precision: rank, energy and dtype of the factors.
        options: mergekit's options.
        force: replace `out_path` if it exists.
        progress: show progress bars.
        allow_nonfinite: go on where an input holds NaN or Inf.
        config_name: file name for messages.
        companion: writes the card, and more; without one mergekit's own card is written.

    Returns:
        What was done, printable.

    Raises:
        UserError: anything the user can put right; `out_path` is as it was before.
    """
    started = time.perf_counter()
    run = MergeRun(config_source, config_name, options)
    target = check_target(out_path, force, run.paths_read())
    base = _base_of(run)
    # Whatever the model would be written in, the update is taken in float32.
    run.configuration.dtype = run.configuration.out_dtype = "float32"
    builder: AdapterBuilder | None = None

    def look(planner: Any) -> None:
        nonlocal builder
        run.inspect(planner)
        if companion is not None and companion.on_plan is not None:
            companion.on_plan(run, planner)
        builder = _divert(planner, checkpoint, base, precision or Precision(), run.name)

    session = MergeSession(
        on_plan=look,
        on_tensor=companion.on_tensor if companion is not None else None,
        allow_nonfinite=allow_nonfinite,
        quiet=not progress,
    )
    with run.opened(), staging_directory(target) as staging:
        checkpoint = BaseCheckpoint(LoaderCache().get(base), str(base), base.config)
        run.execute(staging, session)
        for left in staging.iterdir():  # the merged model's config
            left.unlink()
        assert builder is not None and checkpoint.names.skeleton is not None
        summary = builder.write(
            staging,
            checkpoint.names.skeleton,
            lambda path: _read(checkpoint, path),
            (checkpoint.names.config.architectures or [""])[0],
            base_model_name_or_path=base.model.path,
            revision=base.model.revision,
        )
        notes = []
        if companion is None:
            run.write_card(staging, target.name)
            _mark_card(staging / "README.md")
        else:
            notes = companion.finish(run, staging, target.name, session.prepared)
        give_ordinary_permissions(staging)
        move_into_place(staging, target, force)
    seconds = time.perf_counter() - started
    return AdapterMergeSummary(str(out_path), run.configuration.merge_method, seconds, str(base.model), summary, notes)


def adapter_precision(rank: int | None, energy: float | None, dtype: str | None) -> Precision:
    """The precision that the command's options ask for; rank 64 in float32 if they ask for nothing."""
    if rank is None and energy is None:
        rank = Precision.rank
    return Precision(rank, energy, dtype_from_name(dtype) or torch.float32)


def _base_of(run: MergeRun) -> ModelReference:
    configuration = run.configuration
    base = configuration.base_model
    if base is None:
        bases = {model.model for model in configuration.referenced_models() if model.lora is not None}
        if len(bases) != 1:
            raise UserError(f"{run.name}: an adapter needs a base; name it as base_model")
        base = ModelReference(model=bases.pop())
    if base.lora is not None:
        raise UserError(f"{run.name}: base_model {base} is an adapter itself; name the model that carries it")
    if configuration.tokenizer or configuration.tokenizer_source:
        raise UserError(f"{run.name}: tokenizer: an adapter cannot change the vocabulary; leave it out")
    return base


def _divert(
    planner: Any, checkpoint: BaseCheckpoint, base: ModelReference, precision: Precision, name: str
) -> AdapterBuilder:
    """Put a `KeepUpdate` behind every tensor that the merge may change, and drop the others."""
    places: dict[str, Place] = {}
    kept: list[tuple[WeightInfo, Task, LoadTensor]] = []
    counted: set[str] = set()
    for weight, task in planner._tensors:
        if isinstance(task, LoadTensor) or task.copy_of is not None:
            continue  # copied from the base
        load = LoadTensor(model=base, tensor=weight.name, aliases=weight.aliases, tied_names=weight.tied_names)
        stored = load._resolve_name(checkpoint.loader)
        if stored is None:
            raise UserError(
                f"{name}: {weight.name} is not in the base {base}, so no adapter for it can hold the merge; write the "
                "merge as a model"
            )
        if repeats_tied(weight, task, counted):
            continue  # a copy of a tied tensor, which changes with it
        counted.add(weight.name)
        found = _place(checkpoint, weight, stored)
        if found.kind == "whole" and holds_modules(checkpoint.names.skeleton, found) and _is_unchanged(task, load):
            continue  # or all modules below, with matrices that can be factored, would have to be stored whole
        places[weight.name] = found
        kept.append((weight, task, load))
    _check_depth(planner, base, name)
    builder = AdapterBuilder(settle(places), precision)
    planner._tensors = [
        (
            # An optional tensor may be missing from what mergekit writes.
            weight.model_copy(update={"optional": True}),
            KeepUpdate(name=weight.name, merge=task, base=load, builder=builder),
        )
        for weight, task, load in kept
    ]
    return builder


def _place(checkpoint: BaseCheckpoint, weight: WeightInfo, stored: str) -> Place:
    if stored in (weight.name, *(weight.aliases or ())):
        return place(checkpoint.names, stored, checkpoint.where)
    # The base ties it to another tensor; a value of its own can only be stored whole.
    found = place(checkpoint.names, weight.name, checkpoint.where)
    return Place(found.module, found.parameter, "whole", always=True)


def _is_unchanged(task: Any, base: LoadTensor) -> bool:
    """Whether every input equals the base, so that the merge does."""
    origin = base.execute()
    loads = task.gather_tensors.arguments().values()
    if not all(isinstance(load, LoadTensor) for load in loads):
        return False
    inputs = [LoadTensor(**{key: value for key, value in dict(load).items() if key != "dtype"}) for load in loads]
    return all(
        (tensor := load.execute()) is not None and tensor.shape == origin.shape and bool((tensor == origin).all())
        for load in inputs
    )


def _check_depth(planner: Any, base: ModelReference, name: str) -> None:
    written, own = planner.out_model_config, base.config(planner.options.trust_remote_code)
    for module in planner.arch_info.modules.values():
        layers = module.architecture.num_layers(written), module.architecture.num_layers(own)
        if layers[0] != layers[1]:
            raise UserError(
                f"{name}: the merge has {layers[0]} layers, the base {base} has {layers[1]}, which no adapter can "
                "change; write the merge as a model"
            )


def _read(checkpoint: BaseCheckpoint, path: str) -> Tensor:
    stored = checkpoint.names.find(path)
    for member in () if stored is not None else checkpoint.names.tied_to(path):
        stored = stored or checkpoint.names.find(member)
    if stored is None:
        raise UserError(f"{checkpoint.where}: {path} is not in its checkpoint, so it cannot be stored in an adapter")
    return checkpoint.tensor(stored)


def _mark_card(card: Path) -> None:
    if card.exists():
        text = card.read_text(encoding="utf-8")
        card.write_text(text.replace("library_name: transformers", "library_name: peft"), encoding="utf-8")
