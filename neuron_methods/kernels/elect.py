"""Elect and average: how NeuroMerging reduces the values of several experts to one (arXiv:2503.05320, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor


def elect_signs(values: Tensor, tie_tolerance: float = 0.0) -> Tensor:
    """Find the sign that wins the vote of the experts at each position, weighted by magnitude.

    Args:
        values: shape (experts, ..., row), any float dtype.
        tie_tolerance: a sum of at most this magnitude counts as 0; for values that carry rounding of their own.

    Returns:
        sign(Σ_t values_t), shape (..., row), in {-1, 0, 1}; 0 marks a tie. The sum is taken in float64 so that
        neither the order of the experts nor cancellation in float32 decides what is a tie.
    """
    total = values.sum(dim=0, dtype=torch.float64)
    return torch.where(total.abs() > tie_tolerance, total, 0.0).sign()


def resolve_ties(signs: Tensor) -> Tensor:
    """Give tied positions, 0 among elected signs (..., row), the majority sign of their row; -1 where that balances."""
    majority = torch.where(signs.sum(dim=-1, keepdim=True) > 0, 1.0, -1.0).to(signs.dtype)
    return torch.where(signs == 0, majority, signs)


def reduce_elected(values: Tensor, signs: Tensor, consensus: str = "mean") -> Tensor:
    """Reduce the experts' values that carry the elected sign.

    Args:
        values: shape (experts, ..., row).
        signs: elected signs, shape (..., row), every tie already resolved.
        consensus: `mean` of the nonzero values with the elected sign, or their `sum` (ours).

    Returns:
        Shape (..., row), dtype of `values`; 0 where no expert carries the elected sign.
    """
    elected = (values * signs) > 0
    total = (values * elected).sum(dim=0)
    if consensus == "sum":
        return total
    return total / elected.sum(dim=0).clamp(min=1)


def elect_and_reduce(values: Tensor, consensus: str = "mean", tie_tolerance: float = 0.0) -> Tensor:
    """Elect a sign at each position of a row, then reduce the values that carry it.

    A tie takes the majority sign of the elected signs of its row (negative if these balance too): of the last dimension
    of `values`, (experts, ..., row). The other arguments are those of `elect_signs` and `reduce_elected`, of which the
    latter says what is returned.
    """
    signs = resolve_ties(elect_signs(values, tie_tolerance))
    return reduce_elected(values, signs.to(values.dtype), consensus)
