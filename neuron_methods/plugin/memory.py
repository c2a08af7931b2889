"""What a merge takes of memory, as far as headers tell, and whether there is as much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.io.tasks import LoaderCache, LoadTensor

from neuron_methods.adapters.loader import AdapterLoader
from neuron_methods.adapters.updates import Dora
from neuron_methods.methods.contract import PreparedMerge
from neuron_methods.methods.footprint import bytes_of_method
from neuron_methods.models.headers import Header
from neuron_methods.plugin.seam import stored_name
from neuron_methods.plugin.shards import WAITING
from neuron_methods.support.memory import check_memory

# Process with mergekit, torch and transformers loaded, before any tensor.
_PROCESS_BYTES = 450 * 1024 * 1024


@dataclass
class MergeMemory:
    """Memory of a merge beyond the input files that are mapped, in bytes.

    Attributes:
        shard: that a shard of the output may take before it is written; all of the output where others write it. None
            where each tensor is written at once: then as many of the largest wait as `ShardWriter` holds.
        measuring: what the pass before the merge takes.
        kept: what it leaves until the end.
        work: {tensor: (inputs, beyond what lies in files; scratch; the result)}, for those that are merged. Those that
            are copied are written from the file that they lie in.
        device: where tensors are merged.
        on_device: what the largest of them takes there.
    """

    shard: int | None = None
    measuring: int = 0
    kept: int = 0
    work: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    device: str = "cpu"
    on_device: int = 0

    @property
    def peak(self) -> int:
        """What is taken at most."""
        results = [size for _, _, size in self.work.values()]
        waiting = WAITING * max(results, default=0) if self.shard is None else self.shard
        written = sum(results)
        merging = max((sum(parts) + min(written - parts[2], waiting) for parts in self.work.values()), default=0)
        inputs = max((inputs for inputs, _, _ in self.work.values()), default=0) if self.measuring else 0
        return max(inputs + self.measuring, self.kept + merging)

    @property
    def of_process(self) -> int:
        """The same with what the process itself takes."""
        return _PROCESS_BYTES + self.peak

    def add(
        self,
        name: str,
        inputs: Mapping[ModelReference, Header],
        loads: Mapping[ModelReference, LoadTensor],
        size: int,
        scratch: int,
    ) -> None:
        """Take account of one tensor that is merged.

        Args:
            name: the tensor's.
            inputs: headers of what is read.
            loads: mergekit's tasks that read.
            size: bytes of the result as it is written.
            scratch: what the method takes beyond inputs and result.
        """
        formed = sum(_in_memory(loads[model], header) for model, header in inputs.items())
        promoted = _promoted(header.dtype for header in inputs.values())
        aligned = sum(h.entries * promoted.itemsize for h in inputs.values() if h.dtype != promoted)
        self.work[name] = (formed + aligned, scratch, size)
        if self.device != "cpu":
            here = sum(h.entries * promoted.itemsize for h in inputs.values())
            self.on_device = max(self.on_device, here + aligned + scratch + size)

    def check(self, name: str) -> None:
        """Refuse a merge that will not fit.

        Args:
            name: of the configuration, for messages.

        Raises:
            UserError: naming what is needed and what is free.
        """
        shards = "" if self.shard is None else "smaller shards (--out-shard-size 1B), "
        advice = f"{shards}fewer models at a time, or a method that works in blocks help"
        check_memory(self.peak, f"{name}: the merge", advice)
        if self.on_device:
            check_memory(self.on_device, f"{name}: the merge", "--device cpu may do", self.device)


def scratch_of(
    method: Any, prepared: PreparedMerge | None, name: str, inputs: Mapping[ModelReference, Header], base: Any
) -> int:
    """Estimate what merging one tensor takes beyond inputs and result.

    Args:
        method: mergekit's or ours.
        prepared: the merge by a method of ours.
        name: of the tensor.
        inputs: headers of what is read.
        base: the base model, if any.
    """
    header = inputs.get(base) or next(iter(inputs.values()))
    if prepared is not None:
        return max(0, prepared.scratch(name, header.shape, len(inputs.keys() - {base})) - 4 * header.entries)
    itemsize = _promoted(h.dtype for h in inputs.values()).itemsize
    return bytes_of_method(method.spec.name, header.entries, len(inputs), itemsize)


def _in_memory(load: LoadTensor, header: Header) -> int:
    """Bytes that one input takes beyond the file that it lies in."""
    loader = LoaderCache().get(load.model)
    name = stored_name(load, loader)
    asked = dtype_from_name(load.dtype)
    converted = header.entries * asked.itemsize if asked is not None and asked != header.dtype else 0
    if isinstance(loader, AdapterLoader):
        if name not in loader.updates:
            return converted
        rescaled = any(isinstance(step, Dora) for step in loader.updates[name].steps)
        return converted + header.bytes * (4 if rescaled else 1)
    in_file = name is not None and loader.index.is_safetensors
    return converted + (0 if in_file else header.bytes)


def _promoted(dtypes: Any) -> torch.dtype:
    found: torch.dtype | None = None
    for dtype in dtypes:
        found = dtype if found is None else torch.promote_types(found, dtype)
    return found or torch.float32
