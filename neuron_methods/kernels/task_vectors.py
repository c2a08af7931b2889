"""An expert's task vector, from its weights or given directly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TaskVector(Tensor):
    """A tensor that holds τ = θ_t − θ₀ in float32 where an expert's weights θ_t are expected.

    Made by `task_vector.as_subclass(TaskVector)`. Slices, reshapes and copies to another device stay of this class, so
    whoever meets one knows it for what it is. It comes from adapters: θ₀ + B·A would round away the small part.
    """

    def dense(self) -> Tensor:
        """Give τ as an ordinary tensor."""
        return self.as_subclass(Tensor)


class LowRankTaskVector(TaskVector):
    """A task vector that is known as B·A, and formed only when `dense` is asked for it.

    Its own entries are zeros that take no memory: only a method that looks for `b` and `a` may be given one.

    Attributes:
        b: (neurons, r), float32.
        a: (r, inputs), float32.
        transposed: whether the weight stores its neurons as columns.
    """

    b: Tensor
    a: Tensor
    transposed: bool

    @classmethod
    def of(cls, b: Tensor, a: Tensor, shape: tuple[int, ...], transposed: bool = False) -> LowRankTaskVector:
        """Make one of a weight's shape; a convolution's inputs are flattened in `a`."""
        made = torch.zeros((), device=a.device).expand(shape).as_subclass(cls)
        made.b, made.a, made.transposed = b, a, transposed
        return made

    def dense(self) -> Tensor:
        """Form B·A in the shape of the weight, float32."""
        product = self.b @ self.a
        return (product.T if self.transposed else product).reshape(tuple(self.shape))

    def to(self, *args: Any, **kwargs: Any) -> LowRankTaskVector:  # type: ignore[override]
        """Move the factors; they stay in float32."""
        device = torch.empty(0, device=self.a.device).to(*args, **kwargs).device
        return self.of(self.b.to(device), self.a.to(device), tuple(self.shape), self.transposed)


def fill_task_vector(out: Tensor, expert: Tensor, base: Tensor, *, clean: bool = False) -> Tensor:
    """Write θ_t − θ₀ into `out`, and return it.

    Args:
        out: float32, shape of the base; overwritten.
        expert: θ_t in any float dtype, or τ_t as a `TaskVector`.
        base: θ₀, any float dtype.
        clean: take a NaN or infinite update for none.
    """
    if isinstance(expert, TaskVector):
        out.copy_(expert.dense())
    else:
        out.copy_(expert).sub_(base)
    return out.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0) if clean else out
