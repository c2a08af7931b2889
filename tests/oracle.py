"""NeuroMerging written down from its formulas: what the kernels are tested against and measured against.

Fang et al., EMNLP 2025, arXiv:2503.05320. Plain and slow on purpose, and independent of the package: float64, sorting
for the threshold, a real singular value decomposition of every neuron's T × d matrix. Task vectors are differences in
float32 as the method defines them; everything after that is float64 unless `dtype` says otherwise.

Where the formulas leave the result open: a singular vector may point either way, which matters to ties only. Here it
points to the side of a direction fixed once for all, so that the experts' order does not decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Below this share of the largest number it is compared with, a float64 number is rounding.
ROUNDING = 1e-13


def task_vector(expert: Tensor, base: Tensor) -> Tensor:
    """τ = θ_t − θ₀ in float32, held in float64."""
    return (expert.to(torch.float32) - base.to(torch.float32)).to(torch.float64)


def threshold(task_vectors: Sequence[Tensor], density: float) -> float:
    """The ⌊n·(1−density)⌋-th smallest |τ| of one expert's tensors; 0.0 where that rank is 0."""
    magnitudes = torch.cat([tau.flatten() for tau in task_vectors]).abs()
    rank = int(len(magnitudes) * (1 - density))
    return float(magnitudes.sort().values[rank - 1]) if rank else 0.0


def sigma(task_vectors: Sequence[Tensor], smallest_kept: float) -> float:
    """L1 norm of what trimming removes / L1 norm of the task vector."""
    magnitudes = torch.cat([tau.flatten() for tau in task_vectors]).abs()
    total = float(magnitudes.sum())
    return float(magnitudes[magnitudes < smallest_kept].sum()) / total if total else 0.0


def trim(tau: Tensor, smallest_kept: float) -> Tensor:
    """Zero where |τ| is below the threshold."""
    return torch.where(tau.abs() >= smallest_kept, tau, 0.0)


def elect_and_reduce(values: Sequence[Sequence[float]], consensus: str = "mean") -> list[float]:
    """Elect and average one row, value by value. `values[t][k]` is expert t's k-th value of the row."""
    columns = list(zip(*values, strict=True))
    signs = [(total > 0) - (total < 0) for total in map(sum, columns)]
    majority = 1 if sum(signs) > 0 else -1
    reduced = []
    for column, sign in zip(columns, signs, strict=True):
        carrying = [value for value in column if value * (sign or majority) > 0]
        total = sum(carrying)
        reduced.append(total if consensus == "sum" or not carrying else total / len(carrying))
    return reduced


def elect_and_reduce_rows(values: Tensor, consensus: str = "mean", tie: float = 0.0) -> Tensor:
    """The same for many rows at once: `values` of shape (experts, rows, row), result (rows, row)."""
    total = values.sum(0)
    signs = torch.where(total.abs() <= tie, 0.0, total).sign()
    majority = signs.sum(1, keepdim=True).sign()
    majority[majority == 0] = -1
    signs = torch.where(signs == 0, majority, signs)
    carrying = values * signs > 0
    result = (values * carrying).sum(0)
    if consensus == "mean":
        count = carrying.sum(0)
        count[count == 0] = 1
        result = result / count
    return result


def split(tau: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficient of the parallel part and the orthogonal part of one row's task vector."""
    squared_norm = w @ w
    coefficient = tau @ w / squared_norm if squared_norm > 0 else torch.zeros((), dtype=tau.dtype)
    return coefficient, tau - coefficient * w


def orthogonal_parts(updates: Tensor, base: Tensor) -> Tensor:
    """τ_⊥ of many neurons: shapes (rows, experts, d) and (rows, d)."""
    rows = []
    for taus, w in zip(updates, base, strict=True):
        left = [split(tau, w)[1] for tau in taus]
        # What is left of an update that lay along the base weights is rounding, and not a part of its own.
        rows.append([rest * (rest.norm() > ROUNDING * tau.norm()) for tau, rest in zip(taus, left, strict=True)])
    return torch.stack([torch.stack(row) for row in rows])


def sides(width: int) -> Tensor:
    """The direction that singular vectors point to the side of: fractional parts of multiples of the golden ratio."""
    golden = (1 + 5**0.5) / 2
    return torch.tensor([(index + 1) * golden % 1 for index in range(width)], dtype=torch.float64)


def merge_orthogonal(
    orthogonal: Tensor, *, rank_energy: float = 1.0, consensus: str = "mean", rounding: float = ROUNDING
) -> Tensor:
    """ψ_⊥ of many neurons: shape (rows, experts, d) to (rows, d), by a batched singular value decomposition."""
    _, s, vh = torch.linalg.svd(orthogonal, full_matrices=False)
    vh = vh * torch.where((vh @ sides(vh.shape[-1]).to(vh)) < 0, -1.0, 1.0).to(vh).unsqueeze(2)
    scores = orthogonal @ vh.transpose(1, 2)
    norms = orthogonal.square().sum(2, keepdim=True).sqrt()
    scores = torch.where(scores.abs() > rounding * norms, scores, 0.0)
    used = s > rounding * s[:, :1]
    if rank_energy < 1:
        energies = s.square()
        used &= energies.cumsum(1) - energies < rank_energy * energies.sum(1, keepdim=True)
    scores = scores * used.unsqueeze(1)
    # A sum of scores is a tie where it is rounding in comparison with the scores themselves.
    scale = scores.abs().amax(1, keepdim=True)
    relative = scores / torch.where(scale > 0, scale, 1.0)
    reduced = elect_and_reduce_rows(relative.transpose(0, 1), consensus, rounding) * scale.squeeze(1)
    return (reduced.unsqueeze(1) @ vh).squeeze(1)


def merge_points(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    thresholds: Sequence[float],
    weights: Sequence[float],
    lambda_orthogonal: float,
    consensus: str = "mean",
) -> Tensor:
    """Steps 1, 5 and 6 for a 0-D or 1-D tensor, with λ₂."""
    trimmed = [
        weight * trim(task_vector(expert, base), at).flatten()
        for expert, at, weight in zip(experts, thresholds, weights, strict=True)
    ]
    psi = torch.tensor(elect_and_reduce([row.tolist() for row in trimmed], consensus), dtype=torch.float64)
    return base.to(torch.float64) + lambda_orthogonal * psi.reshape(base.shape)


def merge_points_in_full_mode(
    base: Tensor, experts: Sequence[Tensor], *, lambda_parallel: float, lambda_orthogonal: float, **options: Any
) -> Tensor:
    """The same with both scales: one half of ψ goes with λ₁, the other with λ₂ (Fang et al., merging_methods.py)."""
    half = (merge_points(base, experts, lambda_orthogonal=1.0, **options) - base.to(torch.float64)) / 2
    return base.to(torch.float64) + lambda_parallel * half + lambda_orthogonal * half


def merge_rows(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    thresholds: Sequence[float],
    weights: Sequence[float],
    lambda_orthogonal: float,
    lambda_parallel: float = 0.0,
    rank_energy: float = 1.0,
    spectral_exponent: float = 1.0,
    consensus: str = "mean",
) -> Tensor:
    """Steps 1 to 4 and 6 for a matrix (neurons, d)."""
    w = base.to(torch.float64)
    updates = torch.stack(
        [
            weight * trim(task_vector(expert, base), at)
            for expert, at, weight in zip(experts, thresholds, weights, strict=True)
        ]
    )
    coefficients = [[float(split(tau, row)[0]) for tau, row in zip(update, w, strict=True)] for update in updates]
    reduced = torch.tensor(elect_and_reduce(coefficients, consensus), dtype=torch.float64)
    orthogonal = orthogonal_parts(updates.transpose(0, 1), w)
    psi = merge_orthogonal(orthogonal, rank_energy=rank_energy, consensus=consensus)
    if spectral_exponent != 1:
        u, s, vh = torch.linalg.svd(psi, full_matrices=False)
        powers = torch.where(s > 1e-6 * s[0], s, 0.0).pow(spectral_exponent) * (s > 1e-6 * s[0])
        tempered = (u * (powers * s.norm() / powers.norm())) @ vh
        psi = orthogonal_parts(tempered.unsqueeze(1), w).squeeze(1)
    return w + lambda_parallel * reduced.unsqueeze(1) * w + lambda_orthogonal * psi


def merge_model(
    base: dict[str, Tensor],
    experts: Sequence[dict[str, Tensor]],
    *,
    density: float = 0.15,
    weights: Sequence[float] | None = None,
    lambda_orthogonal: float | None = None,
    lambda_parallel: float = 0.0,
    rank_energy: float = 1.0,
    spectral_exponent: float = 1.0,
    consensus: str = "mean",
    lambda_points: str = "orthogonal",
) -> dict[str, Tensor]:
    """All six steps for tensors of up to two dimensions, one threshold per expert over all; λ₂ None is automatic."""
    updates = [[task_vector(expert[name], base[name]) for name in base] for expert in experts]
    thresholds = [threshold(update, density) for update in updates]
    if lambda_orthogonal is None:
        largest = max(sigma(update, at) for update, at in zip(updates, thresholds, strict=True))
        lambda_orthogonal = 1 / (1 - largest) if consensus == "mean" else 1.0
    shared = {
        "thresholds": thresholds,
        "weights": weights or [1.0] * len(experts),
        "lambda_orthogonal": lambda_orthogonal,
        "consensus": consensus,
    }
    of_rows = {
        "lambda_parallel": lambda_parallel,
        "rank_energy": rank_energy,
        "spectral_exponent": spectral_exponent,
    }
    merged = {}
    for name, tensor in base.items():
        others = [expert[name] for expert in experts]
        if tensor.ndim >= 2:
            merged[name] = merge_rows(tensor, others, **shared, **of_rows)
        elif lambda_points == "mean":
            merged[name] = merge_points_in_full_mode(tensor, others, lambda_parallel=lambda_parallel, **shared)
        else:
            merged[name] = merge_points(tensor, others, **shared)
    return merged
