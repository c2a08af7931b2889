"""Look at a plan before any tensor is merged: are all tensors there, do they fit, what will it cost.

Only headers are read. Everything that can be refused is refused here, so that a long merge does not end in the middle.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference, dtype_from_name
from mergekit.io.tasks import GatherTensors, LoaderCache, LoadTensor
from mergekit.options import MergeOptions

from neuron_methods.adapters.loader import AdapterLoader
from neuron_methods.models.headers import Header, HeaderFiles
from neuron_methods.plugin.checkpoints import MAPPED_BYTES
from neuron_methods.plugin.memory import MergeMemory, scratch_of
from neuron_methods.plugin.seam import method_of, planned_tasks, stored_name, tokenizer_task
from neuron_methods.support.errors import UserError, explained_by


@dataclass
class MergePlan:
    """What a merge will do, as far as headers tell.

    Attributes:
        method: name in the YAML.
        tensors: (weight, {model: header of its input}, bytes it will take on disk) in the planner's order.
        parameters: {tensor name: (shared parameters, {model: its parameters})}.
        base: the base model, if any.
        carried: tensors of the base outside mergekit's definition, copied unchanged.
        measured: names of the tensors that a pass before the merge reads, none where there is no such pass.
        mapped_bytes: what is mapped of files into memory at a time, of one file of each model.
        memory: what it takes beyond them.
        dtypes: of floating point that are written.
        notes: what the user should know and no error is.
    """

    method: str
    base: ModelReference | None
    measured: set[str] = field(default_factory=set)
    mapped_bytes: int = 0
    memory: MergeMemory = field(default_factory=MergeMemory)
    tensors: list[tuple[WeightInfo, dict[ModelReference, Header], int]] = field(default_factory=list)
    parameters: dict[str, tuple[dict[str, Any], dict[ModelReference, dict[str, Any]]]] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    @property
    def measures(self) -> bool:
        """Whether a pass over the tensors comes before the merge."""
        return bool(self.measured)

    @property
    def bytes_to_read(self) -> int:
        """Bytes read over all passes."""
        return sum(
            header.bytes * (2 if weight.name in self.measured else 1)
            for weight, inputs, _ in self.tensors
            for header in inputs.values()
        )

    @property
    def bytes_to_write(self) -> int:
        """Bytes of the output's tensors."""
        return sum(size for _, _, size in self.tensors)

    @property
    def peak_memory(self) -> int:
        """Estimate of the process's peak in bytes, mapped files included."""
        return self.memory.of_process + self.mapped_bytes


def inspect_plan(planner: Any) -> MergePlan:
    """Check a plan against the headers of its inputs.

    Args:
        planner: mergekit's `MergePlanner` after planning, its tasks those of `planning.attach_to_planner`.

    Raises:
        UserError: a tensor is missing, or shapes do not fit.
    """
    method = method_of(planner)
    plan = MergePlan(
        method=method.spec.name,
        base=planner.config.base_model,
        memory=_memory_of(planner.options),
    )
    found = (t.measure.plan.prepared for _, t in planned_tasks(planner) if t.measure is not None)
    prepared = next(found, None)
    plan.measured = prepared.reads() if prepared is not None else set()
    shapes = {}
    headers = _Headers()
    files: dict[int, Counter[str]] = {}
    aligned = tokenizer_task(planner) is not None or planner.options.unsafe_truncate_embeddings
    for weight, task in planned_tasks(planner):
        gather = _gather(task.gather_tensors)
        inputs = {}
        # A tensor that no adapter touches is copied: only the base is read.
        loads = list(gather.arguments().values()) if task.copy_of is None else [task.copy_of]
        for load in loads:
            header = headers.of(load, planner.options.trust_remote_code)
            if header is not None:
                inputs[load.model] = header
                loader, file = headers.file_of(load)
                files.setdefault(loader, Counter())[file] += header.bytes
        _check_shapes(weight, inputs, task.base_model, aligned)
        stored = next(iter(inputs.values()), None)
        written = weight.force_dtype or planner.config.out_dtype or planner.config.dtype or task.out_dtype
        dtype = dtype_from_name(written) or _promoted(inputs.values())
        if stored and dtype.is_floating_point:
            plan.dtypes.add(dtype)
        size = stored.entries * dtype.itemsize if stored else 0
        plan.tensors.append((weight, inputs, size))
        if stored and task.copy_of is None:
            shapes[weight.name] = (inputs.get(task.base_model) or stored).shape
            ours = prepared if task.measure is not None else None
            scratch = scratch_of(method, ours, weight.name, inputs, task.base_model)
            plan.memory.add(weight.name, inputs, {load.model: load for load in loads}, size, scratch)
        spec = method.spec
        per_model = {
            model: {p.name: values[p.name] for p in spec.input_parameters if p.name in values}
            for model, values in ((model, dict(task.input_parameters[model].items())) for model in task.model_order)
        }
        plan.parameters[weight.name] = ({p.name: task.parameters[p.name] for p in spec.shared_parameters}, per_model)
    # What one tensor brings beyond the bound stays, and all of a pickle.
    largest = max((h.bytes for _, inputs, _ in plan.tensors for h in inputs.values()), default=0)
    bound = sys.maxsize if planner.options.lazy_unpickle else MAPPED_BYTES + 2 * largest
    plan.mapped_bytes = sum(min(max(sizes.values()), bound) for sizes in files.values())
    if prepared is not None:
        plan.memory.measuring, plan.memory.kept = prepared.measuring(shapes), prepared.remaining(shapes)
    return plan


def _memory_of(options: MergeOptions) -> MergeMemory:
    # A shard of pickles is held as a whole when it is put together.
    return MergeMemory(None if options.safe_serialization else options.out_shard_size, device=options.device or "cpu")


class _Headers:
    """Headers of what mergekit's tasks will read."""

    def __init__(self) -> None:
        self._files = HeaderFiles()

    def of(self, load: LoadTensor, trust_remote_code: bool = False) -> Header | None:
        """Read the header of what `load` will read; None for an optional tensor the model does not have.

        Raises:
            UserError: the tensor is required and missing, or a file is unreadable.
        """
        loader = LoaderCache().get(load.model)
        name = stored_name(load, loader)
        if name is None:
            if load.optional:
                return None
            keys = set(loader.index.tensor_paths)
            model_type = load.model.config(trust_remote_code=trust_remote_code).model_type
            if not can_convert_checkpoint_keys(model_type, keys, load.tensor):
                raise UserError(
                    f"{load.model}: tensor {load.tensor} is missing from its checkpoint ({len(keys)} tensors found); "
                    "the architecture in its config.json promises it: is the checkpoint complete?"
                )
            return Header.of(load.execute())
        if isinstance(loader, AdapterLoader):  # which knows without reading
            return loader.header(name)
        return self._files.behind(loader, name)

    def file_of(self, load: LoadTensor) -> tuple[int, str]:
        """Say which loader will open a file for `load`, and name the file, as far as there is one."""
        loader = LoaderCache().get(load.model)
        name = stored_name(load, loader) or ""
        if isinstance(loader, AdapterLoader):
            return id(loader.base.loader), loader.base.loader.index.tensor_paths.get(loader.origin(name), "")
        return id(loader), loader.index.tensor_paths.get(name, "")


def _gather(task: Any) -> GatherTensors:
    return getattr(task, "gather_tensors", task)


@explained_by("models")
def _check_shapes(
    weight: WeightInfo, inputs: dict[ModelReference, Header], base: ModelReference | None, aligned: bool
) -> None:
    if not inputs:
        return
    reference = base if base in inputs else next(iter(inputs))
    expected = inputs[reference].shape
    axis = weight.vocabulary_axis
    for model, header in inputs.items():
        if header.shape == expected:
            continue
        differs_in_vocabulary = (
            axis is not None
            and len(header.shape) == len(expected)
            and header.shape[:axis] + header.shape[axis + 1 :] == expected[:axis] + expected[axis + 1 :]
        )
        if differs_in_vocabulary:
            if aligned:
                continue
            raise UserError(
                f"{weight.name}: vocabularies differ: {model} has {header.shape[axis]} tokens, {reference} has "
                f"{expected[axis]}; align them in the YAML with tokenizer: {{source: base}} (or source: union)"
            )
        raise UserError(
            f"{weight.name}: shapes differ: {model} has {list(header.shape)}, {reference} has {list(expected)}; "
            "models of different sizes cannot be merged"
        )


def _promoted(headers: Iterable[Header]) -> torch.dtype:
    dtype: torch.dtype | None = None
    for header in headers:
        dtype = header.dtype if dtype is None else torch.promote_types(dtype, header.dtype)
    return dtype or torch.float32
