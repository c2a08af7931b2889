"""An expert's task vector, from its weights or given directly."""

from __future__ import annotations

from torch import Tensor


class TaskVector(Tensor):
    """A tensor that holds τ = θ_t − θ₀ in float32 where an expert's weights θ_t are expected.

    Made by `task_vector.as_subclass(TaskVector)`. Slices, reshapes and copies to another device stay of this class, so
    whoever meets one knows it for what it is. It comes from adapters: θ₀ + B·A would round away the small part.
    """


def fill_task_vector(out: Tensor, expert: Tensor, base: Tensor, *, clean: bool = False) -> Tensor:
    """Write θ_t − θ₀ into `out`, and return it.

    Args:
        out: float32, shape of the base; overwritten.
        expert: θ_t in any float dtype, or τ_t as a `TaskVector`.
        base: θ₀, any float dtype.
        clean: take a NaN or infinite update for none.
    """
    if isinstance(expert, TaskVector):
        out.copy_(expert.as_subclass(Tensor))
    else:
        out.copy_(expert).sub_(base)
    return out.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0) if clean else out
