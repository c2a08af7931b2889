"""Neuronal subspaces: split task vectors of neurons at their base weights and merge the parts.

Fang et al., EMNLP 2025, arXiv:2503.05320. Let w be the base weights of a neuron (one row of a weight matrix) and τ_t
the trimmed task vector of expert t for it:

    τ_∥,t = (τ_t·w / w·w) w         how much more sensitive the neuron becomes to the input it already reads
    τ_⊥,t = τ_t − τ_∥,t             what new input it learns to read

The experts' orthogonal parts, stacked to a T × d matrix with singular value decomposition U S Vᵀ, are scored on each
right singular vector (T × r matrix U S); every column is elected and averaged to one score s_r, and
ψ_⊥ = Σ_r s_r v_r. As v_r = Σ_t U_tr τ_⊥,t / S_r, the merge is a combination of the experts' own rows,

    ψ_⊥ = Σ_t a_t τ_⊥,t,   a_t = Σ_r (s_r / S_r) U_tr,

and U and S come from the T × T Gram matrix of the τ_⊥,t. That in turn comes from inner products of the undivided rows:

    τ_⊥,s · τ_⊥,t = τ_s·τ_t − (τ_s·w)(τ_t·w) / w·w.

So one Gram matrix of the T + 1 rows τ_1 … τ_T, w per neuron holds all that steps 2 to 4 need, and the merged neuron is
one combination of these rows. No d-dimensional decomposition is made, and no row is split in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_methods.kernels.elect import elect_and_reduce

# The Gram matrix is accumulated in float32; below these bounds a number is rounding, not signal.
# Share of an expert's energy in a neuron under which it has no orthogonal part, and share of the strongest singular
# direction's energy under which a direction is empty:
ENERGY_TOLERANCE = 1e-5
# Share of a singular vector an expert must hold to have a score on it: one unit in the last place of float32. Experts
# that read disjoint inputs (zero inner product) would otherwise score ±1e-17 on each other's direction and be counted
# in the average, which changes it by a factor. Larger bounds lose true scores: experts that overlap only through their
# parallel parts hold shares of 1e-6.
SCORE_TOLERANCE = 2.0**-23


def gram_matrices(rows: Tensor) -> Tensor:
    """Inner products of the rows that belong to one neuron.

    Args:
        rows: shape (neurons, rows, d), float32: the task vectors of the experts, then the base weights.

    Returns:
        Shape (neurons, rows, rows), float64.
    """
    gram = torch.bmm(rows, rows.transpose(1, 2))
    # float64 is what keeps the small eigenproblems exact; Metal has none, so they are solved on the CPU there.
    return gram.to("cpu" if gram.device.type == "mps" else gram.device, torch.float64)


def split_gram(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Split the task vectors of each neuron at its base weights, in terms of inner products.

    Args:
        gram: from `gram_matrices`, shape (neurons, experts + 1, experts + 1), the base weights last.

    Returns:
        Coefficients c_t = τ_t·w / w·w of the parallel parts, shape (neurons, experts), and the Gram matrices of the
        orthogonal parts, shape (neurons, experts, experts), both float64. A zero base row has no direction: there
        c_t = 0, and everything is orthogonal.
    """
    dots, squared_norm = gram[:, :-1, -1], gram[:, -1:, -1]
    coefficients = torch.where(squared_norm > 0, dots / squared_norm, 0.0)
    return coefficients, gram[:, :-1, :-1] - coefficients.unsqueeze(2) * dots.unsqueeze(1)


def combination_coefficients(
    gram: Tensor, energies: Tensor, *, rank_energy: float = 1.0, consensus: str = "mean"
) -> Tensor:
    """Coefficients a_t with ψ_⊥ = Σ_t a_t τ_⊥,t.

    Args:
        gram: Gram matrices of the orthogonal parts, shape (neurons, experts, experts), float64.
        energies: ‖τ_t‖² before the split, shape (neurons, experts): the scale that tells rounding from signal.
        rank_energy: singular vectors are used, strongest first, until they hold this share of Σ S².
        consensus: see `neuron_methods.kernels.elect.reduce_elected`.

    Returns:
        Shape (neurons, experts), float64.
    """
    own = gram.diagonal(dim1=1, dim2=2)
    present = own > ENERGY_TOLERANCE * energies.to(own)
    # An expert with nothing in this neuron must score exactly 0 everywhere: clear what rounding left of it.
    gram = gram * (present.unsqueeze(1) & present.unsqueeze(2))
    eigenvalues, u = torch.linalg.eigh(gram)
    eigenvalues, u = eigenvalues.flip(1).clamp(min=0), u.flip(2)
    used = eigenvalues > ENERGY_TOLERANCE * eigenvalues[:, :1]
    if rank_energy < 1.0:
        before = eigenvalues.cumsum(dim=1) - eigenvalues
        used &= before < rank_energy * eigenvalues.sum(dim=1, keepdim=True)
    u = u * (present.unsqueeze(2) & used.unsqueeze(1) & (u.abs() > SCORE_TOLERANCE))
    # Scores in units of each direction's own S_r: elect and average is homogeneous, but a row's columns are only
    # compared by sign, so dividing by S_r first gives s_r / S_r without dividing by a small number.
    reduced = elect_and_reduce(u.permute(1, 0, 2), consensus, SCORE_TOLERANCE)
    return (u * reduced.unsqueeze(1)).sum(dim=2)
