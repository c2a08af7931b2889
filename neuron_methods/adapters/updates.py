"""What an adapter does to one tensor of its base: steps on the task vector, as peft's `merge_and_unload` applies them.

With base weight W, factors A and B of rank r and scaling s (α/r, or α/√r with rslora):

- `LowRank`      τ += s · B·A, in one of the arrangements in which layers keep their weight
- `Dora`         w = W + τ;  τ = m/‖w‖ · w − W, the norm taken per neuron of w (Liu et al., arXiv:2402.09353)
- `Replacement`  τ = V − W, for values V stored whole: `modules_to_save`, trained biases
- `Rows`         τ[i] = V − W[i] for single tokens i
- `Shift`        τ += s · b, for the bias of B

Everything is computed in float32. As long as only `LowRank` and `Shift` steps are taken, W is never read: that is what
makes the task vector exact to rounding, where (W + B·A) − W would lose |W|·2⁻²⁴ of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from neuron_methods.kernels.task_vectors import LowRankTaskVector

# How a layer keeps its weight, given B·A of shape (out, in).
Layout = Literal["linear", "transposed", "embedding", "convolution", "experts", "experts_transposed"]


class TensorSource(Protocol):
    """Where the tensors of an adapter are read from."""

    def tensor(self, key: str) -> Tensor:
        """Read one tensor, on the CPU, in its stored dtype."""


def low_rank_delta(a: Tensor, b: Tensor, scaling: float, layout: Layout, shape: Sequence[int]) -> Tensor:
    """Form s · B·A in the arrangement of the base weight.

    Args:
        a: float32; (r, in) for `linear` and `transposed`, (r, tokens) for `embedding`, (r, in, *kernel) for
            `convolution`, (experts · r, in) for the experts' layouts.
        b: float32; (out, r), (width, r) for `embedding`, (out, r, 1, …) for `convolution`, (out, r · experts) with the
            experts innermost for the experts' layouts.
        scaling: s.
        layout: `linear` (out, in); `transposed` (in, out), as in GPT-2; `embedding` (tokens, width); `convolution`
            (out, in, *kernel); `experts` (experts, out, in); `experts_transposed` (experts, in, out).
        shape: of the base weight.

    Returns:
        float32 of `shape`.
    """
    if layout == "linear":
        return (b * scaling) @ a
    if layout in ("transposed", "embedding"):
        return (a.T * scaling) @ b.T
    if layout == "convolution":
        return ((b.flatten(1) * scaling) @ a.flatten(1)).reshape(tuple(shape))
    experts = shape[0]
    a = a.reshape(experts, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1) * scaling
    delta = torch.bmm(b, a)
    return delta if layout == "experts" else delta.transpose(1, 2)


def dora_factors(weights: Tensor, magnitude: Tensor, neuron_axis: int) -> Tensor:
    """Compute the factors m / ‖w‖ per neuron (arXiv:2402.09353, equation 5).

    Args:
        weights: W + s · B·A, float32, two or more dimensions.
        magnitude: m, one entry per index of `neuron_axis`, in any shape.
        neuron_axis: the axis that is kept; the norm is taken over the others.

    Returns:
        float32, broadcastable against `weights`.
    """
    others = tuple(axis for axis in range(weights.ndim) if axis != neuron_axis)
    norms = torch.linalg.vector_norm(weights, dim=others, keepdim=True)
    return magnitude.reshape(norms.shape) / norms


class Step(ABC):
    """One change of a tensor. `source` holds the values it takes."""

    source: TensorSource

    @abstractmethod
    def apply(self, task_vector: Tensor | None, base: Callable[[], Tensor], device: str) -> Tensor:
        """Take the step.

        Args:
            task_vector: float32 what the steps before have made of it, None at first; may be changed in place.
            base: reads the base weight as float32 on `device`; not to be changed in place.
            device: where to compute.

        Returns:
            The task vector, float32, shape of the base weight.
        """

    def equals(self, other: Step) -> bool:
        """Tell whether another step, stored under keys of its own, makes the same change."""
        return self == other

    def _read(self, key: str, device: str) -> Tensor:
        return self.source.tensor(key).to(device=device, dtype=torch.float32)


def _add(task_vector: Tensor | None, delta: Tensor) -> Tensor:
    return delta if task_vector is None else task_vector.add_(delta)


@dataclass(frozen=True)
class LowRank(Step):
    """τ += s · B·A; `a` and `b` are the factors' keys, `shape` is the base weight's."""

    source: TensorSource
    a: str
    b: str
    scaling: float
    layout: Layout
    shape: tuple[int, ...]

    def apply(self, task_vector: Tensor | None, base: Callable[[], Tensor], device: str) -> Tensor:
        """See `Step.apply`; the base is not read."""
        a, b = self._read(self.a, device), self._read(self.b, device)
        return _add(task_vector, low_rank_delta(a, b, self.scaling, self.layout, self.shape))

    def factors(self, device: str) -> tuple[Tensor, Tensor]:
        """Read (s · B, A), float32, as matrices of which the inputs of a convolution are flattened."""
        a, b = self._read(self.a, device), self._read(self.b, device)
        return b.flatten(1) * self.scaling, a.flatten(1)

    def equals(self, other: Step) -> bool:
        """See `Step.equals`; an embedding keeps its factors the other way round than a head."""
        if not isinstance(other, LowRank) or (self.scaling, self.shape) != (other.scaling, other.shape):
            return self == other
        return all(torch.equal(one, same) for one, same in zip(self._sides(), other._sides(), strict=True))

    def _sides(self) -> tuple[Tensor, Tensor]:
        a, b = self.source.tensor(self.a), self.source.tensor(self.b)
        return (a.T, b.T) if self.layout in ("embedding", "transposed") else (b, a)


@dataclass(frozen=True)
class Shift(Step):
    """τ += s · b, with `key` for b: what `lora_bias` adds to the layer's own bias."""

    source: TensorSource
    key: str
    scaling: float

    def apply(self, task_vector: Tensor | None, base: Callable[[], Tensor], device: str) -> Tensor:
        """See `Step.apply`; the base is not read."""
        return _add(task_vector, self._read(self.key, device) * self.scaling)


@dataclass(frozen=True)
class Dora(Step):
    """Rescale W + τ to the magnitudes stored under `key`; to be taken right after the layer's `LowRank`."""

    source: TensorSource
    key: str
    neuron_axis: int

    def apply(self, task_vector: Tensor | None, base: Callable[[], Tensor], device: str) -> Tensor:
        """See `Step.apply`. (f − 1)·W + f·τ is f·(W + τ) − W without the difference of two large numbers."""
        weights = base()
        update = torch.zeros_like(weights) if task_vector is None else task_vector
        factors = dora_factors(weights + update, self._read(self.key, device), self.neuron_axis)
        return update.mul_(factors).addcmul_(weights, factors - 1)


@dataclass(frozen=True)
class Replacement(Step):
    """The tensor stored under `key` takes the place of the base's."""

    source: TensorSource
    key: str

    def apply(self, task_vector: Tensor | None, base: Callable[[], Tensor], device: str) -> Tensor:
        """See `Step.apply`."""
        return self._read(self.key, device) - base()

    def equals(self, other: Step) -> bool:
        """See `Step.equals`."""
        return isinstance(other, Replacement) and torch.equal(
            self.source.tensor(self.key), other.source.tensor(other.key)
        )


@dataclass(frozen=True)
class Rows(Step):
    """The rows stored under `key` take the place of the base's rows `indices`."""

    source: TensorSource
    key: str
    indices: tuple[int, ...]

    def apply(self, task_vector: Tensor | None, base: Callable[[], Tensor], device: str) -> Tensor:
        """See `Step.apply`."""
        weights = base()
        update = torch.zeros_like(weights) if task_vector is None else task_vector
        indices = torch.tensor(self.indices, device=weights.device)
        return update.index_copy_(0, indices, self._read(self.key, device) - weights[indices])

    def equals(self, other: Step) -> bool:
        """See `Step.equals`."""
        return (
            isinstance(other, Rows)
            and self.indices == other.indices
            and torch.equal(self.source.tensor(self.key), other.source.tensor(other.key))
        )


@dataclass(frozen=True)
class TensorUpdate:
    """All that an adapter does to one tensor, in order.

    Attributes:
        steps: at least one.
        origin: the base's tensor the steps start from; another name where the base ties the two.
    """

    steps: tuple[Step, ...]
    origin: str

    def task_vector(self, base: Callable[[], Tensor], device: str = "cpu") -> Tensor:
        """Form τ = expert − base.

        Args:
            base: reads the base weight, any float dtype; called only where a step needs it.
            device: where to compute.

        Returns:
            float32, contiguous, shape of the base weight.
        """
        read: list[Tensor] = []

        def weights() -> Tensor:
            if not read:
                read.append(base().to(device=device, dtype=torch.float32))
            return read[0]

        task_vector: Tensor | None = None
        for step in self.steps:
            task_vector = step.apply(task_vector, weights, device)
        assert task_vector is not None
        return task_vector.contiguous()

    def low_rank(self, device: str = "cpu") -> LowRankTaskVector | None:
        """Give τ as B·A; None where other steps than `LowRank` are taken, or on what is no matrix."""
        pairs, layouts = [], set()
        for step in self.steps:
            if not isinstance(step, LowRank) or step.layout not in ("linear", "transposed", "convolution"):
                return None
            pairs.append(step.factors(device))
            layouts.add((step.layout, step.shape))
        ((layout, shape),) = layouts
        b = torch.cat([b for b, _ in pairs], dim=1)
        a = torch.cat([a for _, a in pairs], dim=0)
        return LowRankTaskVector.of(b, a, shape, layout == "transposed")

    def weights(self, base: Callable[[], Tensor], device: str = "cpu") -> Tensor:
        """Form the expert's weights, float32: base + τ, or the stored values where they replace the base's."""
        last = self.steps[-1]
        if isinstance(last, Replacement):
            return last._read(last.key, device)
        weights = base().to(device=device, dtype=torch.float32)
        return self.task_vector(lambda: weights, device).add_(weights)
