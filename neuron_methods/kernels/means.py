"""A weighted sum of updates, entry by entry: how tensors are merged whose inputs cannot be told apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neuron_methods.kernels.rows import row_blocks
from neuron_methods.kernels.task_vectors import TaskVector, fill_task_vector


def mean_factors(weights: Sequence[float], scale: float = 1.0) -> list[float]:
    """Compute scale × w_t / Σ w_t; zeros where all weights are 0."""
    total = sum(weights)
    return [scale * weight / total if total else 0.0 for weight in weights]


def mean_bytes(entries: int, scratch_bytes: int) -> int:
    """Bound the memory of `add_updates`, the result in float32 included."""
    return 4 * entries + min(scratch_bytes, 12 * entries)


def add_updates(
    base: Tensor,
    experts: Sequence[Tensor],
    factors: Sequence[float],
    merged: Tensor,
    *,
    clean: bool = False,
    scratch_bytes: int = 1 << 28,
) -> None:
    """Write θ₀ + Σ_t f_t τ_t.

    Args:
        base: θ₀, any shape and float dtype.
        experts: θ_t, or `TaskVector`s; shape of the base.
        factors: f_t.
        merged: receives the sum; contiguous, shape of the base, any float dtype.
        clean: take a NaN or infinite update for none.
        scratch_bytes: bound on scratch memory.
    """
    shape = (base.shape[0], -1) if base.ndim > 1 and len(base) else (1, -1)
    rows, target = base.reshape(shape), merged.view(shape)
    parts = [
        (expert.dense().as_subclass(TaskVector) if isinstance(expert, TaskVector) else expert).reshape(shape)
        for expert in experts
    ]
    for block in row_blocks(len(rows), 12 * rows.shape[1], scratch_bytes):
        total = rows[block].to(torch.float32, copy=True)
        update = torch.empty_like(total)
        for part, factor in zip(parts, factors, strict=True):
            if factor != 0:
                total.add_(fill_task_vector(update, part[block], rows[block], clean=clean), alpha=factor)
        target[block].copy_(total)
