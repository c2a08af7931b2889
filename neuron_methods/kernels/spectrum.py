"""Temper the spectrum of a merged update: lift its weak directions, lower its strong ones.

The directions that several experts share add up in a merged update and tower over those that one expert alone has,
which are what its task needs. Isotropic merging (Marczak et al., "No Task Left Behind: Isotropic Model Merging with
Common and Task-Specific Subspaces", ICML 2025, arXiv:2502.04959, section 3) makes all singular values of a matrix's
update alike; a power of them between 0 and 1 goes part of the way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_methods.kernels.devices import bytes_at_once, with_float64
from neuron_methods.kernels.rows import row_blocks
from neuron_methods.kernels.subspace import SMALLEST_NORM

# Share of the largest squared singular value under which another is taken for rounding. Of inner products in float64, a
# singular value of this share is right to one part in ten thousand, one ten times as large to one in a million.
ROUNDING = 1e-12
# float64 copies are made of this many bytes at a time.
WIDE_BYTES = 16 * 1024 * 1024


def temper_spectrum_(update: Tensor, exponent: float) -> Tensor:
    """Raise a matrix's singular values to a power, and give it the Frobenius norm it had, in place.

    The decomposition is that of the inner products of its shorter side, in float64: of order n³ for n rows or columns,
    whichever are fewer, and n² scratch memory.

    Args:
        update: U S Vᵀ, shape (neurons, d), float32, finite.
        exponent: p from 0 (all that are not 0 become alike) to 1 (nothing changes).

    Returns:
        `update`, which is now c U Sᵖ Vᵀ; singular values that are rounding have become 0.
    """
    if exponent == 1 or not update.any():
        return update
    tall = update if len(update) >= update.shape[1] else update.T
    device = with_float64(update.device)
    # Entries far from 1 would leave float64's range as fourth powers, of which norms of products are made.
    size = update.abs().max()
    products = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=device)
    blocks = list(row_blocks(len(tall), 8 * tall.shape[1], bytes_at_once(WIDE_BYTES, device), device))
    for block in blocks:
        part = (tall[block] / size).to(products)
        products.addmm_(part.T, part)
    squares, vectors = torch.linalg.eigh(products)
    used = squares > ROUNDING * squares[-1]
    squares = torch.where(used, squares, 0.0)
    powers = torch.where(used, squares ** (exponent / 2), 0.0)
    factors = torch.where(used, powers / squares.sqrt(), 0.0) * (squares.sum().sqrt() / powers.norm())
    transform = (vectors * factors) @ vectors.T
    for block in blocks:
        tall[block] = tall[block].to(transform) @ transform
    return update


def remove_parallel_(update: Tensor, base: Tensor) -> Tensor:
    """Take out of each neuron's update what is parallel to its base weights, in place; returns `update`.

    Args:
        update: shape (neurons, d), float32.
        base: w, same shape, float32; a row of zeros has no direction, and its neuron's update stays as it is.
    """
    device = with_float64(update.device)
    w, wide = base.to(device, torch.float64), update.to(device, torch.float64)
    squares = (w * w).sum(dim=1, keepdim=True)
    shares = torch.where(squares > SMALLEST_NORM**2, (wide * w).sum(dim=1, keepdim=True) / squares, 0.0)
    return update.copy_(wide.sub_(shares * w))
