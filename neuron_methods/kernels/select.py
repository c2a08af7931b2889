"""Select neurons by importance, and settle who gets a neuron that several experts want (MIN-Merging).

Liang, arXiv:2510.17890, stage 1, in the explicit form this project gives it. All slices of tensors that one neuron
owns share its importance and its coefficients a_t, so that a neuron is merged whole:

    θ₀ + λ Σ_t a_t τ_t,   a_t = 0 where expert t does not keep the neuron.

A slice is one index along the *owned axis* of a tensor: a row of a projection, an entry of a bias, a column of the down
projection. Fused projections hold several slices of each neuron (`copies`), one block of neurons behind the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from neuron_methods.kernels.rows import row_blocks
from neuron_methods.kernels.task_vectors import fill_task_vector
from neuron_methods.kernels.trim import kept_rank

_BLOCK_BYTES = 1 << 24
CONFLICTS = ("weighted", "winner", "sum")
# Squared norm that stands in for a neuron without base weights: what is learnt there is all there is.
_SMALLEST_SQUARE = 1e-24


def slice_squares(
    base: Tensor, expert: Tensor | None, axis: int, *, copies: int = 1, update: bool = True, clean: bool = False
) -> Tensor:
    """Sum up the squared norm of every neuron's slices in one tensor.

    Args:
        base: θ₀, any shape and float dtype.
        expert: θ_t or a `TaskVector`; None for the base's own norms.
        axis: the owned axis.
        copies: slices per neuron along the axis.
        update: of τ_t = θ_t − θ₀; else of θ_t.
        clean: count a NaN or infinite update as none.

    Returns:
        Shape (neurons,), float64, on the CPU.
    """
    squares = torch.zeros(base.shape[axis], dtype=torch.float64, device="cpu")
    others = [dim for dim in range(base.ndim) if dim != axis]
    for block in _blocks(base):
        origin = base[block].float()
        values = origin
        if expert is not None:
            values = fill_task_vector(torch.empty_like(origin), expert[block], origin, clean=clean)
            if not update:
                values += origin
        part = values.square()
        part = part.sum(dim=others, dtype=torch.float32) if others else part
        if axis == 0:
            squares[block] = part.double().cpu()
        else:
            squares += part.double().cpu()
    return squares.view(copies, -1).sum(dim=0)


def relative_norms(update_squares: Tensor, base_squares: Tensor) -> Tensor:
    """Compute the importance `magnitude`: norm of a neuron's update relative to the norm of its base weights.

    Both squared norms are over all slices the neuron owns, float64 (neurons,), and so is the result, which is finite
    even where a neuron has no base weights.
    """
    return (update_squares / base_squares.clamp(min=_SMALLEST_SQUARE)).sqrt()


def keep_threshold(importances: Tensor, density: float) -> float:
    """Find the smallest importance among the top `density` share of neurons, exactly.

    The rank is that of `neuron_methods.kernels.trim.kept_rank`: of n neurons the ⌊n·(1 − density)⌋-th smallest
    importance is the threshold, and every neuron at or above it is kept, ties included: n − ⌊n·(1 − density)⌋ + 1 of
    them where no two are equal, all of them where the rank is 0. Then the threshold is −∞.
    """
    rank = kept_rank(len(importances), density)
    return float(importances.kthvalue(rank).values) if rank else -float("inf")


def conflict_coefficients(importances: Tensor, kept: Tensor, weights: Sequence[float], conflict: str) -> Tensor:
    """Settle each expert's share a_t in every neuron.

    Args:
        importances: shape (experts, neurons), not negative.
        kept: which neurons an expert keeps, bool, same shape.
        weights: per expert, not negative; one of weight 0 wants nothing.
        conflict: `weighted`: in proportion to weight × importance (to weight alone where no importance is positive);
            `winner`: the largest weight × importance takes all, the first of equals; `sum`: weight times each update.

    Returns:
        Shape (experts, neurons), float64. `weighted` and `winner` sum to 1 wherever anyone keeps the neuron.
    """
    votes = torch.tensor(weights, dtype=torch.float64, device=importances.device).unsqueeze(1)
    wanted = (kept & (votes > 0)).double()
    if conflict == "sum":
        return wanted * votes
    claims = wanted * votes * importances
    if conflict == "winner":
        claims = torch.where(wanted > 0, claims, -1.0)
        first = torch.zeros_like(wanted).scatter_(0, claims.argmax(dim=0, keepdim=True), 1.0)
        return first * wanted
    total = claims.sum(dim=0)
    claims = torch.where(total > 0, claims, wanted * votes)
    return claims / claims.sum(dim=0).clamp(min=torch.finfo(torch.float64).tiny)


def combine_slices(
    base: Tensor,
    experts: Sequence[Tensor],
    coefficients: Tensor,
    axis: int,
    merged: Tensor,
    *,
    scale: float = 1.0,
    copies: int = 1,
    clean: bool = False,
) -> Tensor:
    """Write θ₀ + λ Σ_t a_t τ_t, every neuron with its own coefficients.

    Args:
        base: θ₀, any shape and float dtype.
        experts: θ_t each, or `TaskVector`s.
        coefficients: a_t, shape (experts, neurons).
        axis: the owned axis.
        merged: receives the result; shape of the base, any float dtype.
        scale: λ.
        copies: slices per neuron along the axis.
        clean: treat a NaN or infinite update as none.

    Returns:
        `merged`. Where one a_t·λ is 1 and the others are 0 it is θ_t to the last bit: sums are taken in float64, where
        the difference of two float32 numbers added to one of them is the other again.
    """
    dtype = torch.float32 if base.device.type == "mps" else torch.float64
    shape = [1] * base.ndim
    shape[axis] = -1
    factors = [(scale * row).repeat(copies).to(base.device, dtype).view(shape) for row in coefficients]
    for block in _blocks(base):
        origin = base[block].to(dtype)
        total = origin.clone()
        update = torch.empty_like(origin)
        for expert, factor in zip(experts, factors, strict=True):
            fill_task_vector(update, expert[block], origin, clean=clean)
            total += update.mul_(factor[block] if axis == 0 else factor)
        merged[block].copy_(total)
    return merged


def combine_bytes(shape: Sequence[int], experts: int) -> int:
    """Bound the scratch memory in bytes of `slice_squares` and `combine_slices` for a tensor of this shape."""
    entries = math.prod(shape)
    rows = max(1, shape[0]) if shape else 1
    # Base, sum and update of a block in float64; the coefficients once more on their device, repeated for copies.
    return 3 * min(8 * entries, max(_BLOCK_BYTES, 8 * entries // rows)) + 16 * experts * max(shape, default=1)


def _blocks(tensor: Tensor) -> list[slice]:
    """Blocks of the first axis that stay in cache."""
    width = tensor.numel() // max(1, tensor.shape[0])
    return list(row_blocks(tensor.shape[0], 8 * width, _BLOCK_BYTES))
