"""Updates of low rank, and what to leave of them where fewer directions are wanted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_methods.kernels.moments import wide

# Share of an update's length that counts beside what it answers, where it is truncated: directions that no input asks
# for go by it.
_LENGTH = 1e-9


@dataclass(frozen=True)
class LowRank:
    """An update B·A.

    Attributes:
        b: (n, r), float32.
        a: (r, d), float32.
    """

    b: Tensor
    a: Tensor

    def dense(self) -> Tensor:
        """Form B·A, float32 (n, d)."""
        return self.b @ self.a


def truncated(update: LowRank, moments: Tensor, rank: int | None, share: float | None) -> tuple[LowRank, float]:
    """Find the update of lower rank that answers most alike, on the inputs that were merged by.

    ‖(Δ − Δ') S^½‖ is smallest where Δ' is Δ projected to the strongest left singular vectors of Δ S^½.

    Args:
        update: Δ = B·A'.
        moments: A' S A'ᵀ, of `Response`.
        rank: at most; None for no bound but that of the matrix.
        share: of ‖Δ S^½‖² to keep at least; None to go by rank alone.

    Returns:
        Δ', of rank 1 at least, and the share of ‖Δ S^½‖² that it keeps.
    """
    most = min(len(update.b), update.a.shape[1])
    if share is None and len(update.a) <= min(most, rank or most):
        return update, 1.0
    directions, triangle = torch.linalg.qr(wide(update.b))
    a = update.a.to(triangle)
    answers = triangle @ moments.to(triangle) @ triangle.T
    lengths = triangle @ (a @ a.T) @ triangle.T
    strength = sum(m / m.trace().clamp(min=1e-300) * part for m, part in ((answers, 1.0), (lengths, _LENGTH)))
    vectors = torch.linalg.eigh(strength).eigenvectors.flip(1)
    values = (vectors * (answers @ vectors)).sum(dim=0).clamp(min=0)
    total = float(values.sum())
    kept = min(rank or most, most, len(values))
    if share is not None and total > 0:
        kept = min(kept, int(torch.searchsorted(values.cumsum(0), share * total * (1 - 1e-9))) + 1)
    chosen = vectors[:, :kept]
    b, a = directions @ chosen, chosen.T @ triangle @ a
    # Each factor takes the root of a direction's length, so that neither is lost in a narrow dtype.
    roots = a.norm(dim=1, keepdim=True).sqrt().clamp(min=1e-30)
    reduced = LowRank((b * roots.T).to(update.b), (a / roots).to(update.a))
    return reduced, float(values[:kept].sum()) / total if total > 0 else 1.0
