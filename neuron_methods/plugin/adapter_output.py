"""A merge that comes out as a LoRA adapter on its base: `mergekit-neuron merge --as-adapter`.

mergekit plans and runs the merge as ever. Behind every tensor's merge stands one more task, which hands what the merge
adds to the base to `adapters.export` and passes nothing on to mergekit's writer; no merged model is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache, LoadTensor
from torch import Tensor

from neuron_methods.adapters.export import AdapterBuilder
from neuron_methods.adapters.kept import Kept, Precision
from neuron_methods.adapters.loader import AdapterLoader, BaseCheckpoint
from neuron_methods.adapters.placement import Place, holds_modules, place, settle
from neuron_methods.adapters.verification import verify_adapter
from neuron_methods.models.skeleton import Skeleton
from neuron_methods.plugin.layout import packed
from neuron_methods.plugin.output import Output, optional
from neuron_methods.plugin.planning import repeats_tied
from neuron_methods.plugin.run import MergeRun
from neuron_methods.plugin.seam import planned_tasks, replan, stored_name
from neuron_methods.plugin.session import session_of
from neuron_methods.plugin.work import Work, stored_in
from neuron_methods.support.errors import UserError


class KeepUpdate(Task[None], arbitrary_types_allowed=True):
    """Hand what an adapter keeps of a merged tensor to what is finished; mergekit's writer gets nothing."""

    name: str
    merge: Task
    base: LoadTensor
    builder: Any
    work: Any

    def arguments(self) -> dict[str, Task]:
        """Ask for the merged tensor and the base's."""
        return {"merged": self.merge, "base": self.base}

    def group_label(self) -> str | None:
        """Stay with the base's tensor."""
        return self.base.group_label()

    def execute(self, merged: Tensor, base: Tensor) -> None:
        """Factor the update, and hand over what is kept of it.

        Raises:
            UserError: the merge has changed the tensor's shape.
        """
        if merged.shape != base.shape:
            raise UserError(
                f"{self.name}: the merge makes {list(merged.shape)} of the base's {list(base.shape)}, which no adapter "
                "can; leave tokenizer out of the YAML, or write the merge as a model"
            )
        prepared = self.merge.measure.plan.prepared if getattr(self.merge, "measure", None) is not None else None
        low_rank = prepared.low_rank.pop(self.name, None) if prepared is not None and prepared.low_rank else None
        kept = self.builder.look(self.name, base, merged, low_rank)
        if kept is None:
            self.work.take(self.name, {})
        else:
            tensors = {f"{part} {self.name}": tensor.contiguous() for part, tensor in kept.tensors.items()}
            self.work.take(self.name, tensors, kept=kept.figures)


class AdapterOutput(Output):
    """A LoRA adapter on the base, in the files of peft.

    Args:
        precision: rank, energy and dtype of the factors.
    """

    library = "peft"

    def __init__(self, precision: Precision | None = None) -> None:
        self.precision = precision or adapter_precision(None, None, None)

    def configure(self, run: MergeRun) -> None:
        """Find the base.

        Raises:
            UserError: there is none, it is an adapter itself, or the vocabulary is to change.
        """
        self.base = _base_of(run)
        # Whatever the model would be written in, the update is taken in float32.
        run.configuration.dtype = run.configuration.out_dtype = "float32"

    def plan(self, run: MergeRun, planner: Any, work: Work) -> None:
        """Put a `KeepUpdate` behind every tensor that the merge may change, and drop the others."""
        self.checkpoint = BaseCheckpoint(LoaderCache().get(self.base), str(self.base), self.base.config)
        kept, unchanged = _kept(planner, self.checkpoint, self.base, run.name)
        _check_depth(planner, self.base, run.name)
        places = settle({weight.name: found for weight, _, _, found in kept})
        session = session_of(planner.options)
        if session is not None and session.prepared is not None:
            session.prepared.low_rank = {}
        nonfinite = session is not None and session.allow_nonfinite
        self.builder = builder = AdapterBuilder(places, self.precision, allow_nonfinite=nonfinite, unchanged=unchanged)
        kept.sort(key=lambda entry: entry[2].group_label() or "")
        replan(
            planner,
            [
                (
                    optional(w),
                    KeepUpdate(name=w.name, merge=task, base=load, builder=builder, work=work),
                )
                for w, task, load, _ in kept
            ],
        )
        # Pieces are as large as the shards of a model would be.
        sizes = {weight.name: next(iter(inputs.values())).bytes for weight, inputs, _ in run.plan.tensors if inputs}
        work.groups = packed(((w.name, sizes.get(w.name, 0)) for w, *_ in kept), run.options.out_shard_size)
        heads = run.heads
        if heads is not None and heads.kind == heads.owner.kind and heads.owner.head and heads.owner.model != self.base:
            # The first of its notes says that the output has that head.
            run.plan.notes.remove(heads.notes[0])
            run.plan.notes.append(f"heads left out, as an adapter for {self.base} brings none: {heads.owner.shown}")
        run.plan.tensors = [
            (weight, inputs, builder.bytes_of(weight.name, next(iter(inputs.values())).shape))
            for weight, inputs, _ in run.plan.tensors
            if weight.name in places
        ]

    def made_from(self) -> dict[str, Any]:
        """Say how updates are factored."""
        precision = self.precision
        return {
            "--as-adapter": True,
            "--rank": [precision.rank, precision.asked],
            "--energy": precision.energy,
            "--adapter-dtype": str(precision.dtype),
        }

    def finish(self, run: MergeRun, staging: Path, work: Work) -> None:
        """Write the adapter; the merged model's config goes."""
        for left in staging.iterdir():
            left.unlink()
        stored = stored_in(work.pieces.values())
        traces = work.traces()
        for weight, _, _ in run.plan.tensors:
            if "kept" in traces.get(weight.name, {}):
                tensors = {part: stored.get(f"{part} {weight.name}") for part in ("a", "b", "whole")}
                found = {part: tensor for part, tensor in tensors.items() if tensor is not None}
                self.builder.take(weight.name, Kept(found, traces[weight.name]["kept"]))
        self.adapter = self.builder.write(
            staging,
            self._skeleton,
            lambda path: _read(self.checkpoint, path),
            (self.checkpoint.names.config.architectures or [""])[0],
            base_model_name_or_path=self.base.model.path,
            revision=self.base.model.revision,
        )

    def verify(self, run: MergeRun, staging: Path) -> None:
        """Read the adapter back, and let peft find a place for it."""
        verify_adapter(staging, self.builder.written, self._skeleton)

    def headline(self, run: MergeRun) -> str:
        """Say what the adapter is for."""
        return f"a LoRA adapter for {self.base}"

    @property
    def _skeleton(self) -> Skeleton:
        skeleton = self.checkpoint.names.skeleton
        assert skeleton is not None  # `place` has refused a base without
        return skeleton


def adapter_precision(rank: int | None, energy: float | None, dtype: str | None) -> Precision:
    """Make the precision that the command's options ask for.

    If they ask for nothing: float32, rank 64, and all factors of what a method has in factors itself.
    """
    asked = rank is not None or energy is not None
    return Precision(rank if asked else Precision.rank, energy, dtype_from_name(dtype) or torch.float32, asked)


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
    if run.builds_tokenizer:
        raise UserError(f"{run.name}: tokenizer: an adapter cannot change the vocabulary; leave it out")
    return base


def _kept(
    planner: Any, checkpoint: BaseCheckpoint, base: ModelReference, name: str
) -> tuple[list[tuple[WeightInfo, Any, LoadTensor, Place]], set[str]]:
    """The tensors that the merge may change: (weight, mergekit's task, the load of the base's, place).

    And paths in memory of those that stay as they are, though what the base ties them to may change.
    """
    kept, unchanged = [], set()
    loaders = [LoaderCache().get(model) for model in planner.config.referenced_models()]
    untied = {name for loader in loaders if isinstance(loader, AdapterLoader) for name in loader.untied}
    counted: set[str] = set()
    for weight, task in planned_tasks(planner):
        if task.copy_of is not None:
            unchanged.add(checkpoint.names.path_of(weight.name) or weight.name)
            continue  # copied from the base
        load = LoadTensor(model=base, tensor=weight.name, aliases=weight.aliases, tied_names=weight.tied_names)
        stored = stored_name(load, checkpoint.loader)
        if stored is None:
            raise UserError(
                f"{name}: {weight.name} is not in the base {base}, so no adapter for it can hold the merge; write the "
                "merge as a model"
            )
        if repeats_tied(weight, task, counted):
            unchanged |= {weight.name} & untied
            continue  # a copy of a tied tensor, which changes with it
        counted.add(weight.name)
        found = _place(checkpoint, weight, stored)
        if found.kind == "whole" and holds_modules(checkpoint.names.skeleton, found) and _is_unchanged(task, load):
            continue  # or all modules below, with matrices that can be factored, would have to be stored whole
        kept.append((weight, task, load, found))
    return kept, unchanged


def _place(checkpoint: BaseCheckpoint, weight: WeightInfo, stored: str) -> Place:
    skeleton = checkpoint.names.skeleton
    # A name that is no path in memory is that of the output, whose class may spell the base's names with a prefix.
    if stored in (weight.name, *(weight.aliases or ())) or (skeleton and weight.name not in skeleton.tensors):
        return place(checkpoint.names, stored, checkpoint.where)
    return place(checkpoint.names, weight.name, checkpoint.where)  # the base ties it to another tensor


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
