"""Merging by response: a neuron's update answers inputs as each expert's neuron answers on that expert's own inputs.

For one weight matrix whose n rows are neurons of d inputs, with the experts' updates Δ_t and their weights w_t,

    Δ = argmin Σ_t w_t ‖(Δ − Δ_t) F_tᵀ‖² + ρ ‖Δ − T‖²  =  (N + ρ T) (S + ρ I)⁻¹,
    C_t = F_tᵀ F_t / ‖F_t‖²,   N = Σ_t w_t Δ_t C_t,   S = Σ_t w_t C_t,   ρ = ridge × mean of S's diagonal.

The rows of F_t are inputs of expert t: measured ones, or, as an update is a sum of errors times inputs, those of Δ_t
itself. T is what holds where no expert's inputs say anything: the mean or the sum of the updates, or nothing. Toward
nothing a ridge shrinks, so the merge is s Δ there, with the s that answers best: s = ⟨Δ, N⟩ / ⟨Δ S, Δ⟩; else s is 1.

The objective is that of WUDI-Merging (Cheng et al., ICML 2025, arXiv:2503.08099), which descends to it; ridge 0 and
experts as loud as their updates make it the closed form of ACTMat (arXiv:2604.01329); with measured inputs and ridge 0
it is RegMean (Jin et al., ICLR 2023, arXiv:2212.09849). Ours are the division by ‖F_t‖², the ridge with its scale
undone, T, and what follows.

**Fewer inputs than columns.** With all factors, √(w_t) F_t / ‖F_t‖, stacked to G of K rows, S = GᵀG, and the answers to
them are M = [Δ_1 G_1ᵀ, Δ_2 G_2ᵀ, …], N = M G. Then Δ = T + (M − T Gᵀ)(G Gᵀ + ρ I)⁻¹ G: where K < d, one system of K
equations, and no d × d matrix is made.

**Low rank.** An update Δ_t = B_t A_t stays B_t in front of the formula above for A_t: the merge is Σ_t B_t A'_t, of
rank Σ r_t, whatever the factors are, and is never formed. As F_t of the update itself serves R_t A_t with RᵀR = BᵀB.

**Many neurons.** The rows of an update stand for inputs. More than `rows` of them are first added up at random, with
random signs, to eight times as many, which keeps FᵀF on average whatever the signs (count sketch: Clarkson and
Woodruff, STOC 2013, arXiv:1207.6365); of these the directions in which they are longest are kept (a range finder:
Halko, Martinsson and Tropp, 2011, arXiv:0909.4061). The cost of a matrix is n d × rows then, instead of n d².
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations
from typing import NamedTuple

import torch
from torch import Tensor

from neuron_methods.kernels.answers import merge_blocks
from neuron_methods.kernels.experts import (
    Expert,
    ResponseOptions,
    coefficients,
    count_rows,
    energy_of,
    inputs_of_update,
    taking,
    toward_scale,
)
from neuron_methods.kernels.low_rank import LowRank
from neuron_methods.kernels.moments import add_moment, mirrored, moments_of, wide
from neuron_methods.kernels.ridge import Solved, Spectrum, System
from neuron_methods.kernels.rows import row_blocks

# The ridge where rows of updates stand for inputs, and where inputs were measured.
RIDGE, MEASURED = 0.1, 0.01
# How much firmer adapters whose A have nothing in common are held, see `automatic_ridge`.
_APART = 6.0
# How far a merge may be from exact, in shares of its length.
_EXACT = 1e-5
# A d × d matrix is spent on a faster product up to this size, in bytes.
_SCRATCH = 1 << 28


def automatic_ridge(experts: Sequence[Expert], width: int) -> float:
    """Choose a ridge by what the inputs are worth.

    - 0.01 where inputs were measured;
    - 0.1 where the rows of full updates stand for them;
    - an adapter's factor A has hardly moved from where it was drawn, so its rows say little of the inputs. Where all
      experts have drawn the same one, what their B make of it tells them apart; where they have drawn, or moved, apart,
      that says nothing of whether they share inputs. With `overlap` the share that the rows of two experts' A have in
      common, on average, ρ is then max(0.1, 6 (1 − overlap)) times the strength that an expert's inputs have on average
      in the directions of its A.

    All three were chosen on validation data of the zoos under examples/zoo.

    Args:
        experts: those that take part.
        width: d.
    """
    if any(factor is not None for expert in experts for factor in expert.inputs):
        return MEASURED
    factors = [expert.update.a for expert in experts if isinstance(expert.update, LowRank)]
    touching = [a for a in factors if len(a)]
    if len(factors) < len(experts) or not touching:
        return RIDGE
    strength = width * len(touching) / sum(map(len, touching))
    return max(RIDGE, _APART * (1 - _overlap(touching))) * strength


def _overlap(factors: Sequence[Tensor]) -> float:
    """Compute the share that the row spaces of two factors have in common, from 0 to 1, on average over all pairs."""
    bases = [torch.linalg.qr(wide(a).T).Q for a in factors]
    shares = [
        float((one.T @ other).square().sum()) / min(one.shape[1], other.shape[1])
        for one, other in combinations(bases, 2)
    ]
    return sum(shares) / len(shares) if shares else 1.0


class Response(NamedTuple):
    """A merged update, and how well it answers.

    Attributes:
        update: s Δ, float32 (n, d); `LowRank` where all updates are, with the experts' B_t side by side.
        energy: E = Σ_t w_t ‖Δ_t F_tᵀ‖² / ‖F_t‖², with weights that add up to 1.
        missed: Σ_t w_t ‖(s Δ − Δ_t) F_tᵀ‖² / ‖F_t‖², likewise.
        moments: of a `LowRank` with rows A': s² A' S A'ᵀ, float64 (r, r), what `truncated` weighs directions by.
    """

    update: Tensor | LowRank
    energy: float
    missed: float
    moments: Tensor | None = None


def merge_responses(experts: Sequence[Expert], shape: tuple[int, int], options: ResponseOptions) -> Response:
    """Merge the updates of one matrix.

    Args:
        experts: on one device, at least one of a weight above 0; one of weight 0 takes no part.
        shape: (n, d), of the matrix.
        options: see there.

    Raises:
        ValueError: no expert has a weight above 0.
    """
    chosen = taking(experts)
    ridge = automatic_ridge(chosen, shape[1]) if options.ridge is None else options.ridge
    if all(isinstance(expert.update, LowRank) for expert in chosen):
        system, b = _stacked(chosen, shape, options)
        return _response(system.solve(ridge), system.energy, b)
    if 0 in shape:
        return Response(chosen[0].rows(slice(0, 0)).new_zeros(shape), 0.0, 0.0)
    found = merge_blocks(chosen, shape, ridge, options, precise=ridge == 0)
    if found.rounding > _EXACT:
        found = merge_blocks(chosen, shape, ridge, options, precise=True)
    return Response(found.update, found.energy, found.missed)


def decompose_responses(
    experts: Sequence[Expert], shape: tuple[int, int], options: ResponseOptions
) -> DecomposedResponse:
    """Do all of `merge_responses` that does not depend on the ridge, whatever `options` say of it; arguments alike."""
    chosen = taking(experts)
    system, b = _stacked(chosen, shape, options)
    return DecomposedResponse(
        system.decompose(torch.float32 if b is None else None), automatic_ridge(chosen, shape[1]), b
    )


def decomposed_bytes(experts: Sequence[Expert], shape: tuple[int, int], options: ResponseOptions) -> int:
    """Bound what `decompose_responses` leaves: 4 (n k + k d + n d) bytes, k being d or the number of inputs, if fewer.

    n is the rank of all of them together where all updates are of low rank, in float64.
    """
    n, d = shape
    chosen = taking(experts)
    low = [len(expert.update.a) for expert in chosen if isinstance(expert.update, LowRank)]
    k = min(count_rows(chosen, shape, options), d)
    if len(low) == len(chosen):
        rank = sum(low)
        return 8 * (4 * rank * k + k * d + rank * d + 5 * k) + 4 * n * rank
    return 4 * (n * k + k * d + n * d) + 48 * k


@dataclass(frozen=True)
class DecomposedResponse:
    """The merges of one matrix by all ridges.

    Attributes:
        spectrum: what their system is made of.
        automatic: what `automatic_ridge` says.
        b: the experts' B_t side by side, where all updates are of low rank.
    """

    spectrum: Spectrum
    automatic: float
    b: Tensor | None

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        return self.spectrum.nbytes + (0 if self.b is None else self.b.nbytes)

    def merge(self, ridge: float | None) -> Response:
        """Merge by a ridge, None for the automatic one: products of n × k and k × d, and no system is solved."""
        found = self.spectrum.solve(self.automatic if ridge is None else ridge)
        return _response(found, self.spectrum.energy, self.b)


def _response(solved: Solved, energy: float, b: Tensor | None) -> Response:
    update = solved.update.float() if b is None else LowRank(b, solved.update.to(b))
    return Response(update, energy, solved.missed, solved.moments)


def _stacked(
    chosen: Sequence[Expert], shape: tuple[int, int], options: ResponseOptions
) -> tuple[System, Tensor | None]:
    """Stack what the experts ask for to one system; and their B_t side by side, where all are of low rank."""
    low = [expert.update for expert in chosen if isinstance(expert.update, LowRank)]
    b = torch.cat([update.b for update in low], dim=1) if len(low) == len(chosen) else None
    height, rows, metric = shape[0], [slice(0, shape[0])] * len(chosen), None
    if b is not None:
        ends = list(accumulate(len(update.a) for update in low))
        rows = [slice(end - len(update.a), end) for update, end in zip(low, ends, strict=True)]
        height, metric = b.shape[1], wide(b).T @ wide(b)
    count = count_rows(chosen, shape, options)
    weighing = _Weighing(sum(expert.weight for expert in chosen), options, shape, formed=b is None)
    parts = (weighing.part(expert, part) for expert, part in zip(chosen, rows, strict=True))
    toward = _Toward(height, shape[1], options.toward)
    make = _few if count < shape[1] else _many
    return make(parts, count, toward, metric), b


class _Part(NamedTuple):
    """An expert's share: X_t, the rows of the solution it goes to, its factors √c F_t, and its weight of all."""

    x: Tensor
    rows: slice
    factors: list[tuple[Tensor, float]]
    share: float


def _few(parts: Iterator[_Part], count: int, toward: _Toward, metric: Tensor | None) -> System:
    """Stack to `count` equations: those of inputs."""
    g = m = None
    start, coefficients = 0, []
    for part in parts:
        if g is None or m is None:
            g, m = part.x.new_zeros(count, toward.width), part.x.new_zeros(toward.height, count)
        for factor, coefficient in part.factors:
            block = slice(start, start + len(factor))
            g[block] = factor
            m[part.rows, block] = part.x @ factor.T
            coefficients += [coefficient] * len(factor)
            start = block.stop
        toward.add(part)
    assert g is not None and m is not None
    # Rows of G stay as they were given: rounding √c F would be felt wherever inputs are weak.
    g, t = g[:start], toward.settled()
    gram = add_moment(moments_of(start, g), g.T)
    roots = gram.new_tensor(coefficients).sqrt()
    gram.mul_(roots).mul_(roots[:, None])
    answers = m[:, :start] * roots
    energy = float(((answers if metric is None else metric @ answers) * answers).sum())
    held = None if t is None else t @ g.T * roots
    return System(gram, answers, g, roots, held, t, energy, toward.width, metric)


def _many(parts: Iterator[_Part], count: int, toward: _Toward, metric: Tensor | None) -> System:
    """Stack to d equations: those of columns."""
    width = toward.width
    s = n = None
    energy = 0.0
    for part in parts:
        if s is None or n is None:
            s, n = moments_of(width, part.x), part.x.new_zeros(toward.height, width)
        given = sum(len(factor) for factor, _ in part.factors)
        product = None
        if width < 2 * given and 8 * width**2 <= _SCRATCH:
            product = moments_of(width, part.x)
        for factor, coefficient in part.factors:
            add_moment(s if product is None else product, factor, coefficient)
        if product is not None:
            s += mirrored(product)
        together = [slice(0, len(part.x))]  # a metric weighs all rows by each other
        for block in together if metric is not None else row_blocks(len(part.x), 16 * max(width, 1), _SCRATCH):
            x = part.x[block]
            if product is not None:
                answers = x @ product
            else:
                answers = n.new_zeros(len(x), width)
                for factor, coefficient in part.factors:
                    answers.addmm_(x @ factor.T, factor, alpha=coefficient)
            n[part.rows][block] += answers
            if metric is not None:
                x, answers = metric[part.rows, part.rows] @ x, answers
            energy += float((answers * x).sum())
        toward.add(part)
    assert s is not None and n is not None
    return System(s, n, None, None, None, toward.settled(), energy, width, metric)


class _Toward:
    """Adds up T of the experts' shares: the mean, or the sum, of those that say something; nothing for `zero`."""

    def __init__(self, height: int, width: int, word: str) -> None:
        self.height, self.width = height, width
        self._word = word
        self._sum: Tensor | None = None
        self._speaking: list[float] = []

    def add(self, part: _Part) -> None:
        """Add an expert's share; one with neither update nor inputs does not count."""
        if self._word == "zero":
            return
        if self._sum is None:
            self._sum = part.x.new_zeros(self.height, self.width)
        self._sum[part.rows].add_(part.x, alpha=part.share)
        if part.factors or bool(part.x.any()):
            self._speaking.append(part.share)

    def settled(self) -> Tensor | None:
        """Give T, (height, width), once all have been added; None for `zero`."""
        return None if self._sum is None else self._sum.mul_(toward_scale(self._word, self._speaking))


@dataclass(frozen=True)
class _Weighing:
    """Weighs experts, whose weights add up to `total`; updates are `formed` where not all are of low rank."""

    total: float
    options: ResponseOptions
    shape: tuple[int, int]
    formed: bool

    def part(self, expert: Expert, rows: slice) -> _Part:
        """Form an expert's update, and weigh its factors; one that is all zeros says nothing."""
        x, own = self._update(expert)
        factors = [own if factor is None else wide(factor) for factor in expert.inputs]
        loudness = energy_of(own) if self.options.loudness == "own" else 1.0
        share = expert.weight / self.total
        weights = coefficients(share, [energy_of(factor) for factor in factors], loudness)
        return _Part(x, rows, [(f, weight) for f, weight in zip(factors, weights, strict=True) if weight > 0], share)

    def _update(self, expert: Expert) -> tuple[Tensor, Tensor]:
        """What stands for X_t in the formula, and the update as a factor of its own inputs."""
        if not isinstance(expert.update, LowRank):
            return wide(expert.rows(slice(0, self.shape[0]))), wide(inputs_of_update(expert, self.shape, self.options))
        b, a = wide(expert.update.b), wide(expert.update.a)
        return b @ a if self.formed else a, torch.linalg.qr(b, mode="r").R @ a
