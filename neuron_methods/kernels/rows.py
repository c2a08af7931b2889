"""Weight tensors as neurons: one row each, a bounded number of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from neuron_methods.kernels.devices import bytes_at_once
from neuron_methods.kernels.products import times

# Blocks of this size stay near the processor's cache; larger ones only cost memory. Measured on 4096 × 4096.
CACHE_BYTES = 16 * 1024 * 1024


def is_points(name: str, dimensions: int) -> bool:
    """Tell whether a tensor holds no rows of weights: norms, biases, and biases of a mixture's experts in one stack."""
    return dimensions < 2 or (dimensions == 2 and name.endswith("bias"))


def neuron_rows(tensor: Tensor, *, packed: bool = False) -> Tensor:
    """View a weight tensor as (neurons, incoming weights).

    A matrix is its rows. A convolution (out, in, k…) is flattened to out × (in·k…). A table (1, positions, d), as
    vision models keep their position embeddings and class tokens, is its positions. `packed` tensors hold one matrix
    per expert of a mixture-of-experts layer, (experts, out, in): the rows of all of them.

    Args:
        tensor: at least 2-D.
        packed: whether leading dimensions stack matrices.

    Returns:
        A 2-D view where the strides allow one, else a copy.
    """
    if packed:
        return tensor.flatten(0, -2)
    if tensor.ndim == 3 and tensor.shape[0] == 1:
        return tensor[0]
    return tensor.flatten(1)


def row_blocks(
    neurons: int, bytes_per_neuron: int, scratch_bytes: int, device: torch.device | None = None
) -> Iterator[slice]:
    """Yield consecutive slices of all rows, each with scratch memory within `scratch_bytes`; one row may exceed it.

    On the CPU, which no device stands for, too, they stay near its cache.
    """
    size = max(1, min(scratch_bytes, bytes_at_once(CACHE_BYTES, device)) // max(1, bytes_per_neuron))
    for start in range(0, neurons, size):
        yield slice(start, min(start + size, neurons))


def sample_rows(neurons: int, limit: int | None) -> Tensor:
    """Choose the neurons to look at, ascending: all, or `limit` of them drawn anew for each size with one seed."""
    if limit is None or neurons <= limit:
        return torch.arange(neurons, device="cpu")
    # Not every n-th: rows of attention weights repeat the places of a head's dimensions at regular distances.
    generator = torch.Generator("cpu").manual_seed(neurons)
    return torch.randperm(neurons, generator=generator, device="cpu")[:limit].sort().values


def condensed(inputs: Tensor, rows: int) -> Tensor:
    """Find fewer rows whose FᵀF is about that of all.

    F = QᵀX, where Q is an orthonormal basis of X Vᵀ, and V random sums of rows.

    Args:
        inputs: X, float32 (n, d).
        rows: how many.

    Returns:
        F, float32; X where it has no more rows.
    """
    if len(inputs) <= rows:
        return inputs
    sums = added_up(inputs, rows)
    lengths = sums.norm(dim=1, keepdim=True)
    basis = torch.linalg.qr(times(inputs, torch.where(lengths > 0, sums / lengths, 0.0))).Q
    return times(basis.T, inputs.T)


def added_up(inputs: Tensor, rows: int) -> Tensor:
    """Add rows up at random, with random signs, to `rows` of them; as they are, where there are no more, or for 0.

    Which ones come together depends on nothing but their number, so equal experts stay equal.

    Args:
        inputs: F, shape (n, d).
        rows: how many to make of them.

    Returns:
        F', of which F'ᵀF' is FᵀF on average over the signs.
    """
    count = len(inputs)
    if not rows or count <= rows:
        return inputs
    sums = inputs.new_zeros(rows, inputs.shape[1])
    return add_up(sums, slice(0, count), count, inputs)


def add_up(sums: Tensor, block: slice, count: int, inputs: Tensor) -> Tensor:
    """Do what `added_up` does for some of the rows: add them to `sums`, which is returned.

    Args:
        sums: shape (rows, d).
        block: which of all `count` rows they are.
        count: of all rows.
        inputs: those of the block, shape (block, d), dtype of `sums`.
    """
    rows = len(sums)
    if count <= rows:
        sums[block] += inputs
        return sums
    generator = torch.Generator("cpu").manual_seed(count)  # everywhere the same numbers
    places = torch.randperm(count, generator=generator, device="cpu").remainder(rows)[block].to(inputs.device)
    signs = torch.randint(0, 2, (count, 1), generator=generator, device="cpu")[block].mul(2).sub(1).to(inputs)
    return sums.index_add_(0, places, inputs * signs)
