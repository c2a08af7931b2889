"""What a report says of one weight matrix: all of it follows from the inner products of each neuron's rows.

A neuron is a row of a weight matrix, as in `neuron_methods.kernels.rows`. Of neuron i with base weights w the report
looks at the experts' task vectors τ_1 … τ_T, not trimmed, and at δ, what the merge added to w:

    parallel part of x     (x·w)² / w·w of its energy x·x (Fang et al., arXiv:2503.05320, section 3)
    conflict before        two experts pull the neuron opposite ways, τ_s·τ_t < 0; counted for every pair
    conflict after         the merge goes against an expert that changed the neuron, δ·τ_t < 0; for every expert
    kept of expert t       δ·τ_t / τ_t·τ_t: 1 where δ holds the expert's update in full, 0 where nothing of it
    importance to t        ‖τ_t‖ / ‖w‖
    distance to expert t   ‖δ − τ_t‖;  to the base ‖δ‖
    spectrum               shares of the energy of the orthogonal parts along their singular directions

And, of the weight's rows together, with F_t for the inputs of expert t, which the rows of its update stand for:

    response kept          1 − ‖(δ − τ_t) F_tᵀ‖ / ‖τ_t F_tᵀ‖: 1 where the merge answers as the expert, 0 as the base
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from neuron_methods.kernels.rows import add_up, neuron_rows, row_blocks, sample_rows
from neuron_methods.kernels.subspace import ROUNDING, gram_matrices, split_gram
from neuron_methods.kernels.task_vectors import fill_task_vector

# Norm ratio under which a conflict is rounding: of a merge written in bf16, an update of bf16 weights.
CONFLICT_TOLERANCE = 1e-3
# Rows that an expert's update is added up to, where they stand for its inputs.
INPUTS = 128
_SCRATCH = 32 * 1024 * 1024


@dataclass
class WeightStatistics:
    """Sums over the neurons looked at; statistics of several weights add up.

    Attributes:
        neurons: how many.
        products: Σ x·y for x, y of τ_1 … τ_T, δ; shape (T + 1, T + 1), float64.
        base: Σ w·w.
        parallel: Σ (x·w)² / w·w for x of τ_1 … τ_T, δ; shape (T + 1,), float64.
        pairs: pairs of experts that both changed the neuron, over all neurons.
        conflict_before: of those, pairs that pull opposite ways.
        changes: experts that changed the neuron, over all neurons.
        conflict_after: of those, experts that the merge goes against.
        spectrum: Σ of every neuron's energy shares, the strongest direction first; shape (T,), float64.
        with_spectrum: neurons with an orthogonal part at all.
        answered: Σ ‖τ_t F_tᵀ‖², shape (T,), float64.
        missed: Σ ‖(δ − τ_t) F_tᵀ‖², likewise.
        importance: per neuron, shape (T, neurons), float32.
        kept: likewise.
    """

    neurons: int
    products: Tensor
    base: float
    parallel: Tensor
    pairs: int
    conflict_before: int
    changes: int
    conflict_after: int
    spectrum: Tensor
    with_spectrum: int
    answered: Tensor
    missed: Tensor
    importance: Tensor
    kept: Tensor

    def __add__(self, other: WeightStatistics) -> WeightStatistics:
        def both(name: str) -> Any:
            parts = getattr(self, name), getattr(other, name)
            return torch.cat(parts, dim=1) if name in ("importance", "kept") else parts[0] + parts[1]

        return WeightStatistics(**{field.name: both(field.name) for field in fields(self)})

    def to_json(self) -> dict[str, Any]:
        """Tell them as plain lists and numbers, of which `from_json` makes exactly the same."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> WeightStatistics:
        """Make statistics of what `to_json` has told."""
        dtypes = dict.fromkeys(("importance", "kept"), torch.float32)
        return cls(
            **{
                name: torch.tensor(value, dtype=dtypes.get(name, torch.float64)) if isinstance(value, list) else value
                for name, value in told.items()
            }
        )


def weight_statistics(
    base: Tensor, experts: Sequence[Tensor], merged: Tensor, *, limit: int | None = None, packed: bool = False
) -> WeightStatistics:
    """Look at one weight.

    Args:
        base: θ₀, at least 2-D, any float dtype.
        experts: θ_t each, or `TaskVector`s; shape of the base.
        merged: the merge; shape of the base.
        limit: look at this many neurons at most, None for all.
        packed: see `neuron_methods.kernels.rows.neuron_rows`.
    """
    rows = [neuron_rows(tensor, packed=packed) for tensor in (base, *experts, merged)]
    neurons, width = rows[0].shape
    index = sample_rows(neurons, limit).to(base.device)
    count = len(experts) + 2
    inputs = [_inputs(rows[0], expert) for expert in rows[1:-1]]
    total: WeightStatistics | None = None
    for block in row_blocks(len(index), 4 * count * width, _SCRATCH):
        stacked = _stacked(rows, index[block])
        part = replace(of_gram(gram_matrices(stacked)), **_responses(stacked, inputs))
        total = part if total is None else total + part
    return total if total is not None else of_gram(torch.zeros(0, count, count, dtype=torch.float64))


def _inputs(base: Tensor, expert: Tensor) -> Tensor:
    """F_t: rows of an expert's update, added up to a few; float32."""
    sums = torch.zeros(min(INPUTS, len(base)), base.shape[1], device=base.device)
    for block in row_blocks(len(base), 12 * base.shape[1], _SCRATCH):
        origin = base[block].float()
        update = fill_task_vector(torch.empty_like(origin), expert[block], origin, clean=True)
        add_up(sums, block, len(base), update)
    return sums


def _responses(stacked: Tensor, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """`answered` and `missed` of some neurons, whose τ_1 … τ_T, δ, w are `stacked`."""
    merged = stacked[:, -2]
    found = {"answered": [], "missed": []}
    for place, factor in enumerate(inputs):
        own = stacked[:, place]
        for name, rows in (("answered", own), ("missed", merged - own)):
            found[name].append((rows @ factor.T).square().sum(dtype=torch.float64).cpu())
    return {name: torch.stack(values) for name, values in found.items()}


def _stacked(rows: Sequence[Tensor], index: Tensor) -> Tensor:
    """τ_1 … τ_T, δ, w of some neurons, shape (neurons, T + 2, d), float32."""
    origin = rows[0][index].float()
    stacked = origin.new_empty(len(index), len(rows), origin.shape[1])
    for place, tensor in enumerate(rows[1:]):
        fill_task_vector(stacked[:, place], tensor[index], origin)
    stacked[:, -1] = origin
    return stacked.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def of_gram(gram: Tensor) -> WeightStatistics:
    """Derive what inner products tell, of τ_1 … τ_T, δ, w; shape (neurons, T + 2, T + 2), float64.

    Responses are of all neurons together, and 0 here.
    """
    gram = gram.cpu()
    energies = gram.diagonal(dim1=1, dim2=2)
    base, merged, own = energies[:, -1], energies[:, -2], energies[:, :-2]
    squares = gram[:, :-1, -1].square() / base.clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(1)
    present = own > 0
    both = (present.unsqueeze(1) & present.unsqueeze(2)).triu(diagonal=1)
    norms = own.sqrt()
    opposed = gram[:, :-2, :-2] < -CONFLICT_TOLERANCE * norms.unsqueeze(1) * norms.unsqueeze(2)
    against = gram[:, :-2, -2] < -CONFLICT_TOLERANCE * norms * merged.sqrt().unsqueeze(1)
    without_merge = [i for i in range(gram.shape[1]) if i != gram.shape[1] - 2]
    _, orthogonal = split_gram(gram[:, without_merge][:, :, without_merge])
    squared = torch.linalg.eigvalsh(orthogonal).flip(1).clamp(min=0)
    sums = squared.sum(dim=1, keepdim=True)
    found = sums.squeeze(1) > ROUNDING * own.sum(dim=1)
    return WeightStatistics(
        neurons=len(gram),
        products=gram[:, :-1, :-1].sum(dim=0),
        base=float(base.sum()),
        parallel=squares.sum(dim=0),
        pairs=int(both.sum()),
        conflict_before=int((opposed & both).sum()),
        changes=int(present.sum()),
        conflict_after=int((against & present).sum()),
        spectrum=(squared[found] / sums[found]).sum(dim=0),
        with_spectrum=int(found.sum()),
        answered=torch.zeros(gram.shape[1] - 2, dtype=torch.float64),
        missed=torch.zeros(gram.shape[1] - 2, dtype=torch.float64),
        importance=(norms / base.sqrt().clamp(min=1e-30).unsqueeze(1)).T.float(),
        kept=torch.where(present, gram[:, :-2, -2] / own.clamp(min=1e-300), 0.0).T.float(),
    )


def cosines(products: Tensor) -> Tensor:
    """Derive cosines of vectors from their inner products, shape (k, k); 0 for a vector of zeros."""
    norms = products.diagonal().sqrt()
    return products / (norms.unsqueeze(0) * norms.unsqueeze(1)).clamp(min=1e-300)


def distances(products: Tensor) -> Tensor:
    """Derive the merge's distance to the base and to each expert, shape (T + 1,), from `WeightStatistics.products`."""
    own = products.diagonal()
    to_experts = own[-1] - 2 * products[-1, :-1] + own[:-1]
    return torch.cat([own[-1:], to_experts]).clamp(min=0).sqrt()


def response_kept(answered: Tensor, missed: Tensor) -> Tensor:
    """Compute 1 − ‖(δ − τ_t) F_tᵀ‖ / ‖τ_t F_tᵀ‖ from sums of squares, shape (T,); 1 for an expert without update."""
    return torch.where(answered > 0, 1 - (missed / answered.clamp(min=1e-300)).sqrt(), 1.0)


def top_share(values: Tensor, share: float) -> Tensor:
    """Tell which of the values belong to the top `share` of them, bool; none where all are 0."""
    count = max(1, round(share * len(values)))
    threshold = values.topk(count).values[-1] if len(values) else 0.0
    return (values >= threshold) & (values > 0)


def overlap(first: Tensor, second: Tensor) -> float:
    """Compute the share that two sets have in common of all that is in either (Jaccard); 0 where both are empty."""
    either = int((first | second).sum())
    return int((first & second).sum()) / either if either else 0.0
