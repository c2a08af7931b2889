"""Hooks that watch what the linear layers and convolutions of a model in memory are given.

Modules that are given the same tensor, as q, k and v of an attention layer are, share a sketch. Which do is found out
by the identity of the tensors in a first forward pass, whose inputs are not kept; each pass has to bear it out.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neuron_methods.data.feeders import Batch, Feeder
from neuron_methods.profiling.measured_model import run
from neuron_methods.profiling.module_inputs import input_vectors, input_width, linear_modules, reading
from neuron_methods.profiling.recorder import device_of
from neuron_methods.profiling.sketch import InputSketch
from neuron_methods.support.errors import UserError


class InputsDiffer(Exception):
    """Modules of one group were given different inputs; they have been parted, and all is to be measured anew."""


class InputRecorder:
    """Watches all linear modules of a model; what they are given inside `watching()` goes into `records`.

    Attributes:
        group_of: path of a module -> the number of the modules that share its sketch.
        records: that number, as text -> their sketch.

    Args:
        model: whose modules are those of its class.
        device: where its inputs go.
        feeder: lays out what it reads.
        rows: of a factor at most.
        answers_only: only tokens that say the answer count, those that a target follows.
    """

    def __init__(
        self, model: PreTrainedModel, device: torch.device, feeder: Feeder, rows: int, answers_only: bool = False
    ) -> None:
        self.model, self.device, self.feeder, self.rows = model, device, feeder, rows
        self.answers_only = answers_only
        self.modules = linear_modules(model)
        self.group_of: dict[str, int] = {}
        self.records: dict[str, InputSketch] = {}
        self._streams = {path: feeder.stream_of(path) for path in self.modules}
        self._part({path: path for path in self.modules})
        self._pass: _Pass | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the hooks are in place, and `find_groups` and `run` record."""
        with ExitStack() as hooks:
            for path, module in self.modules.items():
                hooks.enter_context(module.register_forward_pre_hook(self._hook(path, module), with_kwargs=True))
            yield

    def find_groups(self, batch: Batch) -> None:
        """Find the modules that are given the same inputs in a forward pass; nothing else is kept of it."""
        calls = self._forward(batch, keep=False).calls
        self._part(
            {path: (calls[path], self._reads(path)) if calls[path] else path for path in self.modules},
        )

    def run(self, batch: Batch) -> None:
        """Run a forward pass and keep what the modules are given.

        Raises:
            InputsDiffer: modules of one group were given different inputs.
        """
        calls = self._forward(batch, keep=True).calls
        if any(calls[path] != calls[self._first[group]] for path, group in self.group_of.items()):
            self._part({path: (group, calls[path]) for path, group in self.group_of.items()})
            raise InputsDiffer

    def groups(self) -> list[list[str]]:
        """List the modules of each group, by its number."""
        found: list[list[str]] = [[] for _ in self.records]
        for path, group in self.group_of.items():
            found[group].append(path)
        return found

    def _forward(self, batch: Batch, keep: bool) -> _Pass:
        batch = batch.to(self.device)
        self._pass = _Pass(batch, keep)
        try:
            with torch.no_grad():
                run(self.model, batch.inputs)
            return self._pass
        finally:
            self._pass = None

    def _hook(self, path: str, module: nn.Module) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            current = self._pass
            if current is None:  # while an answer is generated
                return
            given = arguments[0] if arguments else next(iter(keywords.values()))
            calls = current.calls[path]
            calls.append(current.number(given))
            group = self.group_of[path]
            if current.keep and len(calls) > current.taken[group]:
                current.taken[group] += 1
                self._take(path, module, given, current.batch)

        return hook

    def _take(self, path: str, module: nn.Module, given: Tensor, batch: Batch) -> None:
        """Add the vectors of the tokens that count to the sketch of a module's group."""
        stream = batch.streams[self._streams[path]]
        counting = stream.valid
        if self.answers_only and batch.targets is not None:
            counting = (batch.targets.flatten() != -100).nonzero().squeeze(1)
        sketch = self.records[str(self.group_of[path])]
        vectors = input_vectors(module, given.detach())
        vectors = vectors.reshape(-1, vectors.shape[-1])
        if counting is not None:
            samples = len(stream.order)
            tokens = samples * (stream.identity.shape[1] if stream.identity is not None else 1)
            if len(vectors) == tokens:
                vectors = vectors.index_select(0, counting.to(vectors.device))
            elif len(vectors) != samples:  # one for each sample is what a pooled head reads
                sketch.missing += 1
                return
        sketch.add(vectors)
        if not math.isfinite(sketch.energy):
            raise UserError(f"inputs of {path}: NaN or infinite; measure in another --dtype, such as float32")

    def _reads(self, path: str) -> Hashable:
        return self._streams[path], reading(self.modules[path]), device_of(self.modules[path], self.model)

    def _part(self, keys: dict[str, Any]) -> None:
        """Form the groups of modules that have one key, and begin anew."""
        numbers: dict[str, int] = {}
        self.group_of = {path: numbers.setdefault(repr(key), len(numbers)) for path, key in keys.items()}
        self._first: dict[int, str] = {}
        for path, group in self.group_of.items():
            self._first.setdefault(group, path)
        self.records = {
            str(group): InputSketch(
                input_width(self.modules[path]), self.rows, device_of(self.modules[path], self.model)
            )
            for group, path in self._first.items()
        }


class _Pass:
    """One forward pass: which tensors its modules were given, numbered.

    Attributes:
        batch: that it reads.
        keep: whether its inputs are kept.
        calls: path of a module -> the tensors of its calls.
        taken: group -> how many calls' vectors are in its sketch.
    """

    def __init__(self, batch: Batch, keep: bool) -> None:
        self.batch, self.keep = batch, keep
        self.calls: defaultdict[str, list[int]] = defaultdict(list)
        self.taken: defaultdict[int, int] = defaultdict(int)
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self._numbers = itertools.count()

    def number(self, tensor: Tensor) -> int:
        """Number a tensor: equal ones are the same object, unchanged since; those are not kept alive."""
        known = self._seen.get(id(tensor))
        if known is None or known[0]() is not tensor or known[1] != tensor._version:
            self._seen[id(tensor)] = known = weakref.ref(tensor), tensor._version, next(self._numbers)
        return known[2]


def common_groups(parts: Sequence[Sequence[int]]) -> list[int]:
    """Number the groups that are groups in all of several numberings of the same things."""
    numbers: dict[tuple[int, ...], int] = {}
    return [numbers.setdefault(these, len(numbers)) for these in zip(*parts, strict=True)]
