"""What a method of ours may know beyond the one tensor mergekit hands it.

mergekit gives a method one output tensor at a time. Ours need facts about the whole merge first (one trim threshold
per expert over all tensors). The plan of a merge is therefore handed to the method before the first tensor:
`PlannedMethod.check` refuses what cannot work before anything is read, `PlannedMethod.measure` streams once over all
tensors, and its result accompanies every call of `merge_group`. The rooms that meet mergekit build the plan; here is
only its shape.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from mergekit.merge_methods.base import BatchOptions, GroupMergeMethod, TensorGroup
from mergekit.merge_methods.dtype import promoted_dtype
from pydantic import BeforeValidator
from torch import Tensor

from neuron_methods.support.errors import UserError

SCRATCH_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """What is known of the model a merge writes, beside its tensors.

    Attributes:
        config: its `PretrainedConfig`.
        read_profile: reads the neuron profile at a path; see `neuron_methods.profiling.profile_file.NeuronProfile`.
    """

    config: Any
    read_profile: Callable[[str], Any]


@dataclass(frozen=True, eq=False)
class PlannedTensor:
    """One tensor the merge will write, before it is read.

    Attributes:
        name: name of the output tensor.
        load: reads (base, {expert id: tensor}) anew; base is None where the base lacks an optional tensor.
        parameters: the method's shared parameters as they resolve for this tensor.
        expert_parameters: {parameter: {expert id: value}}.
        repeats: the tensor is stored a second time under a tied name; what is counted over the model counts it once.
        entries: number of floating-point entries, where that is known without reading.
        untouched: every expert is known to equal the base here, and the tensor will be copied; `entries` is known.
        model: the model that the merge writes; None where only tensors are merged.
    """

    name: str
    load: Callable[[], tuple[Tensor | None, dict[Hashable, Tensor]]]
    parameters: Mapping[str, Any]
    expert_parameters: Mapping[str, Mapping[Hashable, Any]]
    repeats: bool = False
    entries: int | None = None
    untouched: bool = False
    model: ModelFacts | None = None


@dataclass
class MergeContext:
    """What accompanies a merge from its first tensor to its last.

    Attributes:
        state: what the method's `measure` returned.
        out_dtype: dtype to write, or None for the inputs' own.
        allow_nonfinite: go on where an input holds NaN or Inf.
        scratch_bytes: bound on float32 scratch memory per tensor.
        progress: called as progress(description, tensors) to open a bar; returns an iterable over the tensors.
    """

    state: Any = None
    out_dtype: torch.dtype | None = None
    allow_nonfinite: bool = False
    scratch_bytes: int = SCRATCH_BYTES
    progress: Callable[[str, Sequence[PlannedTensor]], Iterator[PlannedTensor]] = field(
        default=lambda _description, tensors: iter(tensors)
    )


_CONTEXT: ContextVar[MergeContext | None] = ContextVar("neuron_methods_merge", default=None)


@contextmanager
def merge_context(context: MergeContext) -> Iterator[MergeContext]:
    """Make `context` the one that methods see within the block."""
    token = _CONTEXT.set(context)
    try:
        yield context
    finally:
        _CONTEXT.reset(token)


def current_context() -> MergeContext | None:
    """The context of the merge that is running, or None outside of one."""
    return _CONTEXT.get()


class PlannedMethod(GroupMergeMethod):
    """A mergekit method that sees the plan of the whole merge before the first tensor.

    Attributes:
        takes_task_vectors: experts may come as `neuron_methods.kernels.task_vectors.TaskVector`, in planned tensors and
            in groups; the method then uses `fill_task_vector` wherever it would subtract the base.
    """

    takes_task_vectors: ClassVar[bool] = False

    def check(self, tensors: Sequence[PlannedTensor]) -> None:
        """Refuse what cannot work before any tensor is read.

        Raises:
            UserError: naming the parameter and what to do.
        """

    def measures(self, tensors: Sequence[PlannedTensor]) -> bool:
        """Whether `measure` will read tensors for this plan."""
        return True

    @abstractmethod
    def measure(self, tensors: Sequence[PlannedTensor], context: MergeContext) -> Any:
        """Stream over all tensors of the merge; the result becomes `context.state`."""

    def findings(self, state: Any) -> list[str]:
        """Lines for the summary of a merge, from what `measure` found."""
        return []

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        context = current_context()
        if context is None or context.state is None:
            tensors = _planned_in_memory(groups, parameters)
            self.check(tensors)
            context = replace(context) if context else MergeContext()
            with torch.no_grad():
                context.state = self.measure(tensors, context)
        merged: list[Tensor] = []
        for group, bound, input_dtype in zip(groups, parameters, input_dtypes, strict=True):
            # Task vectors are formed from the stored dtype: an input dtype asked for is that of the result. The method
            # writes each block of rows in the final dtype itself; mergekit would round twice.
            written = out_dtype or context.out_dtype or input_dtype
            stored = promoted_dtype(group) if group.entries else input_dtype
            # Nothing here is differentiated: modules merged in memory bring parameters that ask for it.
            with merge_context(replace(context, out_dtype=written)), torch.no_grad():
                merged += super()._execute((group,), [bound], options, input_dtypes=[stored], out_dtype=written)
        return tuple(merged)


def _planned_in_memory(groups: Sequence[TensorGroup], parameters: Sequence[Mapping[str, Any]]) -> list[PlannedTensor]:
    planned, seen = [], set()
    for group, bound in zip(groups, parameters, strict=True):
        # A module lists tied weights under each of their names: one set of entries all the same.
        storage = tuple((e.tensor.data_ptr(), e.tensor.shape, e.tensor.stride()) for e in group.entries)
        planned.append(_planned_group(group, bound, storage in seen))
        seen.add(storage)
    return planned


def _planned_group(group: TensorGroup, parameters: Mapping[str, Any], repeats: bool) -> PlannedTensor:
    from mergekit.common import ModelReference

    if any(isinstance(entry.id, ModelReference) for entry in group.entries):
        raise UserError(
            f"{group.metadata.name}: mergekit runs this merge without showing its plan, so nothing can be measured "
            "over the whole model; use the commands mergekit-neuron, mergekit-yaml, mergekit-multi or mergekit-pytorch"
        )
    experts = {entry.id: entry.tensor for entry in group.non_base}
    base = group.base.tensor if group.base else None
    return PlannedTensor(
        name=group.metadata.name or "tensor",
        load=lambda: (base, experts),
        parameters={k: v for k, v in parameters.items() if not isinstance(v, Mapping)},
        expert_parameters={k: v for k, v in parameters.items() if isinstance(v, Mapping)},
        repeats=repeats,
    )


def _number(name: str, value: Any, low: float, high: float, low_open: bool) -> float:
    bounds = f"{'(' if low_open else '['}{low:g}, {high:g}]"
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not (low < number <= high if low_open else low <= number <= high) or abs(number) == float("inf"):
        expected = "a finite number" if (low, high) == (-float("inf"), float("inf")) else f"a number in {bounds}"
        raise UserError(f"{name} must be {expected}; got {value!r}")
    return number


def number(name: str, low: float = -float("inf"), high: float = float("inf"), *, low_open: bool = False) -> Any:
    """Type of a numeric parameter; out of range it is refused with the parameter's name and range.

    Args:
        name: the parameter as the YAML spells it.
        low: smallest value.
        high: largest value, included.
        low_open: whether `low` itself is excluded.

    Returns:
        A float type for mergekit's `ParameterSpec`.
    """
    return Annotated[float, BeforeValidator(lambda value: _number(name, value, low, high, low_open))]


def choice(name: str, *values: str) -> Any:
    """Type of a parameter that takes one of a few words."""

    def validate(value: Any) -> str:
        if value not in values:
            raise UserError(f"{name} must be one of {', '.join(values)}; got {value!r}")
        return value

    return Annotated[str, BeforeValidator(validate)]


def number_or(name: str, *words: str) -> Any:
    """Type of a parameter that takes a finite number or one of some words."""
    shown = " or ".join(map(repr, words))

    def validate(value: Any) -> float | str:
        if isinstance(value, str) and value in words:
            return value
        try:
            return _number(name, value, -float("inf"), float("inf"), True)
        except UserError:
            raise UserError(f"{name} must be a finite number or {shown}; got {value!r}") from None

    return Annotated[float | str, BeforeValidator(validate)]
