"""Merging by response: a neuron's update answers inputs as each expert's neuron answers on that expert's own inputs.

For one weight matrix whose n rows are neurons of d inputs, with the experts' updates Δ_t and their weights w_t,

    Δ = argmin Σ_t w_t ‖(Δ − Δ_t) F_tᵀ‖² + ρ ‖Δ − T‖²  =  (N + ρ T) (S + ρ I)⁻¹,
    C_t = F_tᵀ F_t / ‖F_t‖²,   N = Σ_t w_t Δ_t C_t,   S = Σ_t w_t C_t,   ρ = ridge × mean of S's diagonal.

The rows of F_t are inputs of expert t: measured ones, or, as an update is a sum of errors times inputs, those of Δ_t
itself. T is what holds where no expert's inputs say anything: nothing, or the mean or the sum of the updates. A ridge
shrinks, so the merge is s Δ, with the s that answers best: s = ⟨Δ, N⟩ / ⟨Δ S, Δ⟩.

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
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Without a ridge, eigenvalues up to this share of the largest, times the number of equations, are taken for 0, as the
# pseudo-inverse of a float32 matrix takes them.
ROUNDING = torch.finfo(torch.float32).eps
# Condition up to which a system is solved in float32.
_CONDITION = 1e6
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
        ridge: ρ in units of the mean of S's diagonal; 0 for a pseudo-inverse.
        toward: T: ``zero``, or the ``mean`` or the ``sum`` of the updates, by weight; of one expert both are its own.
        loudness: ``equal``, or ``own``: an expert counts by ‖Δ_t‖², too.
        rows: of an update that stand for its inputs, at most; 0 for all.
    """

    ridge: float = 0.1
    toward: str = "zero"
    loudness: str = "equal"
    rows: int = 0


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
        experts: at least one, on one device; one of weight 0 takes no part.
        shape: (n, d), of the matrix.
        options: see there.
    """
    taking = [expert for expert in experts if expert.weight > 0]
    if not taking:
        return Response(torch.zeros(shape), 0.0, 0.0)
    low = [expert.update for expert in taking if isinstance(expert.update, LowRank)]
    factored = len(low) == len(taking)
    if factored:
        b = torch.cat([update.b for update in low], dim=1)
        ends = torch.tensor([len(update.a) for update in low]).cumsum(0).tolist()
        rows = [slice(end - len(update.a), end) for update, end in zip(low, ends, strict=True)]
        system = _System(b.shape[1], shape[1], options, b.T @ b)
    else:
        rows = [slice(0, shape[0])] * len(taking)
        system = _System(shape[0], shape[1], options, None)
    most = 0 if factored else options.rows
    own = [min(most or shape[0], part.stop - part.start) for part in rows]
    count = sum(n if f is None else len(f) for e, n in zip(taking, own, strict=True) for f in e.inputs)
    total = sum(expert.weight for expert in taking)
    parts = (_part(expert, part, total, len(taking), options) for expert, part in zip(taking, rows, strict=True))
    found = system.few(parts, count) if count < shape[1] else system.many(parts)
    return found._replace(update=LowRank(b, found.update)) if factored else found


def truncated(update: LowRank, moments: Tensor, rank: int | None, share: float | None) -> tuple[LowRank, float]:
    """Find the update of lower rank that answers most alike, on the inputs that were merged by.

    ‖(Δ − Δ') S^½‖ is smallest where Δ' is Δ projected to the strongest left singular vectors of Δ S^½.

    Args:
        update: Δ = B·A'.
        moments: A' S A'ᵀ, of `Response`.
        rank: at most; None for no bound.
        share: of ‖Δ S^½‖² to keep at least; None to go by rank alone.

    Returns:
        Δ', of rank 1 at least, and the share of ‖Δ S^½‖² that it keeps.
    """
    if share is None and (rank is None or rank >= len(update.a)):
        return update, 1.0
    directions, triangle = torch.linalg.qr(_wide(update.b))
    values, vectors = torch.linalg.eigh(triangle @ moments.to(triangle) @ triangle.T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    total = float(values.sum())
    kept = min(rank or len(values), len(values))
    if share is not None and total > 0:
        kept = min(kept, int(torch.searchsorted(values.cumsum(0), share * total * (1 - 1e-9))) + 1)
    chosen = vectors[:, :kept]
    b, a = directions @ chosen, chosen.T @ triangle @ update.a.to(triangle)
    # Each factor takes the root of a direction's length, so that neither is lost in a narrow dtype.
    roots = a.norm(dim=1, keepdim=True).sqrt().clamp(min=1e-30)
    reduced = LowRank((b * roots.T).to(update.b), (a / roots).to(update.a))
    return reduced, float(values[:kept].sum()) / total if total > 0 else 1.0


class _Part(NamedTuple):
    """An expert's share: X_t, the rows of the solution it goes to, its factors √c F_t and its coefficient in T."""

    x: Tensor
    rows: slice
    factors: list[tuple[Tensor, float]]
    toward: float


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
            if toward is not None:
                toward[part.rows].add_(part.x, alpha=part.toward)
        assert g is not None and m is not None
        g, m = g[:start], m[:, :start]
        gram = g @ g.T
        ridge = self.options.ridge * float(gram.diagonal().sum()) / self.width
        own = None if toward is None else toward @ g.T
        solved = _solve(gram.clone(), ridge, m if own is None else m - own)
        answers = solved @ gram
        merged = solved @ g
        if own is not None and toward is not None:
            answers += own
            merged += toward
        size = self._inner(answers, answers)
        return self._scaled(
            merged, self._inner(m, m), self._inner(answers, m), size, lambda: _wide(answers) @ _wide(answers).T
        )

    def many(self, parts: Iterator[_Part]) -> Response:
        """Solve in the space of all inputs: d equations."""
        s = n = toward = None
        energy = 0.0
        for part in parts:
            if s is None or n is None:
                s, n = part.x.new_zeros(self.width, self.width), part.x.new_zeros(self.height, self.width)
                toward = self._toward(part.x)
            for factor, coefficient in part.factors:
                if self.width < 2 * len(factor) and 4 * self.width**2 <= _SCRATCH:
                    product = factor.T @ factor
                    s.add_(product, alpha=coefficient)
                    answers = part.x @ product
                    del product
                else:
                    s.addmm_(factor.T, factor, alpha=coefficient)
                    answers = (part.x @ factor.T) @ factor
                n[part.rows].add_(answers, alpha=coefficient)
                energy += coefficient * self._inner(answers, part.x, part.rows)
                del answers
            if toward is not None:
                toward[part.rows].add_(part.x, alpha=part.toward)
        assert s is not None and n is not None
        ridge = self.options.ridge * float(s.diagonal().sum()) / self.width
        right = n if toward is None else toward.mul_(ridge).add_(n)
        merged = _solve(s, ridge, right)
        # Δ S = N + ρ (T − Δ): S itself has gone into its factors.
        size = self._inner(merged, right) - ridge * self._inner(merged, merged)
        answered = self._inner(merged, n)
        return self._scaled(
            merged, energy, answered, size, lambda: _wide(right.sub_(merged, alpha=ridge)) @ _wide(merged).T
        )

    def _toward(self, like: Tensor) -> Tensor | None:
        return None if self.options.toward == "zero" else like.new_zeros(self.height, self.width)

    def _scaled(
        self, update: Tensor, energy: float, answered: float, size: float, moments: Callable[[], Tensor]
    ) -> Response:
        """Undo what the ridge has shrunk: s = ⟨Δ, N⟩ / ⟨Δ S, Δ⟩; where nothing is answered, nothing was shrunk."""
        scale = answered / size if size > 0 else 1.0
        missed = energy - answered**2 / size if size > 0 else energy
        weighing = moments().mul_(scale**2) if self.metric is not None else None
        return Response(update.mul_(scale), energy, max(missed, 0.0), weighing)

    def _inner(self, x: Tensor, y: Tensor, rows: slice = slice(None)) -> float:
        """⟨x, y⟩, or ⟨B x, B y⟩ over the columns `rows` of B."""
        return float(((x if self.metric is None else self.metric[rows, rows] @ x) * y).sum(dtype=torch.float64))


def _part(expert: Expert, rows: slice, total: float, count: int, options: ResponseOptions) -> _Part:
    """Form an expert's update, and weigh its factors; one that is all zeros says nothing."""
    x, own = _update(expert.update, options.rows)
    factors = [own if factor is None else factor.to(x) for factor in expert.inputs]
    energies = [_energy(factor) for factor in factors]
    speaking = [(factor, energy) for factor, energy in zip(factors, energies, strict=True) if energy > 0]
    loudness = _energy(own) if options.loudness == "own" else 1.0
    share = expert.weight / total
    weighed = [(factor, share * loudness / (len(speaking) * energy)) for factor, energy in speaking]
    return _Part(x, rows, weighed, share * (count if options.toward == "sum" else 1))


def _update(update: LowRank | Callable[[], Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """What stands for X_t in the formula, and the update as a factor of its own inputs."""
    if not isinstance(update, LowRank):
        dense = update()
        return dense, added_up(dense, rows)
    values, vectors = torch.linalg.eigh((update.b.T @ update.b).double().to("cpu"))
    root = (vectors * values.clamp(min=0).sqrt()).T
    return update.a, root.to(update.a) @ update.a


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
    generator = torch.Generator().manual_seed(count)
    places = torch.randperm(count, generator=generator).remainder(rows)[block].to(inputs.device)
    signs = torch.randint(0, 2, (count, 1), generator=generator)[block].mul(2).sub(1).to(inputs)
    return sums.index_add_(0, places, inputs * signs)


def _solve(matrix: Tensor, ridge: float, right: Tensor) -> Tensor:
    """Compute right · (matrix + ridge I)⁻¹, the matrix symmetric and positive semidefinite; overwrites the matrix."""
    trace = float(matrix.diagonal().sum(dtype=torch.float64))
    if trace == 0:
        return torch.zeros_like(right) if ridge == 0 else right / ridge
    if ridge > 0:
        matrix.diagonal().add_(ridge)
        for wide in (False, True):
            if not wide and trace > _CONDITION * ridge:
                continue
            system = _wide(matrix) if wide else matrix
            lower, failed = torch.linalg.cholesky_ex(system)
            if not int(failed):
                return torch.cholesky_solve(right.T.to(lower), lower).T.to(right)
        matrix.diagonal().sub_(ridge)
    values, vectors = torch.linalg.eigh(_wide(matrix))
    used = values > ROUNDING * len(values) * values[-1]
    inverse = torch.where(used, 1 / (values + ridge), 0.0)
    return ((right.to(vectors) @ vectors * inverse) @ vectors.T).to(right)


def _wide(tensor: Tensor) -> Tensor:
    """In float64; on the CPU for Metal, which has none."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def _energy(tensor: Tensor) -> float:
    """Compute ‖·‖²."""
    return float(tensor.square().sum(dtype=torch.float64))
