"""MIN-Merging, static: every expert keeps its most important neurons, and neurons several want are shared out.

Liang, "MIN-Merging: Merge the Important Neurons for Model Merging", arXiv:2510.17890; the plain checkpoint for those
who do not want the router. That it is one, and its formula, are ours: MIN-Merging itself has a router (Liang,
abstract), and its equations were not to be had.

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
from typing import Any

import torch
from torch import Tensor

from neuron_methods.kernels.select import CONFLICTS, combine_bytes, conflict_coefficients
from neuron_methods.methods.contract import Inputs, MergeSettings, PlannedTensor, grouped, place_of
from neuron_methods.methods.delegation import DelegatingMerge, DelegatingMethod, method_of
from neuron_methods.methods.neuron_importance import NeuronNorms, measure_norms, read_importance, select
from neuron_methods.methods.neuron_layout import Slices
from neuron_methods.methods.parameters import choice, method_spec, number, text
from neuron_methods.support.errors import UserError
from neuron_methods.support.sources import LIANG, ours

NAME = "min_merging"


class MinMerging(DelegatingMethod):
    """The method `min_merging` as mergekit sees it."""

    slots = ("rest",)

    spec = method_spec(
        NAME,
        "MIN-Merging",
        LIANG,
        number("weight", 0, default=1.0, of="expert", about="its say where several want a neuron, its factor in a sum"),
        number("density", 0, 1, low_open=True, default=0.5, of="expert", about="share of neurons the expert keeps"),
        choice("importance", "magnitude", "activation", "taylor", of="expert", about="what makes a neuron important"),
        text("profile", of="expert", about="file of mergekit-neuron profile, of this expert on its task's data"),
        text("data", of="expert", about="data source within the profile; all of them, by tokens, if not given"),
        choice("scope", "model", "layer", about="neurons are ranked over the whole model, or in each layer"),
        choice("conflict", *CONFLICTS, about="who gets a neuron that several experts keep"),
        number("lambda", default=1.0, about="scale of the merged update"),
        choice("attention", "rows", "keep", "drop", about="its rows: selected by magnitude, all kept, or the base's"),
        method_of("rest", "base", default="linear", about="merge method for embeddings, norms and heads, or base"),
        choice("embeddings", "rest", "mean", about="token embeddings: as rest has it, or the mean of the updates"),
        ours=(
            ours(
                "that it is one plain checkpoint: MIN-Merging is a framework with a router (Liang, abstract), which "
                "`mergekit-neuron route` makes"
            ),
            ours(
                "how importance is measured, what share of the neurons is kept, and who gets a neuron that several "
                "experts keep: no equation of the method was at hand"
            ),
            ours("that attention goes by its rows, and what belongs to no neuron by an ordinary merge method"),
        ),
    )

    def prepare(self, tensors: Sequence[PlannedTensor]) -> PreparedMinMerging:
        """Read the experts' profiles, and refuse parameters and profiles that do not fit the merge.

        Raises:
            UserError: naming what varies within a neuron, what the profile lacks, or what the method of `rest` refuses.
        """
        return PreparedMinMerging(self, tensors)


class PreparedMinMerging(DelegatingMerge):
    """One merge by `min_merging`; what every expert keeps, once it is measured.

    Attributes:
        coefficients: block of neurons -> a_t, shape (experts, neurons); a block that stays the base's is missing.
        kept: expert -> (MLP neurons it keeps, of how many).
        contested: number of MLP neurons that more than one expert keeps.
    """

    def __init__(self, method: MinMerging, tensors: Sequence[PlannedTensor]) -> None:
        """See `MinMerging.prepare`."""
        super().__init__(method, tensors)
        self.coefficients: dict[str, Tensor] = {}
        self.kept: dict[Hashable, tuple[int, int]] = {}
        self.contested = 0
        owned = self.layout.of_kind(tensors, "mlp", "attention")
        self._of_block = {
            block: self.agreed(together, ("weight", "density"), block)
            for block, together in grouped(owned, lambda tensor: self.layout.slices[tensor.name].block).items()
        }
        of_model = self.agreed(owned, ("scope", "conflict", "attention"), "the model")
        self._scope, self._conflict, self._attention = (of_model[p] for p in ("scope", "conflict", "attention"))
        for kind in ("mlp", "attention"):
            for where, together in grouped(self.layout.of_kind(owned, kind), self._ranked_with).items():
                self.agreed(together, ("density",), where)
        sources = self.agreed(self.layout.of_kind(owned, "mlp"), ("importance", "profile", "data"), "the model")
        if self._conflict != "sum" and len(set(sources["importance"].values())) > 1:
            raise UserError(
                f"{NAME}: importance differs between experts, and conflict: {self._conflict} compares what cannot "
                "be compared; give all experts one importance, or set conflict: sum"
            )
        self._profiles = {
            e: read_importance(self.layout, e, **{name: of[e] for name, of in sources.items()})
            for e in sources["importance"]
        }
        of_nobody = self.layout.of_kind(tensors)
        averaged = [t for t in of_nobody if t.parameters["embeddings"] == "mean" and place_of(t).role == "tokens"]
        self._averaged = {tensor.name for tensor in averaged}
        self.leave([tensor for tensor in of_nobody if tensor.name not in self._averaged])

    def reads(self) -> set[str]:
        """Name the tensors of all neurons that importance looks at, and what `rest` reads."""
        return super().reads().union(tensor.name for tensor in self._looked_at())

    def measure(self, settings: MergeSettings) -> None:
        """Take steps 1 to 3: one streaming pass over the tensors of neurons, in memory of a few numbers per neuron."""
        super().measure(settings)
        looked_at = self._looked_at()
        norms = measure_norms(self.layout, looked_at, settings)
        blocks = {slices.block: slices for slices in (self.layout.slices[t.name] for t in looked_at)}
        for kind in ("mlp", "attention"):
            self._share_out(kind, [slices for slices in blocks.values() if slices.kind == kind], norms)

    def measuring(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """See `PreparedMerge.measuring`: norms and importances in float64 of every neuron, for every expert."""
        blocks = max((combine_bytes(shapes[t.name], 1) for t in self._looked_at() if t.name in shapes), default=0)
        return max(super().measuring(shapes), blocks + self._neurons(shapes) * (16 + 40 * len(self.experts)))

    def remaining(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """See `PreparedMerge.remaining`: a coefficient in float64 for every neuron and expert."""
        return super().remaining(shapes) + self._neurons(shapes) * 8 * len(self.experts)

    def _neurons(self, shapes: Mapping[str, Sequence[int]]) -> int:
        of_block: dict[str, int] = {}
        for name, slices in self.layout.slices.items():
            if name in shapes and slices.axis < len(shapes[name]):
                of_block[slices.block] = max(of_block.get(slices.block, 0), shapes[name][slices.axis] // slices.copies)
        return sum(of_block.values())

    def findings(self) -> list[str]:
        """Tell how many neurons each expert keeps, how many of them several do, and what other methods found."""
        lines = [
            f"{expert}: keeps {kept:,} of {total:,} MLP neurons ({kept / total:.1%})"
            for expert, (kept, total) in self.kept.items()
        ]
        own = [*lines, f"MLP neurons that several experts keep: {self.contested:,}"] if lines else []
        return [*own, *super().findings()]

    def merge_neurons(self, inputs: Inputs, parameters: Mapping[str, Any], out_dtype: torch.dtype) -> Tensor | None:
        """Take step 4 for a tensor of neurons or of attention rows, or the mean of token embeddings."""
        if inputs.name in self._averaged:
            return self.averaged(inputs, parameters, out_dtype, parameters["lambda"])
        slices = self.layout.slices.get(inputs.name)
        coefficients = self.coefficients.get(slices.block) if slices is not None else None
        if slices is None or coefficients is None:
            return None
        rows = [self.experts.index(expert) for expert in inputs.experts]
        return self.combine(inputs, slices, coefficients[rows], parameters["lambda"], out_dtype)

    def _looked_at(self) -> list[PlannedTensor]:
        kinds = ("mlp",) if self._attention == "drop" else ("mlp", "attention")
        return self.layout.of_kind([t for t in self.tensors if not t.repeats()], *kinds)

    def _share_out(self, kind: str, blocks: Sequence[Slices], norms: NeuronNorms) -> None:
        """Select the neurons of a kind for each expert, and settle who gets those that several want."""
        importances: dict[Hashable, dict[str, Tensor]] = {}
        kept: dict[Hashable, dict[str, Tensor]] = {}
        for expert in self.experts:
            profile = self._profiles.get(expert) if kind == "mlp" else None
            importances[expert] = {s.block: norms.importance(s.block, expert, profile) for s in blocks}
            if kind == "attention" and self._attention == "keep":
                kept[expert] = {b: torch.ones_like(v, dtype=torch.bool) for b, v in importances[expert].items()}
                continue
            densities = {s.block: self._of_block[s.block]["density"].get(expert, 1.0) for s in blocks}
            kept[expert] = select(importances[expert], blocks, densities, self._scope)
            if kind == "mlp":
                masks = kept[expert].values()
                self.kept[expert] = (sum(int(mask.sum()) for mask in masks), sum(map(len, masks)))
        for s in blocks:
            wanted = torch.stack([kept[e][s.block] for e in self.experts])
            if kind == "mlp":
                self.contested += int((wanted.sum(dim=0) > 1).sum())
            self.coefficients[s.block] = conflict_coefficients(
                torch.stack([importances[e][s.block] for e in self.experts]),
                wanted,
                [self._of_block[s.block]["weight"].get(e, 0.0) for e in self.experts],
                self._conflict,
            )

    def _ranked_with(self, tensor: PlannedTensor) -> str:
        """What a tensor's neurons are ranked together with."""
        return "the model (scope: model)" if self._scope == "model" else self.layout.slices[tensor.name].layer
