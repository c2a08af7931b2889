"""Full updates merged by response, a block of neurons at a time.

With the factors of all experts side by side, F of K rows, and c for what each row weighs, kernels/response.py asks for

    Δ = T + Σ_t (Δ_t − T) F_tᵀ W_t,   W = diag(c) F (S + ρ I)⁻¹ = diag(√c) (Q + ρ I)⁻¹ diag(√c) F,

where Q = diag(√c) F Fᵀ diag(√c) is K × K and S = Fᵀ diag(c) F is d × d: the smaller one is solved. W is of inputs
alone, so an update is read twice, once for the rows that stand for its inputs and once to be answered, and a block of
neurons is merged before the next is formed. F_tᵀ W_t is formed where that makes less work.

Systems are float64. The rest is float32, unless `precise`: strong inputs are answered strongly and asked for little, so
that what is added up cancels out little, whatever the condition of the system. (Solved for the answers, it would: of
updates whose singular values fall as 1 / j, 1e-3 of the merge is lost so in float32, where 5e-7 are lost here.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neuron_methods.kernels.experts import (
    DRAWN,
    Expert,
    ResponseOptions,
    coefficients,
    count_rows,
    energy_of,
    inputs_of_update,
    toward_scale,
)
from neuron_methods.kernels.low_rank import LowRank
from neuron_methods.kernels.moments import add_moment, moments_of, wide
from neuron_methods.kernels.products import times
from neuron_methods.kernels.ridge import ROUNDING, Inverse
from neuron_methods.kernels.rows import CACHE_BYTES, row_blocks, sample_rows

# Neurons whose answers stand for those of all, where it is told how much of them is kept.
SAMPLE = 128
# Neurons that are merged at a time, at least: fewer would read W too often.
LEAST = 128
# Scratch memory of products for which there is a slower way, in bytes.
_SCRATCH = 1 << 28


def scratch_bytes(shape: tuple[int, int], experts: int, options: ResponseOptions) -> int:
    """Bound the memory that `merge_blocks` takes where updates stand for inputs, the merged one in float32 included.

    Args:
        shape: (n, d), of the matrix.
        experts: how many.
        options: of which `rows` matters.
    """
    n, d = shape
    rows = options.rows_of(shape)
    count, drawn = experts * rows, min(n, DRAWN * rows) if rows < n else 0
    solved = min(count, d)
    # F and W, as of products in float64, and the update.
    held = 16 * count * d + 4 * n * d
    # Those that are drawn, in two orders, and what they are condensed by; or Q or S, shifted, factored or decomposed,
    # and what is solved for at a time, answers by products, and a block of neurons.
    finding = 8 * drawn * d + 8 * rows * d + 20 * drawn * rows
    solving = 40 * solved**2 + min(24 * count * d, CACHE_BYTES + 24 * max(count, d))
    formed = min(_SCRATCH, 12 * experts * d**2) if count >= d else 0
    block = min(n, max(LEAST, CACHE_BYTES // max(4 * d * (experts + 2), 1)))
    answering = formed + 8 * block * (d * (2 * experts + 4) + 3 * count) + 8 * min(n, SAMPLE) * d * (experts + 3)
    return held + max(finding, solving + answering)


class Answered(NamedTuple):
    """A merged update.

    Attributes:
        update: s Δ, float32 (n, d).
        energy: Σ_t c_t ‖Δ_t F_tᵀ‖²; of a sample of neurons where there are many, in proportion.
        missed: Σ_t c_t ‖(s Δ − Δ_t) F_tᵀ‖², likewise.
        rounding: how far Δ is from exact, in shares of its length, as far as products in float32 make it so.
    """

    update: Tensor
    energy: float
    missed: float
    rounding: float


def merge_blocks(
    experts: Sequence[Expert], shape: tuple[int, int], ridge: float, options: ResponseOptions, precise: bool
) -> Answered:
    """Merge updates of which one at least is full.

    Args:
        experts: those that take part.
        shape: (n, d), of the matrix.
        ridge: ρ in units of the mean of S's diagonal; 0 for a pseudo-inverse.
        options: for the rest.
        precise: multiply in float64.
    """
    inputs = _Inputs.of(experts, shape, options, torch.float64 if precise else torch.float32)
    return inputs.merge(shape[0], ridge, options.toward)


class _Part(NamedTuple):
    """An expert: its share of all weights, where its factors stand in F, and whether it has any update or inputs."""

    expert: Expert
    share: float
    rows: slice
    speaks: bool


class _Inputs(NamedTuple):
    """Inputs of all experts.

    Attributes:
        parts: of each expert.
        factors: F, (K, d).
        weights: c, float64 (K).
    """

    parts: list[_Part]
    factors: Tensor
    weights: Tensor

    @classmethod
    def of(
        cls, experts: Sequence[Expert], shape: tuple[int, int], options: ResponseOptions, dtype: torch.dtype
    ) -> _Inputs:
        """Stack the factors, and weigh them; one that is all zeros says nothing."""
        n, d = shape
        factors = experts[0].rows(slice(0, 0)).new_zeros(count_rows(experts, shape, options), d, dtype=dtype)
        total, start = sum(expert.weight for expert in experts), 0
        parts, weighed = [], []
        for expert in experts:
            first, sizes, energies = start, [], []
            needed = options.loudness == "own" or any(factor is None for factor in expert.inputs)
            own = _own(expert, shape, options) if needed else None
            for factor in expert.inputs:
                given = own if factor is None else factor
                rows = factors[start : start + len(given)]
                rows.copy_(given)
                energies.append(energy_of(rows))
                sizes.append(len(rows))
                start += len(rows)
            loudness = energy_of(own) if options.loudness == "own" else 1.0
            share = expert.weight / total
            for size, weight in zip(sizes, coefficients(share, energies, loudness), strict=True):
                weighed += [weight] * size
            speaks = any(energies) or any(bool(expert.rows(block).any()) for block in _blocks(n, d))
            parts.append(_Part(expert, share, slice(first, start), speaks))
        factors = factors[:start]
        return cls(parts, factors, wide(factors.new_tensor(weighed, dtype=torch.float64)))

    def merge(self, neurons: int, ridge: float, toward: str) -> Answered:
        """See `merge_blocks`."""
        width = self.factors.shape[1]
        scale = toward_scale(toward, (part.share for part in self.parts if part.speaks))
        update = torch.empty(neurons, width, device=self.factors.device)
        index = sample_rows(neurons, SAMPLE).to(update.device)
        samples: list[list[Tensor]] = [[] for _ in self.parts]
        system = _System(self, neurons, ridge)
        size = 0.0
        for block in _blocks(neurons, width * (len(self.parts) + 2)):
            drawn = index[(index >= block.start) & (index < block.stop)] - block.start
            rows = [part.expert.rows(block).to(self.factors) for part in self.parts]
            for kept, row in zip(samples, rows, strict=True):
                kept.append(row[drawn])
            if scale:
                held = torch.zeros_like(rows[0])
                for part, row in zip(self.parts, rows, strict=True):
                    held.add_(row, alpha=scale * part.share)
                rows = [row.sub(held) for row in rows]
            found = system.answer(rows)
            if scale:
                found += held
            elif toward == "zero":
                size += float(times(found, self.factors).square().sum(dim=0).to(self.weights) @ self.weights)
            update[block] = found
        if size:
            # Toward zero s = ⟨Δ, N⟩ / ⟨Δ S, Δ⟩, and N = Δ (S + ρ I).
            update *= 1 + system.rho * float(update.norm()) ** 2 / size
        rounding = system.rounding / (float(update.norm()) or 1.0)
        merged, share = update[index].to(self.factors), neurons / max(len(index), 1)
        energy = missed = 0.0
        for part, kept in zip(self.parts, samples, strict=True):
            own = torch.cat(kept) if kept else merged
            factors, weights = self.factors[part.rows], self.weights[part.rows]
            energy += share * float((own @ factors.T).square().sum(dim=0).to(weights) @ weights)
            missed += share * float(((merged - own) @ factors.T).square().sum(dim=0).to(weights) @ weights)
        return Answered(update, energy, missed, rounding)


class _System:
    """What is asked for of a block of neurons, from what each expert's update differs from T by.

    Attributes:
        rho: ρ.
    """

    def __init__(self, inputs: _Inputs, neurons: int, ridge: float) -> None:
        self._parts, self._factors, self._weights = inputs
        count, width = self._factors.shape
        few = count < width
        self._roots = self._weights.sqrt()
        matrix = self._between_rows() if few else self._between_columns()
        self.rho = ridge * float(matrix.diagonal().sum()) / width
        self._back = self._answers(Inverse(matrix, self.rho), few)
        del matrix
        self._lengths = _columns(self._back.T).to(self._roots)
        self._direct = [self._formed(part, neurons) for part in self._parts]
        self._squares = 0.0

    @property
    def rounding(self) -> float:
        """How far from exact what has been answered is, as a length."""
        return ROUNDING / 2 * self._squares**0.5 if self._factors.dtype == torch.float32 else 0.0

    def answer(self, rows: Sequence[Tensor]) -> Tensor:
        """Give Δ − T of some neurons, (neurons, d), from each expert's Δ_t − T of them."""
        left = rows[0].new_zeros(len(rows[0]), len(self._factors))
        found = torch.zeros_like(rows[0])
        for part, row, direct in zip(self._parts, rows, self._direct, strict=True):
            if direct is None:
                left[:, part.rows] = times(row, self._factors[part.rows])
            else:
                matrix, lengths = direct
                found += times(row, matrix.T)
                self._squares += float(_columns(row).to(lengths) @ lengths)
        if all(direct is not None for direct in self._direct):
            return found
        squares = _columns(left).to(self._roots)
        if self.rho:
            self._squares += float(squares @ self._weights) / self.rho
        self._squares += float(squares @ self._lengths)
        found += times(left, self._back.T)
        return found

    def _between_rows(self) -> Tensor:
        """Q, the lower triangle, float64."""
        matrix = moments_of(len(self._factors), self._factors)
        for columns in row_blocks(self._factors.shape[1], 8 * len(self._factors), CACHE_BYTES):
            add_moment(matrix, self._factors[:, columns].T)
        return matrix.mul_(self._roots).mul_(self._roots[:, None])

    def _between_columns(self) -> Tensor:
        """S, the lower triangle, float64."""
        matrix = moments_of(self._factors.shape[1], self._factors)
        for block in row_blocks(len(self._factors), 8 * self._factors.shape[1], CACHE_BYTES):
            add_moment(matrix, (wide(self._factors[block]) * self._roots[block, None]))
        return matrix

    def _answers(self, inverse: Inverse, few: bool) -> Tensor:
        """W."""
        found = torch.empty_like(self._factors)
        if few:
            for columns in row_blocks(found.shape[1], 24 * len(found), 4 * CACHE_BYTES):
                asked = wide(self._factors[:, columns]) * self._roots[:, None]
                found[:, columns] = inverse.solve(asked).mul_(self._roots[:, None]).to(found)
        else:
            for block in row_blocks(len(found), 24 * found.shape[1], 4 * CACHE_BYTES):
                asked = wide(self._factors[block]) * self._weights[block, None]
                found[block] = inverse.solve(asked.T).T.to(found)
        return found

    def _formed(self, part: _Part, neurons: int) -> tuple[Tensor, Tensor] | None:
        """F_tᵀ W_t, where that makes less work, and the squared lengths of its rows with what rounding adds to them."""
        rows, width = part.rows.stop - part.rows.start, self._factors.shape[1]
        spared = 2 * neurons * rows - neurons * width - width * rows
        if spared <= 0 or 4 * len(self._parts) * width**2 > _SCRATCH:
            return None
        factors = self._factors[part.rows]
        formed = times(factors.T, self._back[part.rows].T)
        lengths = _columns(formed.T) + self._lengths[part.rows].to(factors) @ factors.square()
        return formed, lengths.to(self._lengths)


def _own(expert: Expert, shape: tuple[int, int], options: ResponseOptions) -> Tensor:
    """Find the rows that stand for the inputs of an update."""
    if not isinstance(expert.update, LowRank):
        return inputs_of_update(expert, shape, options)
    return torch.linalg.qr(expert.update.b, mode="r").R @ expert.update.a


def _blocks(neurons: int, entries: int) -> list[slice]:
    """Neurons at a time, for each of which there are so many entries in float32."""
    size = max(LEAST, CACHE_BYTES // max(4 * entries, 1))
    return [slice(start, min(start + size, neurons)) for start in range(0, neurons, size)]


def _columns(matrix: Tensor) -> Tensor:
    """Compute the squared length of each column."""
    return matrix.square().sum(dim=0)
