"""Second moments FᵀF in float64.

What a ridge ρ leaves of a system's condition, its largest eigenvalue over ρ, is in the thousands for updates and inputs
as they are, and a moment summed in float32 is off by that many times float32's rounding wherever inputs are weak.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_methods.kernels.devices import with_float64

# Columns that are multiplied at a time, as the triangle is all that is needed. Measured on widths of 576 and 1,536.
_COLUMNS = 192


def wide(tensor: Tensor) -> Tensor:
    """Give a tensor in float64; on the CPU for Metal, which has none."""
    return tensor.to(with_float64(tensor.device), torch.float64)


def moments_of(width: int, like: Tensor) -> Tensor:
    """Make a moment of nothing, float64 (width, width), where `wide(like)` is."""
    return torch.zeros(width, width, dtype=torch.float64, device=wide(like[:0]).device)


def add_moment(sums: Tensor, factor: Tensor, scale: float = 1.0) -> Tensor:
    """Add scale × FᵀF to the lower triangle of `sums`, which is returned; what is above the diagonal is undefined.

    Args:
        sums: from `moments_of`, (d, d).
        factor: F, (rows, d), any float dtype.
        scale: see above.
    """
    factor = wide(factor)
    for start in range(0, len(sums), _COLUMNS):
        sums[start:, start : start + _COLUMNS].addmm_(
            factor[:, start:].T, factor[:, start : start + _COLUMNS], alpha=scale
        )
    return sums


def mirrored(sums: Tensor) -> Tensor:
    """Copy the lower triangle to the upper one, in place."""
    for start in range(0, len(sums), _COLUMNS):
        end = start + _COLUMNS
        own = sums[start:end, start:end]
        own.copy_(own.tril() + own.tril(-1).T)
        sums[start:end, end:] = sums[end:, start:end].T
    return sums
