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

**Many neurons.** The rows of an update stand for inputs; more of them than `rows` are added up at random, with random
signs, to so many. Whatever the signs, that keeps FᵀF on average (count sketch: Clarkson and Woodruff, STOC 2013,
arXiv:1207.6365), and makes the cost of a matrix n d × rows instead of n d².
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from neuron_methods.kernels.rows import added_up

# Without a ridge, singular values of the stacked factors up to this share of the largest, times their number, are taken
# for 0, as the pseudo-inverse of a float32 matrix takes them.
ROUNDING = torch.finfo(torch.float32).eps
# The ridge where rows of updates stand for inputs, and where inputs were measured.
RIDGE, MEASURED = 0.1, 0.01
# The condition of a system is at most its width / ridge. Up to this one, and from this ridge on, float32 will do.
_CONDITION, _RIDGE = 2e5, 0.01
# Share of an update's length that counts beside what it answers, where it is truncated: directions that no input asks
# for go by it.
_LENGTH = 1e-9
# A d × d matrix is spent on a faster product up to this size, in bytes.
_SCRATCH = 1 << 28


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


@dataclass(frozen=True)
class Expert:
    """One expert's part in a matrix.

    Attributes:
        update: Δ_t of low rank, or what gives it as float32 (n, d); called once.
        weight: w_t, at least 0; only ratios matter.
        inputs: factors F_t, each (rows, d) of any float dtype, which count alike; None stands for the update itself.
            What is all zeros says nothing.
    """

    update: LowRank | Callable[[], Tensor]
    weight: float = 1.0
    inputs: Sequence[Tensor | None] = (None,)


@dataclass(frozen=True)
class ResponseOptions:
    """What merging by response takes beside the experts.

    Attributes:
        ridge: ρ in units of the mean of S's diagonal; 0 for a pseudo-inverse; None for `automatic_ridge`.
        toward: T: ``zero``, or the ``mean`` or the ``sum`` of the updates, by weight; of one expert both are its own.
            An expert with neither update nor measured inputs does not count.
        loudness: ``equal``, or ``own``: an expert counts by ‖Δ_t‖², too.
        rows: of an update that stand for its inputs, at most; 0 for all.
    """

    ridge: float | None = None
    toward: str = "mean"
    loudness: str = "equal"
    rows: int = 0


def automatic_ridge(experts: Sequence[Expert], width: int) -> float:
    """Choose a ridge by what the inputs are worth.

    - 0.01 where inputs were measured;
    - 0.1 where the rows of full updates stand for them;
    - an adapter's factor A has hardly moved from where it was drawn, so its rows say little of the inputs, and nothing
      of whether two experts share them. ρ is then twice the strength that an expert's inputs have on average in the
      directions of its A, and what answers is nearer to the mean the more experts there are.

    All three were chosen on validation data of the zoos under examples/zoo.

    Args:
        experts: those that take part.
        width: d.
    """
    if any(factor is not None for expert in experts for factor in expert.inputs):
        return MEASURED
    ranks = [len(expert.update.a) for expert in experts if isinstance(expert.update, LowRank)]
    touching = [rank for rank in ranks if rank]
    if len(ranks) < len(experts) or not touching:
        return RIDGE
    return 2.0 * width * len(touching) / sum(touching)


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
    taking = [expert for expert in experts if expert.weight > 0]
    if not taking:
        raise ValueError("all experts weigh 0")
    if options.ridge is None:
        options = replace(options, ridge=automatic_ridge(taking, shape[1]))
    assert options.ridge is not None
    wide = options.ridge < _RIDGE or shape[1] > options.ridge * _CONDITION
    low = [expert.update for expert in taking if isinstance(expert.update, LowRank)]
    b = torch.cat([update.b for update in low], dim=1) if len(low) == len(taking) else None
    if b is not None:
        ends = list(accumulate(len(update.a) for update in low))
        rows = [slice(end - len(update.a), end) for update, end in zip(low, ends, strict=True)]
        metric = _wide(b).T @ _wide(b) if wide else b.T @ b
        system = _System(b.shape[1], shape[1], options, metric)
    else:
        rows = [slice(0, shape[0])] * len(taking)
        system = _System(shape[0], shape[1], options, None)
    dense = min(options.rows or shape[0], shape[0])
    own = [len(e.update.a) if isinstance(e.update, LowRank) else dense for e in taking]
    count = sum(n if f is None else len(f) for e, n in zip(taking, own, strict=True) for f in e.inputs)
    total = sum(expert.weight for expert in taking)
    weighing = _Weighing(total, options, formed=b is None, wide=wide)
    parts = (weighing.part(expert, part) for expert, part in zip(taking, rows, strict=True))
    found = system.few(parts, count) if count < shape[1] else system.many(parts)
    if b is not None:
        return found._replace(update=LowRank(b, found.update.to(b)))
    return found._replace(update=found.update.float())


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
    directions, triangle = torch.linalg.qr(_wide(update.b))
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


class _Part(NamedTuple):
    """An expert's share: X_t, the rows of the solution it goes to, its factors √c F_t, and its weight of all."""

    x: Tensor
    rows: slice
    factors: list[tuple[Tensor, float]]
    share: float


@dataclass(frozen=True)
class _System:
    """Solves for Y, of `height` rows, where the merge is Y, or B·Y with BᵀB = `metric`."""

    height: int
    width: int
    options: ResponseOptions
    metric: Tensor | None

    def few(self, parts: Iterator[_Part], count: int) -> Response:
        """Solve in the span of the inputs: `count` equations."""
        g = m = toward = None
        speaking: list[float] = []
        start = 0
        for part in parts:
            if g is None or m is None:
                g, m = part.x.new_zeros(count, self.width), part.x.new_zeros(self.height, count)
                toward = self._toward(part.x)
            for factor, coefficient in part.factors:
                block = slice(start, start + len(factor))
                torch.mul(factor, coefficient**0.5, out=g[block])
                m[part.rows, block] = part.x @ g[block].T
                start = block.stop
            speaking += self._add(toward, part)
        assert g is not None and m is not None
        self._settle(toward, speaking)
        g, m = g[:start], m[:, :start]
        gram = g @ g.T
        ridge = self.options.ridge * float(gram.diagonal().sum()) / max(self.width, 1)
        own = None if toward is None else toward @ g.T
        solved = _solve(gram.clone(), ridge, m if own is None else m - own)
        answers = solved @ gram
        merged = solved @ g
        if own is not None and toward is not None:
            answers += own
            merged += toward
        size = self._inner(answers, answers)
        return self._scaled(merged, self._inner(m, m), self._inner(answers, m), size, (answers, answers))

    def many(self, parts: Iterator[_Part]) -> Response:
        """Solve in the space of all inputs: d equations."""
        s = n = toward = None
        speaking: list[float] = []
        energy = 0.0
        for part in parts:
            if s is None or n is None:
                s, n = part.x.new_zeros(self.width, self.width), part.x.new_zeros(self.height, self.width)
                toward = self._toward(part.x)
            given = sum(len(factor) for factor, _ in part.factors)
            if self.width < 2 * given and 4 * self.width**2 <= _SCRATCH:
                product = part.x.new_zeros(self.width, self.width)
                for factor, coefficient in part.factors:
                    product.addmm_(factor.T, factor, alpha=coefficient)
                s += product
                answers = part.x @ product
                del product
            else:
                answers = torch.zeros_like(part.x)
                for factor, coefficient in part.factors:
                    s.addmm_(factor.T, factor, alpha=coefficient)
                    answers.addmm_(part.x @ factor.T, factor, alpha=coefficient)
            n[part.rows].add_(answers)
            energy += self._inner(answers, part.x, part.rows)
            del answers
            speaking += self._add(toward, part)
        assert s is not None and n is not None
        self._settle(toward, speaking)
        ridge = self.options.ridge * float(s.diagonal().sum()) / max(self.width, 1)
        if ridge > 0 and self.options.ridge <= 1:
            right = n if toward is None else toward.mul_(ridge).add_(n)
            merged = _solve(s, ridge, right)
            answered = self._inner(merged, n)
            # Δ S = N + ρ (T − Δ): S itself has gone into its factors.
            answers = right.sub_(merged, alpha=ridge)
        else:  # where that is lost in rounding, or T has to be kept from what S answers
            right = n if toward is None else torch.addmm(n, toward, s, alpha=-1)
            merged = _solve(s.clone(), ridge, right)
            if toward is not None:
                merged += toward
            answered, answers = self._inner(merged, n), merged @ s
        return self._scaled(merged, energy, answered, self._inner(merged, answers), (answers, merged))

    def _toward(self, like: Tensor) -> Tensor | None:
        return None if self.options.toward == "zero" else like.new_zeros(self.height, self.width)

    def _add(self, toward: Tensor | None, part: _Part) -> list[float]:
        """Add an expert's share to T; returns the share, or nothing of an expert with neither update nor inputs."""
        if toward is not None:
            toward[part.rows].add_(part.x, alpha=part.share)
        return [part.share] if part.factors or bool(part.x.any()) else []

    def _settle(self, toward: Tensor | None, speaking: Sequence[float]) -> None:
        """Make T of the shares added up: the mean, or the sum, of those that say something."""
        if toward is not None and speaking:
            toward.mul_((len(speaking) if self.options.toward == "sum" else 1) / sum(speaking))

    def _scaled(
        self, update: Tensor, energy: float, answered: float, size: float, moments: tuple[Tensor, Tensor]
    ) -> Response:
        """Undo what a ridge toward zero has shrunk: s = ⟨Δ, N⟩ / ⟨Δ S, Δ⟩; where nothing is answered, nothing was.

        `moments` are two factors of Δ S Δᵀ.
        """
        scale = answered / size if size > 0 and self.options.toward == "zero" else 1.0
        missed = energy - 2 * scale * answered + scale**2 * size
        weighing = _wide(moments[0]) @ _wide(moments[1]).T * scale**2 if self.metric is not None else None
        return Response(update.mul_(scale), energy, max(missed, 0.0), weighing)

    def _inner(self, x: Tensor, y: Tensor, rows: slice = slice(None)) -> float:
        """⟨x, y⟩, or ⟨B x, B y⟩ over the columns `rows` of B."""
        return float(((x if self.metric is None else self.metric[rows, rows] @ x) * y).sum(dtype=torch.float64))


@dataclass(frozen=True)
class _Weighing:
    """Weighs experts, whose weights add up to `total`; updates are `formed` where not all are of low rank."""

    total: float
    options: ResponseOptions
    formed: bool
    wide: bool

    def part(self, expert: Expert, rows: slice) -> _Part:
        """Form an expert's update, and weigh its factors; one that is all zeros says nothing."""
        x, own = self._update(expert.update)
        factors = [own if factor is None else factor.to(x) for factor in expert.inputs]
        energies = [_energy(factor) for factor in factors]
        speaking = [(factor, energy) for factor, energy in zip(factors, energies, strict=True) if energy > 0]
        loudness = _energy(own) if self.options.loudness == "own" else 1.0
        share = expert.weight / self.total
        weighed = [(factor, share * loudness / (len(speaking) * energy)) for factor, energy in speaking]
        return _Part(x, rows, weighed, share)

    def _update(self, update: LowRank | Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """What stands for X_t in the formula, and the update as a factor of its own inputs."""
        if not isinstance(update, LowRank):
            dense = self._fitting(update())
            return dense, added_up(dense, self.options.rows)
        b, a = self._fitting(update.b), self._fitting(update.a)
        return b @ a if self.formed else a, torch.linalg.qr(b, mode="r").R @ a

    def _fitting(self, tensor: Tensor) -> Tensor:
        return _wide(tensor) if self.wide else tensor


def _solve(matrix: Tensor, ridge: float, right: Tensor) -> Tensor:
    """Compute right · (matrix + ridge I)⁻¹, the matrix symmetric and positive semidefinite; overwrites the matrix."""
    if not bool(matrix.any()):
        return torch.zeros_like(right)
    if ridge > 0:
        matrix.diagonal().add_(ridge)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            return torch.cholesky_solve(right.T, lower).T
        matrix.diagonal().sub_(ridge)
    values, vectors = torch.linalg.eigh(_wide(matrix))
    used = values > (ROUNDING * len(values)) ** 2 * values[-1]
    inverse = torch.where(used, 1 / (values + ridge), 0.0)
    return ((right.to(vectors) @ vectors * inverse) @ vectors.T).to(right)


def _wide(tensor: Tensor) -> Tensor:
    """In float64; on the CPU for Metal, which has none."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def _energy(tensor: Tensor) -> float:
    """Compute ‖·‖²."""
    return float(tensor.square().sum(dtype=torch.float64))
