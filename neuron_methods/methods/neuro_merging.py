"""NeuroMerging: split every neuron's update at its base weights, merge the two parts apart.

Fang et al., "To See a World in a Spark of Neuron: Disentangling Multi-Task Interference for Training-Free Model
Merging", EMNLP 2025, arXiv:2503.05320. The six steps, each in the kernel that computes it; kernels/neuro.py puts them
together for a tensor:

1. Trim     τ_t keeps its top `density` entries by magnitude, one threshold per expert    kernels/trim.py
2. Split    τ_∥ = (τ·w / w·w) w,  τ_⊥ = τ − τ_∥, per neuron with base row w               kernels/subspace.py
3. ψ_∥      the coefficients τ_t·w / w·w, elected and averaged, times w                   kernels/elect.py
4. ψ_⊥      scores on the right singular vectors, elected and averaged, recombined        kernels/subspace.py
5. Points   0-D and 1-D tensors: elect and average entry by entry                         kernels/elect.py
6. Scale    θ₀ + λ₁ ψ_∥ + λ₂ ψ_⊥; points with λ₂. Without validation data λ₁ = 0 and λ₂ = 1 / (1 − σ)

Of what is ours, the list in the method's spec tells everything; four forms need more words, and are off by default:

- `lambda_orthogonal: norm`: λ₂ differs by neuron. It makes ψ_⊥ as long as the experts' updates of that neuron are on
  average before trimming (of the whole tensor for points): data-free as 1 / (1 − σ) is, but of a size that neither
  the number of experts nor the kind of consensus changes.
- `spectral_exponent` p below 1: λ₂ ψ_⊥ of all neurons of a tensor together, as a matrix U S Vᵀ, becomes c U Sᵖ Vᵀ of
  the same length (kernels/spectrum.py), and what is then parallel to a neuron's base weights is taken out again.
- `embeddings: mean`: tables of token embeddings, which are no linear layers, become the mean of the experts' tables
  by weight, without trimming. The published code merges them row by row, as any matrix (Fang et al., merge_7b.py).
- `trim: differing`: step 1 keeps the entries of a tensor in which the experts differ most, the same for all experts,
  instead of each expert's largest (kernels/differing.py).

In step 3 the published code multiplies the reduced coefficients by w / ‖w‖ (Fang et al., NeuroMerging.py). The
definition of the projection asks for w (Fang et al., section 3), and w is what is done here; it matters only where
λ₁ ≠ 0. In step 6 the published code has two modes: without λ₁ points are scaled by λ₂ (Fang et al., inference.py);
with both scales one half of ψ goes with each, so that points are scaled by (λ₁ + λ₂) / 2, and by λ₂ / 2 where λ₁ is 0
(Fang et al., merging_methods.py). `lambda_points: mean` is the second one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neuron_methods.kernels.neuro import NeuroOptions, merge_bytes, merge_neurons, merge_points
from neuron_methods.kernels.rows import is_points, neuron_rows
from neuron_methods.kernels.trim import search_bytes
from neuron_methods.methods.contract import (
    Inputs,
    MergeSettings,
    PlannedMethod,
    PlannedTensor,
    PreparedMerge,
    by_expert,
    only_value,
    place_of,
)
from neuron_methods.methods.parameters import choice, method_spec, number, text
from neuron_methods.methods.trim_profile import TrimProfile, measure_model, measure_tensor, measure_tensors
from neuron_methods.support.errors import UserError
from neuron_methods.support.sources import FANG, ours


def is_packed(name: str) -> bool:
    """Tell whether a tensor stacks the matrices of a mixture-of-experts layer, by its name."""
    return ".experts." in name


class NeuroMerging(PlannedMethod):
    """The method `neuro_merging` as mergekit sees it."""

    spec = method_spec(
        "neuro_merging",
        "NeuroMerging",
        FANG,
        number("weight", default=1.0, of="expert", about="multiplies the expert's task vector after trimming"),
        number("density", 0, 1, low_open=True, default=0.15, of="expert", about="share of the update's entries kept"),
        choice("trim", "model", "tensor", "differing", about="keep what is largest, or what experts differ in most"),
        number("lambda_parallel", default=0.0, about="scale of the merged parallel part"),
        number(
            "lambda_orthogonal",
            words=("auto", "norm"),
            default="auto",
            about="scale of the merged orthogonal part; auto: 1 / (1 - sigma); norm: to the experts' mean norm",
        ),
        choice(
            "lambda_points", "orthogonal", "mean", about="scale of norms and biases: lambda_orthogonal, or both's mean"
        ),
        number("rank_energy", 0, 1, low_open=True, default=1.0, about="cumulative energy of the singular vectors kept"),
        number("spectral_exponent", 0, 1, default=1.0, about="power of the singular values of the orthogonal part"),
        choice("consensus", "mean", "sum", about="mean of the values of the elected sign, or their sum"),
        choice("embeddings", "rows", "mean", about="token embeddings: row by row, or their mean"),
        text("profile", about="file written by --profile-out: thresholds and sigma are read instead of measured"),
        ours=(
            ours(
                "the share of an update that is kept, 15 %, is the default here; that of the published code is 20 % "
                "(Fang et al., merge_7b.py)",
                density=lambda share: share == 0.15,
            ),
            ours("each expert's trimmed update is multiplied by a weight", weight=lambda weight: weight != 1),
            ours("each expert's update is trimmed in every tensor by itself", trim="tensor"),
            ours(
                "instead of each expert's largest entries, those are kept in which the experts differ most",
                trim="differing",
            ),
            ours(
                "the merged coefficient of the parallel parts multiplies the neuron's base weights, by the definition "
                "of the projection (Fang et al., section 3), where the published code multiplies them at length 1 "
                "(Fang et al., NeuroMerging.py)",
                lambda_parallel=lambda scale: scale != 0,
            ),
            ours(
                "norms and biases are scaled by λ₂ alone, where the published code for tuning both scales takes their "
                "mean (Fang et al., merging_methods.py)",
                lambda_parallel=lambda scale: scale != 0,
                lambda_points="orthogonal",
            ),
            ours(
                "every neuron's merged update is made as long as the experts' are on average", lambda_orthogonal="norm"
            ),
            ours(
                "the singular values of every tensor's merged update are raised to a power below 1, and its length is "
                "kept",
                spectral_exponent=lambda power: power < 1,
            ),
            ours("values that carry the elected sign are added up, not averaged", consensus="sum"),
            ours(
                "token embeddings are the mean of the experts', untrimmed, where the published code merges them row by "
                "row as any matrix (Fang et al., merge_7b.py)",
                embeddings="mean",
            ),
        ),
    )

    def prepare(self, tensors: Sequence[PlannedTensor]) -> PreparedNeuroMerging:
        """Refuse parameters that contradict each other over the merge, and a profile of another merge.

        Raises:
            UserError: `trim` or `profile` differs between tensors, or `density` does under `trim: model`; something is
                asked for that `trim: differing`, or `lambda_orthogonal: norm`, does not have; or the profile does not
                fit.
        """
        return PreparedNeuroMerging(tensors)


class PreparedNeuroMerging(PreparedMerge):
    """One merge by `neuro_merging`.

    Attributes:
        profile: thresholds and σ, as far as a profile told them or `measure` has.
    """

    def __init__(self, tensors: Sequence[PlannedTensor]) -> None:
        """See `NeuroMerging.prepare`."""
        self._tensors, self._experts = tensors, list(by_expert(tensors, "density"))
        self._averaged = {t.name for t in tensors if t.parameters["embeddings"] == "mean" and _holds_tokens(t)}
        self._parameters = {tensor.name: tensor.parameters for tensor in tensors}
        for name in ("trim", "profile"):
            _only(name, {t.parameters[name] for t in tensors}, "it holds for the whole merge; remove the filter")
        shared = tensors[0].parameters
        if shared["trim"] == "differing":
            _check_differing(tensors)
        if any(
            t.parameters["lambda_points"] == "mean" and t.parameters["lambda_orthogonal"] == "norm" for t in tensors
        ):
            raise UserError(
                "neuro_merging: lambda_points: mean is the mean of two numbers, and lambda_orthogonal: norm is none; "
                "give a number or auto, or leave lambda_points out"
            )
        if shared["trim"] == "model":
            for expert, densities in by_expert(tensors, "density").items():
                advice = "one threshold per expert has one density; give one number, or set trim: tensor"
                _only(f"density of {expert}", densities, advice)
        # Without thresholds per expert, and without the σ that λ₂ is made of, there is nothing to measure.
        self._measures = shared["trim"] == "model" or any(_is_scaled_by_sigma(t) for t in tensors)
        self.profile = TrimProfile(trim=shared["trim"])
        if shared["profile"]:
            self._measures = False
            self._adopt(TrimProfile.read(shared["profile"], self._counted(), self._experts))

    def reads(self) -> set[str]:
        """Name the tensors whose updates are trimmed: none with a profile, nor where no parameter asks for a pass."""
        return {t.name for t in self._counted() if not t.untouched} if self._measures else set()

    def measure(self, settings: MergeSettings) -> None:
        """Take step 1 over the whole model, and σ of step 6: one streaming pass over all tensors."""
        super().measure(settings)
        if self._measures:
            measure = measure_model if self.profile.trim == "model" else measure_tensors
            self._adopt(measure(self._counted(), self._experts, settings))

    def scratch(self, name: str, shape: Sequence[int], experts: int) -> int:
        """See `PreparedMerge.scratch`: a few blocks of rows, and what `NeuroOptions` names as held beyond them."""
        parameters = self._parameters[name]
        entries, searched = math.prod(shape), 0
        if self.profile.trim == "tensor" and not self._measures:
            searched = search_bytes(entries, experts)
        if is_points(name, len(shape)) or not entries:
            return max(searched, 4 * entries * (4 * experts + 8))
        width = math.prod(shape[-1:] if is_packed(name) or (len(shape) == 3 and shape[0] == 1) else shape[1:])
        differing, tempered = self.profile.trim == "differing", parameters["spectral_exponent"] != 1
        return max(
            searched,
            merge_bytes(
                entries // width,
                width,
                experts,
                parallel=parameters["lambda_parallel"] != 0,
                whole=differing or tempered,
                tempered=tempered,
            )
            + 4 * entries,
        )

    def measuring(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """See `PreparedMerge.measuring`: one search per expert, with its sample."""
        if not self._measures:
            return 0
        sizes = [math.prod(shapes[t.name]) for t in self._tensors if t.name in shapes]
        largest = sum(sizes) if self.profile.trim == "model" else max(sizes, default=0)
        return search_bytes(largest, len(self._experts))

    def merge_tensor(self, inputs: Inputs, parameters: Mapping[str, Any], out_dtype: torch.dtype) -> Tensor:
        """Take steps 1 to 6 for one tensor."""
        name, base, experts = inputs
        if name in self._averaged:
            return self.averaged(inputs, parameters, out_dtype)
        differing = parameters["trim"] == "differing"
        thresholds = [0.0] * len(experts) if differing else self.profile.thresholds_for(name, experts)
        if thresholds is None:
            densities = {e: parameters["density"][e] for e in experts}
            searches = measure_tensor(name or "tensor", base, experts, densities, self.settings)
            thresholds = [search.threshold or 0.0 for search in searches.values()]
        scale = parameters["lambda_orthogonal"]
        if scale == "auto":
            scale = self.profile.automatic_lambda(parameters["consensus"])
        if is_points(name, base.ndim) and parameters["lambda_points"] == "mean":
            scale = (parameters["lambda_parallel"] + scale) / 2
        # Contiguous whatever the base's strides are, so that rows of it are views to write to.
        merged = torch.empty(base.shape, dtype=out_dtype, device=base.device)
        options = NeuroOptions(
            thresholds=thresholds,
            weights=[parameters["weight"][e] for e in experts],
            lambda_orthogonal=scale,
            lambda_parallel=parameters["lambda_parallel"],
            rank_energy=parameters["rank_energy"],
            spectral_exponent=parameters["spectral_exponent"],
            consensus=parameters["consensus"],
            allow_nonfinite=self.settings.allow_nonfinite,
            differing_density=max(parameters["density"][e] for e in experts) if differing else 1.0,
            scratch_bytes=self.settings.scratch_bytes,
        )
        tensors = list(experts.values())
        if is_points(name, base.ndim):
            merge_points(base, tensors, merged, options)
            return merged
        packed = is_packed(name)
        rows, *of_experts, out_rows = (neuron_rows(t, packed=packed) for t in (base, *tensors, merged))
        parallel_energy, orthogonal_energy = merge_neurons(rows, of_experts, out_rows, options)
        self.tell(name, parallel=parallel_energy, orthogonal=orthogonal_energy)
        return merged

    def findings(self) -> list[str]:
        """Tell how much of the updates is parallel to the neurons."""
        energy = self.total("parallel") + self.total("orthogonal")
        if energy <= 0:
            return []
        share = 100 * self.total("parallel") / energy
        return [f"update energy: {share:.2f} % parallel, {100 - share:.2f} % orthogonal to the neurons"]

    def _counted(self) -> list[PlannedTensor]:
        return [t for t in self._tensors if t.name not in self._averaged and not t.repeats()]

    def _adopt(self, profile: TrimProfile) -> None:
        """Take a profile for this merge's own."""
        # An expert of weight 0 everywhere takes no part, and its σ must not scale the others.
        profile.voting = [e for e, weights in by_expert(self._counted(), "weight").items() if any(weights)]
        self.profile = profile


def _holds_tokens(tensor: PlannedTensor) -> bool:
    return place_of(tensor).role == "tokens"


def _is_scaled_by_sigma(tensor: PlannedTensor) -> bool:
    return tensor.parameters["lambda_orthogonal"] == "auto" and tensor.parameters["consensus"] == "mean"


def _check_differing(tensors: Sequence[PlannedTensor]) -> None:
    """Raise UserError for what `trim: differing` does not have."""
    for tensor in tensors:
        if tensor.parameters["profile"]:
            raise UserError("neuro_merging: profile: nothing is measured under trim: differing; remove the profile")
        if _is_scaled_by_sigma(tensor):
            raise UserError(
                "neuro_merging: lambda_orthogonal: auto is made of what trimming by magnitude removes, which trim: "
                "differing does not do; give a number (2 to 4 at density 0.25), or norm"
            )
        only_value(
            tensor.expert_parameters["density"].values(),
            f"neuro_merging: density of {tensor.name} differs between the experts",
            ": trim: differing keeps the same entries of all of them; give all one density",
        )


def _only(what: str, values: Iterable[Any], advice: str) -> None:
    only_value(values, f"neuro_merging: {what} varies over the tensors", f": {advice}")
