"""How a method of ours sees a whole merge, where mergekit shows a method one tensor at a time.

Ours need facts about all tensors first (one trim threshold per expert over the model), so a merge has three steps:

1. `PlannedMethod.prepare` is given the plan and refuses what cannot work, before any tensor is read.
2. `PreparedMerge.measure` streams once over the tensors that `PreparedMerge.reads` names.
3. `PreparedMerge.merge` merges one tensor, as often as there are tensors.

The rooms that meet mergekit make the plan, and hand the prepared merge to each tensor's call among its parameters,
under the name `PREPARED`. A merge in memory brings all its tensors in one call, and is prepared there.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from mergekit.merge_methods.base import BatchOptions, MergeMethod, TensorGroup
from mergekit.merge_methods.dtype import align_dtype
from torch import Tensor

from neuron_methods.kernels.low_rank import LowRank
from neuron_methods.kernels.means import add_updates, mean_factors
from neuron_methods.kernels.task_vectors import TaskVector
from neuron_methods.methods.share import Share
from neuron_methods.support.errors import UserError
from neuron_methods.support.finite import ADVICE
from neuron_methods.support.kept import Kept

Thing = TypeVar("Thing")
PREPARED = "prepared"
SCRATCH_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """What is known of the model a merge writes, beside its tensors.

    Attributes:
        config: its `PretrainedConfig`.
        state: (name without directories, digest of the weights) of an expert by its id, or of the base by None; None
            where models are not in files.
    """

    config: Any
    state: Callable[[Hashable | None], tuple[str, str]] | None = None

    def check_unchanged(self, where: str, model: Hashable | None, name: str, digest: str) -> None:
        """Refuse what was measured on a model's weights as they were before.

        Args:
            where: what was measured, and how it is called.
            model: the expert, or None for the base.
            name: of the model it was measured on, without directories.
            digest: of the weights then; "" where that is not known.

        Raises:
            UserError: the model of that name has other weights now.
        """
        if self.state is not None and digest:
            shown, now = self.state(model)
            if shown == name and now != digest:
                raise UserError(f"{where}: {name} has other weights now than when it was measured; measure it again")


#: What a weight is to its module: a matrix whose rows are neurons (a convolution's, too), one whose columns are; the
#: table of the token embeddings; a stack of either kind of matrix, as mixtures of experts keep them.
Role = Literal["matrix", "transposed", "tokens", "packed", "packed_transposed"]


@dataclass(frozen=True)
class TensorPlace:
    """Where a weight stands in its model.

    Attributes:
        module: path in memory of the module whose weight it is; None where only the tensor's name is known.
        role: what it is to it.
        width: how many inputs the module multiplies with each of its neurons; None where it does no such thing.
    """

    module: str | None
    role: Role
    width: int | None = None

    @classmethod
    def guessed(cls, name: str) -> TensorPlace:
        """Tell by a tensor's name alone, where no model's class can be asked."""
        if ".experts." in name and not re.search(r"\.experts\.\d+\.", name):
            return cls(None, "packed")
        tokens = re.search(r"(embed_tokens|word_embeddings|token_embedding|tok_embeddings|wte|shared)\.weight$", name)
        return cls(None, "tokens" if tokens else "matrix")


@dataclass(frozen=True, eq=False)
class PlannedTensor:
    """One tensor the merge will write, before it is read.

    Attributes:
        name: name of the output tensor.
        load: reads (base, {expert id: tensor}) anew; base is None where the base lacks an optional tensor.
        parameters: the method's shared parameters as they resolve for this tensor.
        expert_parameters: {parameter: {expert id: value}}.
        repeats: tells whether the tensor is stored a second time under a tied name; what is counted over the model
            counts it once. It may have to read both, so `PlannedMethod.prepare` refuses what it can before it asks.
        entries: number of floating-point entries, where that is known without reading.
        untouched: every expert is known to equal the base here, and the tensor will be copied; `entries` is known.
        model: the model that the merge writes; None where only tensors are merged.
        place: tells where the tensor stands in that model; None where no class can be asked.
    """

    name: str
    load: Callable[[], tuple[Tensor | None, dict[Hashable, Tensor]]]
    parameters: Mapping[str, Any]
    expert_parameters: Mapping[str, Mapping[Hashable, Any]]
    repeats: Callable[[], bool] = lambda: False
    entries: int | None = None
    untouched: bool = False
    model: ModelFacts | None = None
    place: Callable[[], TensorPlace | None] = lambda: None


def place_of(tensor: PlannedTensor) -> TensorPlace:
    """Find where a planned tensor stands, by its model's class or else by its name."""
    return tensor.place() or TensorPlace.guessed(tensor.name)


@dataclass(frozen=True, eq=False)
class MergeSettings:
    """How a merge is run, whatever its method.

    Attributes:
        allow_nonfinite: go on where an input holds NaN or Inf.
        scratch_bytes: bound on float32 scratch memory per tensor.
        progress: called as progress(description, tensors) to open a bar; returns an iterable over the tensors.
        share: which part of what is measured this process looks at.
    """

    allow_nonfinite: bool = False
    scratch_bytes: int = SCRATCH_BYTES
    progress: Callable[[str, Sequence[PlannedTensor]], Iterator[PlannedTensor]] = field(
        default=lambda _description, tensors: iter(tensors)
    )
    share: Share = field(default_factory=Share)


class Inputs(NamedTuple):
    """What one tensor is merged from: its name ("" if it has none), θ₀ and {expert id: θ_t}, all of one dtype."""

    name: str
    base: Tensor
    experts: dict[Hashable, Tensor]


class LowRankUpdate(NamedTuple):
    """A merged update as its method has it: B·A, and what weighs its directions (see `kernels.low_rank.truncated`)."""

    update: LowRank
    moments: Tensor


class PreparedMerge(ABC):
    """One merge by a method of ours, from its plan to its last tensor.

    Attributes:
        settings: those given to `measure`.
        low_rank: {tensor: its merged update in factors}, of those that the method merges so; None where nobody asks.
        common: what merges that differ in `PlannedMethod.cheap` alone share; None where there are no others.
    """

    settings = MergeSettings()
    low_rank: dict[str, LowRankUpdate] | None = None
    common: Kept | None = None

    @cached_property
    def told(self) -> dict[str, dict[str, float]]:
        """What `merge` found, in figures, tensor by tensor: here, or in another process or run."""
        return {}

    def tell(self, name: str, **figures: float) -> None:
        """Add to what is told of a tensor."""
        told = self.told.setdefault(name, {})
        for figure, value in figures.items():
            told[figure] = told.get(figure, 0.0) + value

    def tellers(self) -> list[PreparedMerge]:
        """List who tells something: this merge, and those by other methods that are part of it."""
        return [self]

    def total(self, figure: str) -> float:
        """Add up a figure over the tensors, in the order of their names: the same sum whoever merged them, and when."""
        return sum(self.told[name].get(figure, 0.0) for name in sorted(self.told))

    def reads(self) -> set[str]:
        """Name the tensors that `measure` will read; empty where it reads none."""
        return set()

    def effort(self, name: str) -> float:
        """Estimate how long a tensor takes, beside one of as many bytes that takes longest in this merge."""
        return 1.0

    def measure(self, settings: MergeSettings) -> None:
        """Stream over all tensors that have to be known before the first is merged.

        Raises:
            UserError: an input holds NaN or Inf, and `settings` do not allow it.
        """
        self.settings = settings

    def merge(self, group: TensorGroup, parameters: Mapping[str, Any], out_dtype: torch.dtype) -> Tensor:
        """Merge one tensor, once `measure` is done.

        Args:
            group: base and experts, all of one shape and device, in the dtypes they are stored in.
            parameters: of the method, as its spec declares them.
            out_dtype: dtype of the result, which is rounded once.
        """
        # Nothing here is differentiated: modules merged in memory bring parameters that ask for it.
        with torch.no_grad(), torch.autocast(group.base.tensor.device.type, enabled=False):
            group = align_dtype(group)
            experts = {entry.id: entry.tensor for entry in group.non_base}
            return self.merge_tensor(
                Inputs(group.metadata.name or "", group.base.tensor, experts), parameters, out_dtype
            )

    def averaged(
        self,
        inputs: Inputs,
        parameters: Mapping[str, Any],
        out_dtype: torch.dtype,
        scale: float = 1.0,
        *,
        summed: bool = False,
    ) -> Tensor:
        """Merge one tensor into θ₀ + scale × the mean of the updates by `weight`, or as many times that as there are.

        Raises:
            UserError: an input that takes part holds NaN or Inf, and the settings do not allow it.
        """
        weights = [float(parameters["weight"][expert]) for expert in inputs.experts]
        scale *= sum(weight != 0 for weight in weights) if summed else 1
        merged = torch.empty(inputs.base.shape, dtype=out_dtype, device=inputs.base.device)
        add_updates(
            inputs.base,
            list(inputs.experts.values()),
            mean_factors(weights, scale),
            merged,
            clean=self.settings.allow_nonfinite,
            scratch_bytes=self.settings.scratch_bytes,
        )
        if not self.settings.allow_nonfinite and not bool(torch.isfinite(merged).all()):
            for (expert, tensor), weight in zip(inputs.experts.items(), weights, strict=True):
                values = tensor.dense() if isinstance(tensor, TaskVector) else tensor
                if weight and not bool(torch.isfinite(values).all() & torch.isfinite(inputs.base).all()):
                    raise nonfinite(inputs.name, inputs.base, expert)
        return merged

    @abstractmethod
    def merge_tensor(self, inputs: Inputs, parameters: Mapping[str, Any], out_dtype: torch.dtype) -> Tensor:
        """Merge one tensor; see `merge`."""

    def scratch(self, name: str, shape: Sequence[int], experts: int) -> int:
        """Bound the bytes that `merge` takes for one tensor beyond its inputs, the result included in float32.

        Args:
            name: of the tensor.
            shape: of the base's.
            experts: how many there are of it.
        """
        return 4 * math.prod(shape) * (experts + 2)

    def measuring(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Bound the bytes that `measure` takes beyond the inputs of one tensor; `shapes` are those of the merge."""
        return 0

    def remaining(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Bound the bytes of what `measure` has found, which stay until the last tensor is merged."""
        return 0

    def findings(self) -> list[str]:
        """Tell the summary of a merge, line by line, what `measure` found."""
        return []


class PlannedMethod(MergeMethod):
    """A mergekit method that sees the plan of the whole merge before the first tensor.

    Experts may come as `neuron_methods.kernels.task_vectors.TaskVector`, in planned tensors and in groups:
    `fill_task_vector` is used wherever the base would be subtracted.

    Attributes:
        takes_low_rank: whether a `LowRankTaskVector` is used as it is, so that adapters' updates need not be formed.
        cheap: parameters whose values cost little where `PreparedMerge.common` holds what does not depend on them.
    """

    takes_low_rank: ClassVar[bool] = False
    cheap: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def prepare(self, tensors: Sequence[PlannedTensor]) -> PreparedMerge:
        """Look at the plan of a merge, read the files that its parameters name, and refuse what cannot work.

        Args:
            tensors: at least one.

        Raises:
            UserError: naming the parameter and what to do.
        """

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        if not groups:
            return ()
        prepared = parameters[0].get(PREPARED)
        if prepared is None:
            with torch.no_grad():
                prepared = self.prepare(planned_in_memory(groups, parameters))
                prepared.measure(MergeSettings())
        # Task vectors are formed from the stored dtype: an input dtype asked for is that of the result. The method
        # writes each block of rows in the final dtype itself; mergekit would round twice.
        return tuple(
            prepared.merge(group, bound, out_dtype or input_dtype)
            for group, bound, input_dtype in zip(groups, parameters, input_dtypes, strict=True)
        )


def planned_in_memory(groups: Sequence[TensorGroup], parameters: Sequence[Mapping[str, Any]]) -> list[PlannedTensor]:
    """Plan a merge whose tensors are all at hand, with the parameters of each group as mergekit binds them.

    Raises:
        UserError: the tensors are those of models, one by one, so they are not all there.
    """
    from mergekit.common import ModelReference  # imports transformers, which the start-up hook has to do without

    planned: list[PlannedTensor] = []
    seen: set[Any] = set()
    for group, bound in zip(groups, parameters, strict=True):
        if any(isinstance(entry.id, ModelReference) for entry in group.entries):
            raise UserError(
                f"{group.metadata.name}: mergekit runs this merge without showing its plan, so nothing can be measured "
                "over the whole model; use the commands mergekit-neuron, mergekit-yaml, mergekit-multi or "
                "mergekit-pytorch"
            )
        # A module lists tied weights under each of their names: one set of entries all the same.
        storage = tuple((e.tensor.data_ptr(), e.tensor.shape, e.tensor.stride()) for e in group.entries)
        loaded = (group.base.tensor if group.base else None, {entry.id: entry.tensor for entry in group.non_base})
        planned.append(
            PlannedTensor(
                name=group.metadata.name or "tensor",
                load=lambda loaded=loaded: loaded,
                parameters={k: v for k, v in bound.items() if not isinstance(v, Mapping)},
                expert_parameters={k: v for k, v in bound.items() if isinstance(v, Mapping)},
                repeats=lambda known=storage in seen: known,
            )
        )
        seen.add(storage)
    return planned


def by_expert(tensors: Iterable[PlannedTensor], name: str) -> dict[Hashable, list[Any]]:
    """Collect an expert parameter's values over the tensors: {expert id: values}, in the plan's order."""
    found: dict[Hashable, list[Any]] = {}
    for tensor in tensors:
        for expert, value in tensor.expert_parameters[name].items():
            found.setdefault(expert, []).append(value)
    return found


def only_value(values: Iterable[Any], varies: str, advice: str) -> Any:
    """Return the only one of a parameter's values; raise UserError, from `varies` to `advice`, if there are several."""
    value, *others = set(values)
    if others:
        raise UserError(f"{varies} ({', '.join(sorted(map(str, (value, *others)))[:4])}){advice}")
    return value


def nonfinite(name: str, base: Tensor, expert: Hashable) -> UserError:
    """Say that a tensor's update by an expert is not finite, and whose fault that is."""
    culprit = expert if bool(torch.isfinite(base).all()) else "the base model"
    return UserError(f"{name}: {culprit} holds NaN or Inf; {ADVICE}, without these entries")


def grouped(things: Iterable[Thing], by: Callable[[Thing], str]) -> dict[str, list[Thing]]:
    """Put things that have something in common together, in their order."""
    groups: dict[str, list[Thing]] = {}
    for thing in things:
        groups.setdefault(by(thing), []).append(thing)
    return groups
