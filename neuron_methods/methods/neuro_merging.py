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

Three choices are ours, and off by default:

- `lambda_orthogonal: norm`: λ₂ differs by neuron. It makes ψ_⊥ as long as the experts' updates of that neuron are on
  average before trimming (of the whole tensor for points): data-free as the published one, but of a size that neither
  the number of experts nor the kind of consensus changes.
- `spectral_exponent` p below 1: λ₂ ψ_⊥ of all neurons of a tensor together, as a matrix U S Vᵀ, becomes c U Sᵖ Vᵀ of
  the same length (kernels/spectrum.py), and what is then parallel to a neuron's base weights is taken out again.
- `trim: differing`: step 1 keeps the entries of a tensor in which the experts differ most, the same for all experts,
  instead of each expert's largest (kernels/differing.py).

The published code multiplies the reduced coefficients of step 3 by w / ‖w‖; the paper's definition of the projection
asks for w, and w is what is done here. It matters only where λ₁ ≠ 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from torch import Tensor

from neuron_methods.kernels.neuro import merge_neurons, merge_points
from neuron_methods.kernels.rows import neuron_rows
from neuron_methods.methods.contract import (
    MergeContext,
    PlannedMethod,
    PlannedTensor,
    choice,
    current_context,
    number,
    number_or,
)
from neuron_methods.methods.trim_profile import TrimProfile, measure_model, measure_tensor, measure_tensors
from neuron_methods.support.errors import UserError

PARAMETERS = (
    ParameterSpec(
        "weight",
        number("weight"),
        ParameterScope.NON_BASE,
        default=1.0,
        description="multiplies the expert's task vector after trimming",
    ),
    ParameterSpec(
        "density",
        number("density", 0.0, 1.0, low_open=True),
        ParameterScope.NON_BASE,
        default=0.15,
        description="share of the task vector's entries kept",
    ),
    ParameterSpec(
        "trim",
        choice("trim", "model", "tensor", "differing"),
        default="model",
        description="keep each expert's largest entries, of the model or of a tensor, or those experts differ in most",
        scope=ParameterScope.SHARED,
    ),
    ParameterSpec(
        "lambda_parallel",
        number("lambda_parallel"),
        default=0.0,
        description="scale of the merged parallel part",
        scope=ParameterScope.SHARED,
    ),
    ParameterSpec(
        "lambda_orthogonal",
        number_or("lambda_orthogonal", "auto", "norm"),
        default="auto",
        description="scale of the merged orthogonal part; auto: 1 / (1 - sigma); norm: to the experts' mean norm",
        scope=ParameterScope.SHARED,
    ),
    ParameterSpec(
        "rank_energy",
        number("rank_energy", 0.0, 1.0, low_open=True),
        default=1.0,
        description="cumulative energy of the singular vectors kept",
        scope=ParameterScope.SHARED,
    ),
    ParameterSpec(
        "spectral_exponent",
        number("spectral_exponent", 0.0, 1.0),
        default=1.0,
        description="power of the singular values of a tensor's orthogonal part; 1 leaves them, 0 makes them alike",
        scope=ParameterScope.SHARED,
    ),
    ParameterSpec(
        "consensus",
        choice("consensus", "mean", "sum"),
        default="mean",
        description="mean of the values with the elected sign (the paper), or their sum (auto lambda is then 1)",
        scope=ParameterScope.SHARED,
    ),
    ParameterSpec(
        "profile",
        str,
        default="",
        description="file written by --profile-out: thresholds and sigma are read instead of measured",
        scope=ParameterScope.SHARED,
    ),
)


def is_packed(name: str) -> bool:
    """Whether a tensor stacks the matrices of a mixture-of-experts layer, by its name."""
    return ".experts." in name


class NeuroMerging(PlannedMethod):
    """The method `neuro_merging` as mergekit sees it."""

    takes_task_vectors = True

    spec = MergeMethodSpec(
        name="neuro_merging",
        pretty_name="NeuroMerging",
        reference_url="https://arxiv.org/abs/2503.05320",
        parameters=PARAMETERS,
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
    )

    def check(self, tensors: Sequence[PlannedTensor]) -> None:
        """Refuse parameters that contradict each other over the merge.

        Raises:
            UserError: `trim` or `profile` differs between tensors, or `density` does under `trim: model`; or something
                is asked for that `trim: differing` does not have.
        """
        for shared in ("trim", "profile"):
            _only(shared, {t.parameters[shared] for t in tensors}, "it holds for the whole merge; remove the filter")
        if tensors and tensors[0].parameters["trim"] == "differing":
            _check_differing(tensors)
        if not tensors or tensors[0].parameters["trim"] != "model":
            return
        for expert in _experts(tensors):
            densities = {t.expert_parameters["density"][expert] for t in _with(tensors, expert)}
            _only(
                f"density of {expert}",
                densities,
                "one threshold per expert has one density; give one number, or set trim: tensor",
            )

    def measures(self, tensors: Sequence[PlannedTensor]) -> bool:
        """Whether thresholds or σ must be measured: not with a profile, nor where no parameter asks for them."""
        if not tensors or tensors[0].parameters["profile"] or tensors[0].parameters["trim"] == "differing":
            return False
        return tensors[0].parameters["trim"] == "model" or any(
            t.parameters["lambda_orthogonal"] == "auto" and t.parameters["consensus"] == "mean" for t in tensors
        )

    def measure(self, tensors: Sequence[PlannedTensor], context: MergeContext) -> TrimProfile:
        """Step 1 over the whole model, and σ of step 6: one streaming pass over all tensors.

        Returns:
            Thresholds and σ per expert. Nothing is read where no parameter asks for what a pass would tell.
        """
        counted = [t for t in tensors if not t.repeats]
        if not counted:
            return TrimProfile(trim="model")
        shared = counted[0].parameters
        experts = _experts(counted)
        # An expert of weight 0 everywhere takes no part, and its σ must not scale the others.
        voting = [e for e in experts if any(t.expert_parameters["weight"][e] != 0 for t in _with(counted, e))]
        if shared["profile"]:
            return TrimProfile.read(shared["profile"], counted, experts, voting)
        if not self.measures(counted):
            return TrimProfile(trim=shared["trim"])
        measure = measure_model if shared["trim"] == "model" else measure_tensors
        return measure(counted, experts, voting, context)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Steps 1 to 6 for one tensor.

        Args:
            group: base and experts, all of one shape, dtype and device.
            **parameters: as the table of `PARAMETERS` declares them.

        Returns:
            The merged tensor in the dtype mergekit asked for, else the inputs'.
        """
        context = current_context() or MergeContext()
        profile: TrimProfile = context.state
        base = group.base.tensor
        experts = {entry.id: entry.tensor for entry in group.non_base}
        name = group.metadata.name or "tensor"
        differing = parameters["trim"] == "differing"
        thresholds = [0.0] * len(experts) if differing else profile.thresholds_for(group.metadata.name, experts)
        if thresholds is None:
            densities = {e: parameters["density"][e] for e in experts}
            thresholds = [s.threshold for s in measure_tensor(name, base, experts, densities, context)]
        scale = parameters["lambda_orthogonal"]
        if scale == "auto":
            scale = profile.automatic_lambda(parameters["consensus"])
        # Contiguous whatever the base's strides are, so that rows of it are views to write to.
        merged = torch.empty(base.shape, dtype=context.out_dtype or base.dtype, device=base.device)
        arguments: dict[str, Any] = {
            "thresholds": thresholds,
            "weights": [parameters["weight"][e] for e in experts],
            "lambda_orthogonal": scale,
            "consensus": parameters["consensus"],
            "allow_nonfinite": context.allow_nonfinite,
            "differing": max(parameters["density"][e] for e in experts) if differing else 1.0,
        }
        tensors = list(experts.values())
        if base.ndim < 2:
            merge_points(base, tensors, merged, **arguments)
            return merged
        packed = is_packed(name)
        rows = [neuron_rows(t, packed=packed) for t in (base, *tensors)]
        out_rows = neuron_rows(merged, packed=packed)
        energies = merge_neurons(
            rows[0],
            rows[1:],
            out_rows,
            lambda_parallel=parameters["lambda_parallel"],
            rank_energy=parameters["rank_energy"],
            spectral_exponent=parameters["spectral_exponent"],
            scratch_bytes=context.scratch_bytes,
            **arguments,
        )
        profile.add_energies(*energies)
        return merged


def _check_differing(tensors: Sequence[PlannedTensor]) -> None:
    """Raise UserError for what `trim: differing` does not have."""
    for tensor in tensors:
        if tensor.parameters["profile"]:
            raise UserError("neuro_merging: profile: nothing is measured under trim: differing; remove the profile")
        if tensor.parameters["lambda_orthogonal"] == "auto" and tensor.parameters["consensus"] == "mean":
            raise UserError(
                "neuro_merging: lambda_orthogonal: auto is made of what trimming by magnitude removes, which trim: "
                "differing does not do; give a number (2 to 4 at density 0.25), or norm"
            )
        densities = set(tensor.expert_parameters["density"].values())
        if len(densities) > 1:
            shown = ", ".join(sorted(map(str, densities)))
            raise UserError(
                f"neuro_merging: density of {tensor.name} differs between the experts ({shown}): trim: differing keeps "
                "the same entries of all of them; give all one density"
            )


def _with(tensors: Sequence[PlannedTensor], expert: Hashable) -> list[PlannedTensor]:
    return [t for t in tensors if expert in t.expert_parameters["density"]]


def _experts(tensors: Sequence[PlannedTensor]) -> list[Hashable]:
    seen: dict[Hashable, None] = {}
    for tensor in tensors:
        seen.update(dict.fromkeys(tensor.expert_parameters["density"]))
    return list(seen)


def _only(what: str, values: set[Any], advice: str) -> None:
    if len(values) > 1:
        shown = ", ".join(sorted(map(str, values))[:4])
        raise UserError(f"neuro_merging: {what} varies over the tensors ({shown}): {advice}")
