"""Two small factors for a large update: truncated SVD, by rank or by energy.

The best approximation of rank r to ΔW = U S Vᵀ in the Frobenius norm keeps the r largest singular values (Eckart and
Young, 1936); its squared error is the energy Σ σᵢ² of those left out. Small matrices are decomposed exactly, through
the eigenvalues of the smaller Gram matrix in float64; for large ones the dominant subspace is found by random
projection with power iterations (Halko, Martinsson and Tropp, 2011, arXiv:0909.4061, algorithms 4.4 and 5.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The smaller side up to which a matrix is decomposed exactly: some seconds on a laptop's cores.
EXACT_LIMIT = 2048
# Directions drawn beyond the rank, and power iterations: errors stay within a percent of the best for spectra that
# fall slowly, which merged updates have.
_OVERSAMPLING = 16
_POWER_ITERATIONS = 3


@dataclass(frozen=True)
class Factors:
    """ΔW ≈ B·A.

    Attributes:
        a: (r, in), in the dtype asked for.
        b: (out, r), likewise.
        energy: ‖ΔW‖², squared Frobenius norm of what was factored.
        error: ‖ΔW − B·A‖², measured with the factors as they are, rounding included.
    """

    a: Tensor
    b: Tensor
    energy: float
    error: float

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.a.shape[0]

    @property
    def energy_kept(self) -> float:
        """Share of the update's energy that B·A keeps; 1 for an update of zeros."""
        return 1.0 - self.error / self.energy if self.energy > 0 else 1.0


def factor(
    update: Tensor,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype = torch.float32,
    exact_limit: int = EXACT_LIMIT,
    seed: int = 0,
) -> Factors:
    """Factor an update; each factor takes the square root of the singular values.

    Args:
        update: ΔW, shape (out, in), any float dtype.
        rank: r at most; fewer where the update has fewer directions.
        energy: share of ‖ΔW‖² to keep at least, in (0, 1]; with `rank`, whichever asks for less.
        dtype: of the factors.
        exact_limit: decompose exactly where the smaller side is at most this.
        seed: of the random projection.

    Returns:
        Factors of rank 1 at least.
    """
    update = update.float()
    total = float(update.double().square().sum())
    most = min(update.shape)
    wanted = most if rank is None else max(1, min(rank, most))
    if total == 0.0:
        empty = update.new_zeros(1, max(update.shape), dtype=dtype)
        return Factors(empty[:, : update.shape[1]], empty[:, : update.shape[0]].T.contiguous(), 0.0, 0.0)
    if most <= exact_limit:
        directions, values = _exact(update, wanted)
    elif energy is None:
        directions, values = _randomised(update, wanted, seed)
    else:
        directions, values = _until(update, energy * total, wanted, seed)
    kept = _count(values, total, energy, wanted)
    return _split(update, directions[:, :kept], values[:kept], total, dtype)


def _exact(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(right singular vectors as columns, squared singular values), largest first, of the smaller side's space.

    For more rows than columns the vectors are of the input space, else of the output space.
    """
    tall = update.shape[0] >= update.shape[1]
    matrix = (update if tall else update.T).double()
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    return vectors.flip(1)[:, :rank], values.flip(0)[:rank].clamp_(min=0)


def _randomised(update: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """As `_exact`, of a random subspace that holds the dominant directions."""
    tall = update.shape[0] >= update.shape[1]
    matrix = update if tall else update.T
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    basis = torch.randn(matrix.shape[0], width, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix.T @ basis).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ basis).Q).Q
    projected = (matrix @ basis).double()
    values, vectors = torch.linalg.eigh(projected.T @ projected)
    return (basis.double() @ vectors.flip(1))[:, :rank], values.flip(0)[:rank].clamp_(min=0)


def _until(update: Tensor, energy: float, limit: int, seed: int) -> tuple[Tensor, Tensor]:
    """As `_randomised`, of a rank that doubles until its directions hold `energy`."""
    rank = min(64, limit)
    while True:
        # Towards full rank the exact way is the shorter one.
        found = _exact(update, limit) if 4 * rank > min(update.shape) else _randomised(update, rank, seed)
        if float(found[1].sum()) >= energy or found[1].numel() >= limit:
            return found
        rank = min(2 * rank, limit)


def _count(values: Tensor, total: float, energy: float | None, rank: int) -> int:
    """Number of directions to keep: no more than hold the energy, and none that is only rounding."""
    resolved = int((values > values[0] * (torch.finfo(torch.float32).eps ** 2)).sum())
    count = min(rank, max(1, resolved))
    if energy is not None:
        sums = values.cumsum(0)
        enough = int(torch.searchsorted(sums, min(energy * total, float(sums[-1])))) + 1
        count = min(count, enough)
    return count


def _split(update: Tensor, directions: Tensor, values: Tensor, total: float, dtype: torch.dtype) -> Factors:
    tall = update.shape[0] >= update.shape[1]
    matrix = update if tall else update.T
    roots = values.sqrt().sqrt().clamp_(min=1e-30)
    # ΔW V = U S: what the directions give is divided between the factors evenly.
    given = (matrix.double() @ directions) / roots
    taken = (directions * roots).T
    b, a = (given, taken) if tall else (taken.T, given.T)
    a, b = a.to(dtype).contiguous(), b.to(dtype).contiguous()
    error = float((update - b.float() @ a.float()).double().square().sum())
    return Factors(a, b, total, error)


def relative_error(energy: float, error: float) -> float:
    """Compute ‖ΔW − B·A‖ / ‖ΔW‖ from the squares; 0 for an update of zeros."""
    return math.sqrt(error / energy) if energy > 0 else 0.0
