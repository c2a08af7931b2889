"""MIN-Merging, static: every expert keeps its most important neurons, and neurons several want are shared out.

Liang, "MIN-Merging: Merge the Important Neurons for Model Merging", arXiv:2510.17890; the plain checkpoint for those
who do not want the router. The paper gives no closed formula, so this one is explicit:

1. Importance  of neuron i to expert t, over all slices of tensors the neuron owns:    kernels/select.py
               `magnitude`   ‖τ_t,i‖ / ‖θ₀,i‖
               `activation`  mean |activation_i| × ‖outgoing weights of i in θ_t‖, on the data of t's profile
               `taylor`      mean |activation_i × ∂loss/∂activation_i|, likewise
2. Select      the top `density` share of t's neurons, over the model or in each layer
3. Conflict    a neuron wanted by several: a_t in proportion to weight × importance, the winner's alone, or the sum
4. Scale       θ₀ + λ Σ_t a_t τ_t for all slices of the neuron; θ₀ where nobody keeps it

Attention has no neurons in this sense; its rows are selected by magnitude in a ranking of their own. What belongs to
no neuron is merged by the method that `rest` names.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
)
from torch import Tensor

from neuron_methods.kernels.select import CONFLICTS, combine_slices, conflict_coefficients
from neuron_methods.methods.contract import MergeContext, PlannedTensor, choice, number
from neuron_methods.methods.inner import CompositeMethod, InnerMerge, copy_base, method_name, rest_merges
from neuron_methods.methods.neuron_importance import measure_norms, read_importance, select
from neuron_methods.methods.neuron_layout import NeuronLayout, agreed, experts_of
from neuron_methods.support.errors import UserError

NAME = "min_merging"

PARAMETERS = (
    ParameterSpec(
        "weight",
        number("weight", 0.0),
        ParameterScope.NON_BASE,
        default=1.0,
        description="the expert's say where several want a neuron; its factor under conflict: sum",
    ),
    ParameterSpec(
        "density",
        number("density", 0.0, 1.0, low_open=True),
        ParameterScope.NON_BASE,
        default=0.5,
        description="share of neurons the expert keeps",
    ),
    ParameterSpec(
        "importance",
        choice("importance", "magnitude", "activation", "taylor"),
        ParameterScope.NON_BASE,
        default="magnitude",
        description="what makes a neuron important; activation and taylor need the expert's profile",
    ),
    ParameterSpec(
        "profile",
        str,
        ParameterScope.NON_BASE,
        default="",
        description="file of mergekit-neuron profile, of this expert on its task's data",
    ),
    ParameterSpec(
        "data",
        str,
        ParameterScope.NON_BASE,
        default="",
        description="data source within the profile; all of them, by tokens, if not given",
    ),
    ParameterSpec(
        "scope",
        choice("scope", "model", "layer"),
        ParameterScope.SHARED,
        default="model",
        description="neurons are ranked over the whole model, or in each layer",
    ),
    ParameterSpec(
        "conflict",
        choice("conflict", *CONFLICTS),
        ParameterScope.SHARED,
        default="weighted",
        description="who gets a neuron that several experts keep",
    ),
    ParameterSpec(
        "lambda",
        number("lambda"),
        ParameterScope.SHARED,
        default=1.0,
        description="scale of the merged update",
    ),
    ParameterSpec(
        "attention",
        choice("attention", "rows", "keep", "drop"),
        ParameterScope.SHARED,
        default="rows",
        description="rows of attention weights: selected by magnitude, all kept, or the base's",
    ),
    ParameterSpec(
        "rest",
        method_name("rest", "base"),
        ParameterScope.SHARED,
        default="linear",
        description="merge method for embeddings, norms and heads, or base",
    ),
)
_OF_THE_MODEL = ("scope", "conflict", "attention")


@dataclass
class Selection:
    """What every expert keeps.

    Attributes:
        layout: whose slices the tensors are.
        experts: ids in the order of the coefficients' rows.
        coefficients: block of neurons -> a_t, shape (experts, neurons); a block that stays the base's is missing.
        kept: expert -> (MLP neurons it keeps, of how many).
        contested: number of MLP neurons that more than one expert keeps.
        rest: tensor name -> the method that merges it; None keeps the base's.
    """

    layout: NeuronLayout
    experts: list[Hashable]
    coefficients: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[Hashable, tuple[int, int]] = field(default_factory=dict)
    contested: int = 0
    rest: dict[str, InnerMerge | None] = field(default_factory=dict)


class MinMerging(CompositeMethod):
    """The method `min_merging` as mergekit sees it."""

    takes_task_vectors = True
    slots = ("rest",)

    spec = MergeMethodSpec(
        name=NAME,
        pretty_name="MIN-Merging",
        reference_url="https://arxiv.org/abs/2510.17890",
        parameters=PARAMETERS,
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
    )

    def check(self, tensors: Sequence[PlannedTensor]) -> None:
        """Refuse parameters and profiles that do not fit the merge.

        Raises:
            UserError: naming what varies within a neuron, what the profile lacks, or what the inner method refuses.
        """
        if not tensors:
            return
        layout = NeuronLayout(tensors, NAME)
        experts = experts_of(tensors)
        _, kinds = self._agreed(layout, tensors, experts)
        shared, _ = agreed(NAME, layout.of_kind(tensors, "mlp", "attention"), _OF_THE_MODEL, experts, "the model")
        if shared["conflict"] != "sum" and len({k for k in kinds["importance"].values()}) > 1:
            raise UserError(
                f"{NAME}: importance differs between experts, and conflict: {shared['conflict']} compares what cannot "
                "be compared; give all experts one importance, or set conflict: sum"
            )
        for expert in experts:
            read_importance(NAME, layout, tensors, kinds, expert)
        for inner in self.inner_merges(tensors):
            inner.check()

    def measures(self, tensors: Sequence[PlannedTensor]) -> bool:
        """Always: importance looks at every neuron."""
        return True

    def inner_merges(self, tensors: Sequence[PlannedTensor]) -> list[InnerMerge]:
        """The methods that `rest` names."""
        rest = rest_merges(self, NeuronLayout(tensors, NAME).of_kind(tensors))
        return list(dict.fromkeys(inner for inner in rest.values() if inner is not None))

    def measure(self, tensors: Sequence[PlannedTensor], context: MergeContext) -> Selection:
        """Steps 1 to 3: one streaming pass over the tensors of neurons, in memory of a few numbers per neuron."""
        layout = NeuronLayout(tensors, NAME)
        experts = experts_of(tensors)
        selection = Selection(layout, experts, rest=rest_merges(self, layout.of_kind(tensors)))
        for inner in dict.fromkeys(filter(None, selection.rest.values())):
            inner.measure(context)
        owned = layout.of_kind([t for t in tensors if not t.repeats], "mlp", "attention")
        shared, _ = agreed(NAME, owned, _OF_THE_MODEL, experts, "the model")
        if shared["attention"] == "drop":
            owned = layout.of_kind(owned, "mlp")
        of_layer, kinds = self._agreed(layout, tensors, experts)
        norms = measure_norms(layout, owned, context)
        order = {t.name: i for i, t in enumerate(tensors)}
        blocks = {
            layout.slices[t.name].block: layout.slices[t.name] for t in sorted(owned, key=lambda t: order[t.name])
        }
        for kind in ("mlp", "attention"):
            importances: dict[Hashable, dict[str, Tensor]] = {}
            kept: dict[Hashable, dict[str, Tensor]] = {}
            own = [s for s in blocks.values() if s.kind == kind]
            for expert in experts:
                source = None if kind == "attention" else read_importance(NAME, layout, tensors, kinds, expert)
                importances[expert] = {s.block: norms.importance(s.block, expert, source) for s in own}
                if kind == "attention" and shared["attention"] == "keep":
                    kept[expert] = {b: torch.ones_like(v, dtype=torch.bool) for b, v in importances[expert].items()}
                    continue
                densities = {s.block: of_layer[s.block]["density"].get(expert, 1.0) for s in own}
                kept[expert] = select(importances[expert], own, densities, shared["scope"], expert)
                if kind == "mlp":
                    total = sum(len(mask) for mask in kept[expert].values())
                    selection.kept[expert] = (sum(int(mask.sum()) for mask in kept[expert].values()), total)
            if kind == "mlp":
                wanted = [torch.stack([kept[e][s.block] for e in experts]).sum(dim=0) for s in own]
                selection.contested = sum(int((count > 1).sum()) for count in wanted)
            for s in own:
                weights = [of_layer[s.block]["weight"].get(e, 0.0) for e in experts]
                selection.coefficients[s.block] = conflict_coefficients(
                    torch.stack([importances[e][s.block] for e in experts]),
                    torch.stack([kept[e][s.block] for e in experts]),
                    weights,
                    shared["conflict"],
                )
        return selection

    def findings(self, state: Selection) -> list[str]:
        """How many neurons each expert keeps, and how many of them several do."""
        lines = [
            f"{expert}: keeps {kept:,} of {total:,} MLP neurons ({kept / total:.1%})"
            for expert, (kept, total) in state.kept.items()
        ]
        return [*lines, f"MLP neurons that several experts keep: {state.contested:,}"] if lines else []

    def merge_neurons(
        self,
        name: str,
        base: Tensor,
        experts: Mapping[Hashable, Tensor],
        context: MergeContext,
        parameters: Mapping[str, Any],
    ) -> Tensor | None:
        """Step 4 for a tensor of neurons or of attention rows."""
        selection: Selection = context.state
        slices = selection.layout.slices.get(name)
        if slices is None:
            return None
        coefficients = selection.coefficients.get(slices.block)
        if coefficients is None:
            return copy_base(base, context)
        rows = [selection.experts.index(expert) for expert in experts]
        return combine_slices(
            base,
            list(experts.values()),
            coefficients[rows],
            slices.axis,
            torch.empty_like(base, dtype=context.out_dtype or base.dtype),
            scale=parameters["lambda"],
            copies=slices.copies,
            clean=context.allow_nonfinite,
        )

    def _agreed(
        self, layout: NeuronLayout, tensors: Sequence[PlannedTensor], experts: Sequence[Hashable]
    ) -> tuple[dict[str, dict[str, dict[Hashable, Any]]], dict[str, dict[Hashable, Any]]]:
        """({block: {parameter: {expert: value}}}, {parameter: {expert: value}} of what holds for the whole model)."""
        owned = layout.of_kind(tensors, "mlp", "attention")
        by_block: dict[str, list[PlannedTensor]] = {}
        for tensor in owned:
            by_block.setdefault(layout.slices[tensor.name].block, []).append(tensor)
        blocks = {b: agreed(NAME, t, ("weight", "density"), experts, b)[1] for b, t in by_block.items()}
        mlp = layout.of_kind(owned, "mlp")
        _, model = agreed(NAME, mlp, ("importance", "profile", "data"), experts, "the model")
        scope = agreed(NAME, owned, ("scope",), experts, "the model")[0]["scope"]
        for kind in ("mlp", "attention"):
            for ranked, together in _ranked_together(layout.of_kind(owned, kind), layout, scope).items():
                agreed(NAME, together, ("density",), experts, ranked)
        return blocks, model


def _ranked_together(
    tensors: Sequence[PlannedTensor], layout: NeuronLayout, scope: str
) -> dict[str, list[PlannedTensor]]:
    ranked: dict[str, list[PlannedTensor]] = {}
    for tensor in tensors:
        where = "the model (scope: model)" if scope == "model" else layout.slices[tensor.name].layer
        ranked.setdefault(where, []).append(tensor)
    return ranked
