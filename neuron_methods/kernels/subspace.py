"""Neuronal subspaces: split task vectors of neurons at their base weights and merge the parts.

Fang et al., EMNLP 2025, arXiv:2503.05320. Let w be the base weights of a neuron (one row of a weight matrix) and τ_t
the trimmed task vector of expert t for it:

    τ_∥,t = c_t w,  c_t = τ_t·w / w·w     how much more sensitive the neuron becomes to the input it already reads
    τ_⊥,t = τ_t − τ_∥,t                   what new input it learns to read

The experts' orthogonal parts, stacked to a T × d matrix with singular value decomposition U S Vᵀ, are scored on each
right singular vector (T × r matrix U S); every column is elected and averaged to one score s_r, and
ψ_⊥ = Σ_r s_r v_r. As v_r = Σ_t U_tr τ_⊥,t / S_r, the merge is a combination of the experts' own rows,

    ψ_⊥ = Σ_t a_t τ_⊥,t = Σ_t a_t τ_t − (Σ_t a_t c_t) w,   a_t = Σ_r (s_r / S_r) U_tr,

and c, U and S all come from the inner products of the T + 1 rows τ_1 … τ_T, w:

    τ_⊥,s · τ_⊥,t = τ_s·τ_t − (τ_s·w)(τ_t·w) / w·w.

So one Gram matrix per neuron holds all that steps 2 to 4 need, and the merged neuron is one combination of its rows. No
d-dimensional decomposition is made, and no row is split in memory.

The inner products are taken in float64. An average is over the experts that score on a direction, so a score that
should be 0 and comes out as 1e-9 changes the result by a factor; float32 products cannot tell the two apart, float64
products of float32 numbers can.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neuron_methods.kernels.devices import bytes_at_once, with_float64
from neuron_methods.kernels.elect import elect_signs, reduce_elected, resolve_ties
from neuron_methods.kernels.rows import row_blocks

# Relative size under which a float64 number is rounding: of an energy, a singular vector's entry, a sum of them.
ROUNDING = 1e-12
# Norm under which a base row has no direction: its coefficients would leave the range of float32.
SMALLEST_NORM = 1e-30
# float64 copies are made of this many bytes at a time, which stay in cache. Measured on 4096 × 4096.
WIDE_BYTES = 2 * 1024 * 1024
# Number of rows from which on the symmetry of their inner products is made use of. Measured likewise.
HALVED = 8


class MergeCoefficients(NamedTuple):
    """How each neuron's merge is combined from its base row and its task vectors.

    Attributes:
        parallel: c_t, shape (neurons, experts), float64.
        orthogonal: a_t, shape (neurons, experts), float64.
        gram: τ_⊥,s · τ_⊥,t, shape (neurons, experts, experts), float64.
        parallel_energy: Σ ‖τ_∥,t‖² over neurons and experts.
        orthogonal_energy: Σ ‖τ_⊥,t‖² likewise.
    """

    parallel: Tensor
    orthogonal: Tensor
    gram: Tensor
    parallel_energy: float
    orthogonal_energy: float


def merge_coefficients(rows: Tensor, *, rank_energy: float = 1.0, consensus: str = "mean") -> MergeCoefficients:
    """Compute the coefficients of steps 2 to 4 for a block of neurons.

    Args:
        rows: each neuron's task vectors and base row, τ_1 … τ_T, w; shape (neurons, experts + 1, d), float32.
        rank_energy: see `singular_vectors`.
        consensus: see `neuron_methods.kernels.elect.reduce_elected`.

    Returns:
        Coefficients on the device of `rows`; on the CPU for Metal, which has no float64.
    """
    gram = gram_matrices(rows)
    energies = gram.diagonal(dim1=1, dim2=2)[:, :-1]
    parallel, orthogonal = split_gram(gram)
    left = singular_vectors(orthogonal, energies, rank_energy)
    own = orthogonal.diagonal(dim1=1, dim2=2)
    return MergeCoefficients(
        parallel,
        combination_coefficients(left, rows, parallel, consensus),
        orthogonal,
        float((energies - own).sum()),
        float(own.sum()),
    )


def matching_scales(coefficients: Tensor, gram: Tensor, lengths: Tensor) -> Tensor:
    """Find the scale per neuron that gives ψ_⊥ a length.

    Merging shortens: an average of T updates that have nothing in common is √T times shorter than each of them, and
    trimming takes more.

    Args:
        coefficients: a_t, shape (neurons, experts), float64.
        gram: inner products of the orthogonal parts, shape (neurons, experts, experts), float64.
        lengths: the length that each neuron's ψ_⊥ is to have, shape (neurons,).

    Returns:
        Shape (neurons,), float64; 0 where ψ_⊥ is nothing but rounding.
    """
    squares = torch.einsum("ns,nst,nt->n", coefficients, gram, coefficients)
    merged = squares.clamp(min=0).sqrt()
    # Of contributions that cancel out, rounding is left.
    largest = (coefficients.abs() * gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()).sum(dim=1)
    return torch.where(merged > ROUNDING**0.5 * largest, lengths.to(merged) / merged, 0.0)


def gram_matrices(rows: Tensor) -> Tensor:
    """Compute the inner products of each neuron's rows: float64 (neurons, k, k) of float32 (neurons, k, d)."""
    neurons, stacked, width = rows.shape
    device = with_float64(rows.device)
    gram = torch.zeros(neurons, stacked, stacked, dtype=torch.float64, device=device)
    blocks = list(row_blocks(neurons, 8 * stacked * width, bytes_at_once(WIDE_BYTES, device), device))
    if not blocks:
        return gram
    wide = torch.empty(blocks[0].stop, stacked, width, dtype=torch.float64, device=device)
    # Half of a large matrix is the mirror image of the other. For a small one, more products cost more than they save.
    first, second = slice(0, stacked // 2), slice(stacked // 2, stacked)
    halves = [(first, first), (second, second), (first, second)] if stacked >= HALVED else [(slice(None), slice(None))]
    for block in blocks:
        part = wide[: block.stop - block.start].copy_(rows[block])
        for i, j in halves:
            gram[block, i, j] = torch.bmm(part[:, i], part[:, j].transpose(1, 2))
    if stacked >= HALVED:
        gram[:, second, first] = gram[:, first, second].transpose(1, 2)
    return gram


def split_gram(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Split task vectors at their base rows (step 2), in terms of inner products.

    Args:
        gram: inner products of τ_1 … τ_T, w; shape (neurons, experts + 1, experts + 1), float64.

    Returns:
        The coefficients c_t, shape (neurons, experts), and the inner products of the orthogonal parts, shape
        (neurons, experts, experts); an expert without an orthogonal part has zeros there. A neuron whose base row is
        zero has no direction: its coefficients are 0, and everything is orthogonal.
    """
    dots, squared_norms = gram[:, :-1, -1], gram[:, -1:, -1]
    coefficients = torch.where(squared_norms > SMALLEST_NORM**2, dots / squared_norms, 0.0)
    orthogonal = gram[:, :-1, :-1] - coefficients.unsqueeze(2) * dots.unsqueeze(1)
    norms = gram.diagonal(dim1=1, dim2=2)[:, :-1].sqrt()
    # What rounding leaves of experts that are orthogonal to each other would turn their singular vectors anywhere if
    # they are equally strong; what it leaves of an update that is all parallel must score exactly 0 everywhere.
    signal = orthogonal.abs() > ROUNDING * norms.unsqueeze(1) * norms.unsqueeze(2)
    present = signal.diagonal(dim1=1, dim2=2)
    return coefficients, orthogonal * (signal & present.unsqueeze(1) & present.unsqueeze(2))


def singular_vectors(gram: Tensor, energies: Tensor, rank_energy: float = 1.0) -> Tensor:
    """Compute left singular vectors of the stacked orthogonal parts: experts' scores in units of each direction's S_r.

    Args:
        gram: inner products of the orthogonal parts, shape (neurons, experts, experts), float64.
        energies: ‖τ_t‖² before the split, shape (neurons, experts): the scale that tells rounding from signal.
        rank_energy: vectors are used, strongest first, until they hold this share of Σ S².

    Returns:
        U, shape (neurons, experts, experts), the strongest direction first; a direction without energy, one beyond
        `rank_energy` and an entry that is rounding are exactly 0.
    """
    present = gram.diagonal(dim1=1, dim2=2) > 0
    squares, left = torch.linalg.eigh(gram)
    squares, left = squares.flip(1).clamp(min=0), left.flip(2)
    # Rounding of the Gram matrix, seen along each direction. Measured by the experts that make up the direction: one
    # expert may be a thousand times weaker than another in the same neuron, and its direction is no rounding.
    noise = torch.bmm(energies.sqrt().unsqueeze(1), left.abs()).squeeze(1).square()
    used = squares > ROUNDING * noise
    if rank_energy < 1.0:
        before = squares.cumsum(dim=1) - squares
        used &= before < (rank_energy - ROUNDING) * squares.sum(dim=1, keepdim=True)
    return left * (present.unsqueeze(2) & used.unsqueeze(1) & (left.abs() > ROUNDING))


def combination_coefficients(left: Tensor, rows: Tensor, coefficients: Tensor, consensus: str = "mean") -> Tensor:
    """Elect and average the scores (step 4): coefficients a_t with ψ_⊥ = Σ_t a_t τ_⊥,t.

    Scores are reduced in units of S_r: elect and average is homogeneous and compares a row's columns by sign only, so
    s_r / S_r comes out without a division by a small number.

    Args:
        left: U, from `singular_vectors`.
        rows: see `merge_coefficients`; looked at only where a vote is tied.
        coefficients: c_t, from `split_gram`.
        consensus: see `neuron_methods.kernels.elect.reduce_elected`.

    Returns:
        Shape (neurons, experts), float64.
    """
    signs = elect_signs(left.transpose(0, 1), ROUNDING)
    tied = ((signs == 0) & (left != 0).any(dim=1)).any(dim=1)
    if bool(tied.any()):
        sides = _sides(left[tied], rows[tied.to(rows.device)], coefficients[tied])
        left[tied] *= sides.unsqueeze(1)
        signs[tied] *= sides
    reduced = reduce_elected(left.transpose(0, 1), resolve_ties(signs), consensus)
    return torch.bmm(left, reduced.unsqueeze(2)).squeeze(2)


def _sides(left: Tensor, rows: Tensor, coefficients: Tensor) -> Tensor:
    """Which way to turn singular vectors: ±1, shape (neurons, directions).

    A singular vector may point either way. That cancels out of ψ_⊥ except in the tie rule, which asks for signs; there
    v_r is turned to the side of one fixed direction, so that neither the experts' order nor the solver decides.
    """
    golden = (1 + 5**0.5) / 2
    positions = torch.arange(1, rows.shape[2] + 1, dtype=torch.float64, device=left.device)
    projections = rows.to(left) @ (positions * golden % 1)
    orthogonal = projections[:, :-1] - coefficients * projections[:, -1:]
    return torch.where(torch.bmm(orthogonal.unsqueeze(1), left).squeeze(1) < 0, -1.0, 1.0).to(left)
