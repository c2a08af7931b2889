"""Least squares with a ridge: one symmetric system for all rows of a matrix, for one ridge or for all of them.

What `response` asks for is Δ(ρ) = T + L (Q + ρ I)⁻¹ R, with

    Q = G Gᵀ, L = M − T Gᵀ, R = G      where there are fewer inputs, the rows of G, than columns,
    Q = S,    L = N − T S,  R = I      elsewhere.

For one ridge Q + ρ I is factored by Cholesky (for full updates see kernels/answers.py, which holds no L). For all of
them Q = U diag(q) Uᵀ is decomposed once, and Δ(ρ) = T + (L U) diag(1 / (q + ρ)) (Uᵀ R). All of it is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_methods.kernels.rows import row_blocks

# Without a ridge, singular values of the stacked factors up to this share of the largest, times their number, are taken
# for 0, as the pseudo-inverse of a float32 matrix takes them.
ROUNDING = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Solved:
    """Δ, and how it answers; all of it by the metric of `System`.

    Attributes:
        update: s Δ, (height, d).
        missed: Σ_t w_t ‖(s Δ − Δ_t) F_tᵀ‖² / ‖F_t‖².
        moments: s² Δ S Δᵀ, float64, where there is a metric.
    """

    update: Tensor
    missed: float
    moments: Tensor | None


class Inverse:
    """(Q + ρ I)⁻¹, or the pseudo-inverse of Q for a ρ of 0."""

    def __init__(self, matrix: Tensor, rho: float) -> None:
        """Factor Q + ρ I by Cholesky, or, where that fails and for a ρ of 0, decompose Q.

        Args:
            matrix: Q, float64 (k, k), the lower triangle.
            rho: ρ, at least 0.
        """
        self._lower = None
        if rho > 0:
            shifted = matrix.clone()
            shifted.diagonal().add_(rho)
            lower, failed = torch.linalg.cholesky_ex(shifted)
            self._lower = None if int(failed) else lower
        if self._lower is None:
            values, self._vectors, used = eigen(matrix)
            self._inverse = torch.where(used | (rho > 0), 1 / (values + rho), 0.0)

    def solve(self, right: Tensor) -> Tensor:
        """Multiply (k, m), float64, by it."""
        if self._lower is not None:
            return torch.cholesky_solve(right, self._lower)
        return self._vectors @ (self._inverse[:, None] * (self._vectors.T @ right))


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose Q, the lower triangle: its values, at least 0, its vectors, and which a pseudo-inverse takes."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0)
    return values, vectors, values > (ROUNDING * len(values)) ** 2 * values.max() if len(values) else values > 0


@dataclass(frozen=True)
class System:
    """What all experts of one matrix ask for together.

    Attributes:
        matrix: Q, float64 (k, k), the lower triangle.
        wanted: M, or N, float64 (height, k).
        back: G without the scales of its rows, (k, d); None where Q is S.
        roots: these scales, float64 (k).
        held: T Gᵀ, float64 (height, k), where there are both.
        toward: T, (height, d); None for zero, which ridges shrink to: s undoes that.
        energy: Σ_t w_t ‖Δ_t F_tᵀ‖² / ‖F_t‖².
        width: d.
        metric: BᵀB, float64 (height, height), where what is merged is B·Δ, not Δ.
        scratch: bytes that products of rows may take.
    """

    matrix: Tensor
    wanted: Tensor
    back: Tensor | None
    roots: Tensor | None
    held: Tensor | None
    toward: Tensor | None
    energy: float
    width: int
    metric: Tensor | None
    scratch: int = 1 << 28

    @property
    def unit(self) -> float:
        """ρ for a ridge of 1: the mean of S's diagonal."""
        return float(self.matrix.diagonal().sum()) / max(self.width, 1)

    def solve(self, ridge: float) -> Solved:
        """Find s Δ for one ridge, in units of the mean of S's diagonal; 0 for the pseudo-inverse."""
        rho = ridge * self.unit
        if rho <= 0:
            return self.decompose().solve(ridge)
        inverse = Inverse(self.matrix, rho)
        if self.back is None:
            # Δ S = N + ρ (T − Δ), and what is answered is ⟨Δ S, Δ⟩.
            right = self.wanted.clone() if self.toward is None else self.wanted.add(self.toward, alpha=rho)
            found = inverse.solve(right.T).T
            answers, update = right.sub_(found, alpha=rho), found
        else:
            # Δ Gᵀ = M − ρ L (Q + ρ I)⁻¹
            found = inverse.solve((self.wanted if self.held is None else self.wanted - self.held).T).T
            update = (found * self.roots) @ self.back
            if self.toward is not None:
                update += self.toward
            answers = found = self.wanted.sub(found, alpha=rho)
        size, answered = self._inner(answers, found), self._inner(found, self.wanted)
        moments = answers @ found.T if self.metric is not None else None
        return _scaled(update, self.energy, answered, size, self.toward is None, moments)

    def decompose(self, dtype: torch.dtype | None = None) -> Spectrum:
        """Decompose Q, once for all ridges.

        Args:
            dtype: to keep what has a row per neuron or a column per input in. Directions that Q does not mix lose
                nothing by float32 but their own last digits.
        """
        dtype = dtype or self.wanted.dtype
        values, vectors, used = eigen(self.matrix)
        left = torch.empty(len(self.wanted), len(values), dtype=dtype, device=self.wanted.device)
        squares = values.new_zeros(3, len(values))
        answers = None
        roots = values.sqrt()
        for block in self._blocks():
            rotated = self.wanted[block] @ vectors
            own = torch.zeros_like(rotated)
            if self.toward is None:
                pass
            elif self.back is not None:
                own = self.held[block] @ vectors
                rotated -= own
            else:
                own = self.toward[block] @ vectors
                rotated.addcmul_(own, values, value=-1)
                own *= roots
            # Of an input that is not used nothing but rounding is left.
            rotated *= used
            left[block] = rotated.to(left)
            if self.back is None:
                rotated = torch.where(used, rotated / roots, 0.0)
            for sums, (x, y) in zip(squares, ((own, own), (own, rotated), (rotated, rotated)), strict=True):
                sums += (self._by_metric(x) * y).sum(dim=0)
            answers = (own, rotated)
        right = vectors.T if self.back is None else (vectors.T * self.roots) @ self.back
        return Spectrum(
            values,
            used,
            left,
            right.to(left, copy=True),
            None if self.toward is None else self.toward.to(left),
            squares,
            self.energy,
            self.unit,
            answers if self.metric is not None else None,
        )

    def _blocks(self) -> list[slice]:
        """Rows to be solved for at a time; all of them where they are weighed by a metric."""
        if self.metric is not None:
            return [slice(0, len(self.wanted))]
        return list(row_blocks(len(self.wanted), 8 * 4 * max(len(self.matrix), 1), self.scratch))

    def _by_metric(self, x: Tensor) -> Tensor:
        return x if self.metric is None else self.metric @ x

    def _inner(self, x: Tensor, y: Tensor) -> float:
        """⟨x, y⟩, or ⟨B x, B y⟩."""
        return float((self._by_metric(x) * y).sum())


@dataclass(frozen=True)
class Spectrum:
    """A system for all ridges.

    Attributes:
        values: q, float64 (k), at least 0.
        used: which of them a pseudo-inverse takes.
        left: L U, (height, k).
        right: Uᵀ R, (k, d).
        toward: T, (height, d); None for zero.
        squares: of the columns of T Gᵀ U, these times L U, and of L U, in units of answers, float64 (3, k).
        energy: as of `System`.
        unit: ρ for a ridge of 1.
        answers: T Gᵀ U and L U in units of answers, float64 (height, k), where there is a metric.
    """

    values: Tensor
    used: Tensor
    left: Tensor
    right: Tensor
    toward: Tensor | None
    squares: Tensor
    energy: float
    unit: float
    answers: tuple[Tensor, Tensor] | None

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        held = (self.values, self.used, self.left, self.right, self.toward, self.squares, *(self.answers or ()))
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def solve(self, ridge: float) -> Solved:
        """Find s Δ for one ridge, as `System.solve` does."""
        rho = ridge * self.unit
        inverse = torch.where(self.used | (rho > 0), 1 / (self.values + rho), 0.0)
        update = (self.left * inverse.to(self.left)) @ self.right
        if self.toward is not None:
            update += self.toward
        share = self.values * inverse
        own, crossing, given = self.squares
        size = float((own + 2 * crossing * share + given * share**2).sum())
        answered = float((own + crossing + (crossing + given) * share).sum())
        moments = None
        if self.answers is not None:
            answers = self.answers[0] + self.answers[1] * share
            moments = answers @ answers.T
        return _scaled(update, self.energy, answered, size, self.toward is None, moments)


def _scaled(
    update: Tensor, energy: float, answered: float, size: float, shrunk: bool, moments: Tensor | None
) -> Solved:
    """Undo what a ridge toward zero has shrunk: s = ⟨Δ, N⟩ / ⟨Δ S, Δ⟩; where nothing is answered, nothing was."""
    scale = answered / size if size > 0 and shrunk else 1.0
    missed = energy - 2 * scale * answered + scale**2 * size
    return Solved(update.mul_(scale), max(missed, 0.0), None if moments is None else moments.mul_(scale**2))
