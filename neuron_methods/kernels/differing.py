"""Trim by difference: keep the entries of task vectors in which experts differ most, by the variance of their updates.

Wan et al., "FuseChat: Knowledge Fusion of Chat Models", arXiv:2408.07990 (SCE, step Select), as an entry in which all
agree tells nothing of what each expert has learned alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_methods.kernels.trim import kept_rank


def variances(updates: Tensor) -> Tensor:
    """Measure how far experts differ, entry by entry.

    Args:
        updates: task vectors, shape (..., experts, d), float32.

    Returns:
        Variance over the experts (of one expert alone the square), shape (..., d), float32. It is taken in float64, so
        that the order of the experts has no say (in float32 on Metal, which has no float64).
    """
    wide = updates.double() if updates.device.type != "mps" else updates
    if wide.shape[-2] == 1:
        return wide.squeeze(-2).square().float()
    return wide.var(dim=-2, correction=0).float()


def largest_left_out(values: Tensor, density: float) -> float:
    """Find the largest variance of which the entry is not kept.

    Args:
        values: variances of a whole tensor, any shape, float32; their order is lost.
        density: share of entries to keep, in (0, 1].

    Returns:
        The ⌊n·(1 − density)⌋-th smallest of n values; −1 where that is none of them.
    """
    flat = values.view(-1)
    rank = kept_rank(len(flat), density)
    if rank == 0:
        return -1.0
    if flat.device.type == "cpu":
        array = flat.numpy()
        array.partition(rank - 1)  # in place: torch's kthvalue makes a copy, and as many 8-byte indices
        return float(array[rank - 1])
    return float(torch.kthvalue(flat, rank).values)


def keep_differing_(updates: Tensor, values: Tensor, bound: float) -> Tensor:
    """Zero, for all experts, every entry whose variance is not above a bound, in place; returns `updates`.

    Args:
        updates: shape (..., experts, d), float32.
        values: their `variances`, shape (..., d).
        bound: from `largest_left_out`.
    """
    return updates.mul_((values > bound).unsqueeze(-2))
