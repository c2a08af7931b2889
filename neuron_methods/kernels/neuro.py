"""The steps of NeuroMerging for one tensor: trim, split, merge the parts, scale (arXiv:2503.05320).

`neuron_methods.methods.neuro_merging` lists the steps, and the choices that are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_methods.kernels.devices import with_float64
from neuron_methods.kernels.differing import keep_differing_, largest_left_out, variances
from neuron_methods.kernels.elect import elect_and_reduce
from neuron_methods.kernels.rows import CACHE_BYTES, row_blocks
from neuron_methods.kernels.spectrum import WIDE_BYTES, remove_parallel_, temper_spectrum_
from neuron_methods.kernels.subspace import gram_matrices, matching_scales, merge_coefficients, split_gram
from neuron_methods.kernels.task_vectors import fill_task_vector
from neuron_methods.kernels.trim import trim_


@dataclass(frozen=True)
class NeuroOptions:
    """What the steps take beside tensors.

    Attributes:
        thresholds: smallest kept magnitude per expert.
        weights: factor per expert after trimming; an expert of weight 0 takes no part.
        lambda_orthogonal: λ₂, or ``norm``: see `neuron_methods.kernels.subspace.matching_scales`.
        lambda_parallel: λ₁; 0 spares step 3.
        rank_energy: see `neuron_methods.kernels.subspace.combination_coefficients`.
        spectral_exponent: see `neuron_methods.kernels.spectrum.temper_spectrum_`; other than 1, λ₂ ψ_⊥ of the whole
            tensor is held in float32, beyond `scratch_bytes`.
        consensus: see `neuron_methods.kernels.elect.reduce_elected`.
        allow_nonfinite: treat a NaN or infinite update as no update; entries that the base itself holds so stay as they
            are, and the rest of their neurons is merged without them.
        differing_density: share of the tensor's entries kept, those in which the experts that take part differ most;
            below 1, their variances are held in float32, beyond `scratch_bytes`.
        scratch_bytes: bound on scratch memory.
    """

    thresholds: Sequence[float]
    weights: Sequence[float]
    lambda_orthogonal: float | str
    lambda_parallel: float = 0.0
    rank_energy: float = 1.0
    spectral_exponent: float = 1.0
    consensus: str = "mean"
    allow_nonfinite: bool = False
    differing_density: float = 1.0
    scratch_bytes: int = 1 << 28

    @property
    def voters(self) -> list[int]:
        """Which experts take part; all where none does, as then nothing is merged."""
        return [t for t, weight in enumerate(self.weights) if weight != 0] or list(range(len(self.weights)))


def merge_points(base: Tensor, experts: Sequence[Tensor], merged: Tensor, options: NeuroOptions) -> None:
    """Take steps 1, 5 and 6 for point weights: tensors without neurons.

    Args:
        base: 0-D or 1-D weights, any float dtype.
        experts: the experts' weights, shape of the base.
        merged: receives θ₀ + λ₂ ψ; shape of the base, any float dtype.
        options: those that concern single neurons have no say.
    """
    origin = base.reshape(-1).float()
    task_vectors = origin.new_empty(len(experts), len(origin))
    scale = options.lambda_orthogonal
    lengths = origin.new_zeros(()) if scale == "norm" else None
    for t, expert in enumerate(experts):
        _fill_trimmed(task_vectors[t], expert.reshape(-1), origin, t, options, lengths)
    if options.differing_density < 1:
        spread = variances(task_vectors[options.voters])
        keep_differing_(task_vectors, spread, largest_left_out(spread.clone(), options.differing_density))
    psi = elect_and_reduce(task_vectors, options.consensus)
    if lengths is not None:
        norm = psi.norm().item() * len(options.voters)
        scale = lengths.item() / norm if norm > 0 else 0.0
    merged.view(-1).copy_(origin.add(psi, alpha=scale))


def merge_neurons(
    base: Tensor, experts: Sequence[Tensor], merged: Tensor, options: NeuroOptions
) -> tuple[float, float]:
    """Take steps 1 to 4 and 6 for a matrix whose rows are neurons, in blocks of rows.

    Args:
        base: weights, shape (neurons, d), any float dtype.
        experts: the experts' weights, shape of the base.
        merged: receives θ₀ + λ₁ ψ_∥ + λ₂ ψ_⊥; shape of the base, any float dtype.
        options: all of them.

    Returns:
        (Σ_t ‖τ_∥,t‖², Σ_t ‖τ_⊥,t‖²): energy of the trimmed updates in each subspace.
    """
    neurons, width = base.shape
    count = len(experts)
    # Stacked rows and merged row in float32, and some eight matrices of inner products in float64.
    bytes_per_neuron = 4 * width * (count + 2) + 64 * (count + 1) ** 2
    # A third of the bound: where it is small, a whole block's float64 copy takes twice as much again.
    blocks = list(row_blocks(neurons, bytes_per_neuron, options.scratch_bytes // 3, base.device))
    if not width or not blocks:
        return 0.0, 0.0
    scratch = torch.empty(blocks[0].stop, count + 1, width, dtype=torch.float32, device=base.device)

    matched = options.lambda_orthogonal == "norm"
    lengths = torch.zeros(blocks[0].stop, dtype=torch.float32, device=base.device) if matched else None

    def trimmed(block: slice) -> Tensor:
        rows = scratch[: block.stop - block.start]
        w = rows[:, -1].copy_(base[block])
        of_rows = lengths[: len(rows)].zero_() if lengths is not None else None
        for t, expert in enumerate(experts):
            _fill_trimmed(rows[:, t], expert[block], w, t, options, of_rows)
        if options.allow_nonfinite:
            w.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        if selected is not None:
            keep_differing_(rows[:, :-1], variances(rows[:, options.voters]), selected)
        return rows

    selected = None
    if options.differing_density < 1:
        spread = torch.empty(neurons, width, dtype=torch.float32, device=base.device)
        for block in blocks:
            spread[block] = variances(trimmed(block)[:, options.voters])
        selected = largest_left_out(spread, options.differing_density)
        del spread
    own = torch.ones(neurons, dtype=torch.float64, device=with_float64(base.device))
    if options.lambda_parallel != 0:
        # Ties among the coefficients look at all neurons of the tensor, so every neuron's come first.
        coefficients = torch.cat([split_gram(gram_matrices(trimmed(block)))[0] for block in blocks])
        # float32 makes equal what differs by float64 rounding alone: ties stay ties in any order of the experts.
        own += options.lambda_parallel * elect_and_reduce(coefficients.T.float(), options.consensus)
    tempered = options.spectral_exponent != 1
    # A spectrum is of all neurons together: λ₂ ψ_⊥ is gathered first, and added to the base afterwards.
    target = torch.empty(neurons, width, dtype=torch.float32, device=base.device) if tempered else merged
    parallel_energy = orthogonal_energy = 0.0
    for block in blocks:
        rows = trimmed(block)
        solved = merge_coefficients(rows, rank_energy=options.rank_energy, consensus=options.consensus)
        # θ₀ + λ₂ Σ_t a_t (τ_t − c_t w) + λ₁ c w, as one combination of the rows τ_1 … τ_T, w.
        if lengths is not None:
            wanted = lengths[: len(rows)].to(solved.gram) / len(options.voters)
            scales = matching_scales(solved.orthogonal, solved.gram, wanted)
            of_experts = scales.unsqueeze(1) * solved.orthogonal
        else:
            of_experts = options.lambda_orthogonal * solved.orthogonal
        of_base = (0.0 if tempered else own[block]) - (of_experts * solved.parallel).sum(dim=1)
        factors = torch.cat([of_experts, of_base.unsqueeze(1)], dim=1)
        target[block].copy_(torch.bmm(factors.to(rows).unsqueeze(1), rows).squeeze(1))
        parallel_energy += solved.parallel_energy
        orthogonal_energy += solved.orthogonal_energy
    psi = temper_spectrum_(target, options.spectral_exponent) if tempered else None
    for block in blocks:
        if psi is not None:
            w = scratch[: block.stop - block.start, -1].copy_(base[block])
            if options.allow_nonfinite:
                w.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            update = remove_parallel_(psi[block], w)
            merged[block].copy_(w.mul_(own[block].to(w).unsqueeze(1)).add_(update))
        if options.allow_nonfinite:
            broken = ~base[block].isfinite()
            merged[block][broken] = base[block][broken].to(merged.dtype)
    return parallel_energy, orthogonal_energy


def merge_bytes(neurons: int, width: int, experts: int, *, parallel: bool, whole: bool, tempered: bool) -> int:
    """Bound the scratch memory of `merge_neurons` in bytes.

    Args:
        neurons: rows of the matrix.
        width: its columns.
        experts: how many there are.
        parallel: whether λ₁ is not 0.
        whole: whether something is held of the whole tensor in float32.
        tempered: whether the spectral exponent is not 1.
    """
    of_neuron = 4 * width * (experts + 2) + 64 * (experts + 1) ** 2
    total = 3 * min(max(CACHE_BYTES, of_neuron), neurons * of_neuron)
    total += 48 * neurons * experts if parallel else 0
    total += 4 * neurons * width if whole else 0
    return total + (48 * min(neurons, width) ** 2 + 4 * WIDE_BYTES if tempered else 0)


def _fill_trimmed(
    out: Tensor, expert: Tensor, base: Tensor, t: int, options: NeuroOptions, lengths: Tensor | None
) -> None:
    """Fill `out` with the t-th expert's trimmed task vector; add the weighted norm before trimming to `lengths`."""
    weight = options.weights[t]
    fill_task_vector(out, expert, base, clean=options.allow_nonfinite)
    if lengths is not None:
        lengths += abs(weight) * out.norm(dim=-1)
    trim_(out, options.thresholds[t])
    if weight != 1.0:
        out.mul_(weight)
