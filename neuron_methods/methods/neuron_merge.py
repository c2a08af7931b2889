"""NeuronMerge: task arithmetic with one set of weights per functional group of neurons.

Gu et al., "NeuronMerge: Merging Models via Functional Neuron Groups", Findings of ACL 2025, 2025.findings-acl.471.

1. Describe    every MLP neuron of the base by its top activations             `mergekit-neuron profile`
2. Classify    it into one functional group                                    `mergekit-neuron groups`
3. Merge       neurons of group g, over all slices of tensors they own:        kernels/select.py
               θ₀ + λ Σ_t λ_{g,t} τ_t,   λ_{g,t} = weight_t · (in_group where g is t's own group, `general` for general
               neurons, out_group for other experts' groups)
4. The rest    attention, embeddings, norms: the method that `rest` names

Descriptions, groups and arithmetic per group are NeuronMerge's (Gu et al., abstract). What of the steps is ours is
listed in the method's spec.

`within` names another method for step 3: it merges each group by itself, as if the group's rows and columns were all
there is, from experts θ₀ + λ_{g,t} τ_t with weight 1 each, and λ scales the difference it makes. A method that
measures the whole model first (`neuro_merging`) measures one group at a time.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neuron_methods.kernels.task_vectors import TaskVector, fill_task_vector
from neuron_methods.methods.contract import Inputs, PlannedTensor, grouped
from neuron_methods.methods.delegation import DelegatingMerge, DelegatingMethod, Delegation, find_method, method_of
from neuron_methods.methods.groups_file import GENERAL, NeuronGroups
from neuron_methods.methods.neuron_layout import Slices
from neuron_methods.methods.parameters import method_spec, number, text
from neuron_methods.support.errors import UserError
from neuron_methods.support.sources import GU, ours

NAME = "neuron_merge"
# The default of `within`. Its formula is a sum of task vectors, which needs no detour over another method.
PLAIN = "task_arithmetic"

_FACTORS = ("general", "weight", "in_group", "out_group")


class NeuronMerge(DelegatingMethod):
    """The method `neuron_merge` as mergekit sees it."""

    slots = ("within", "rest")

    spec = method_spec(
        NAME,
        "NeuronMerge",
        GU,
        text("groups", about="file of mergekit-neuron groups, of the base model"),
        text("group", of="expert", about="functional group the expert was trained for"),
        number("weight", default=1.0, of="expert", about="multiplies the expert's task vector in all groups"),
        number("in_group", default=1.0, of="expert", about="factor for neurons of the expert's own group"),
        number("out_group", default=0.0, of="expert", about="factor for neurons of other experts' groups"),
        number("general", default=0.5, about="factor for general neurons"),
        number("lambda", default=1.0, about="scale of the merged update, and of rest's where its method has a lambda"),
        method_of("within", default=PLAIN, about="merge method within a group"),
        method_of("rest", "base", default=PLAIN, about="merge method for everything that is no MLP neuron's, or base"),
        ours=(
            ours(
                "how neurons come into groups: unless labels were imported, by the domain that has the largest share "
                "of a neuron's top activations, from a threshold of 0.6 on, where descriptions of neurons decide (Gu "
                "et al., abstract); and how `mergekit-neuron describe` asks a language model for those"
            ),
            ours(
                "the factors of an expert in its own group, in general neurons and in others' groups: 1, 0.5 and 0 "
                "unless they are set"
            ),
            ours("that any merge method may work within a group, and merges everything that is no MLP neuron's"),
        ),
    )

    def prepare(self, tensors: Sequence[PlannedTensor]) -> PreparedNeuronMerge:
        """Read the groups, and refuse those that fit neither model nor experts, and what other methods refuse.

        Raises:
            UserError: naming the file, the group, or the parameter.
        """
        return PreparedNeuronMerge(self, tensors)


class PreparedNeuronMerge(DelegatingMerge):
    """One merge by `neuron_merge`: how each tensor is merged.

    Attributes:
        groups: the file.
        within: group -> who merges it; empty where plain task arithmetic does.
    """

    def __init__(self, method: NeuronMerge, tensors: Sequence[PlannedTensor]) -> None:
        """See `NeuronMerge.prepare`."""
        super().__init__(method, tensors)
        mlp = self.layout.of_kind(tensors, "mlp")
        of_model = self.agreed(mlp, ("groups", "within", "group"), "the model")
        path, own = of_model["groups"], of_model["group"]
        if not path:
            raise UserError(f"{NAME} needs groups: FILE, made by `mergekit-neuron groups` from a profile of the base")
        self.groups = NeuronGroups.read(path)
        if (facts := tensors[0].model) is not None:
            digest = str(self.groups.made_from.get("weights", ""))
            facts.check_unchanged(f"groups {path}", None, self.groups.model, digest)
        counts = {layer: len(labels) for layer, labels in self.groups.labels.items()}
        self.layout.neurons.check_same(f"groups {path}: this file", self.groups.model, self.groups.model_type, counts)
        self.groups.check_experts(path, own)
        by_layer = grouped(mlp, lambda tensor: self.layout.slices[tensor.name].layer)
        self._factors = {layer: self._factors_of(layer, together, own) for layer, together in by_layer.items()}
        self.leave([*self.layout.of_kind(tensors), *self.layout.of_kind(tensors, "attention")])
        self.within: dict[str, Delegation] = {}
        of_a_group = find_method("within", of_model["within"])
        if of_a_group is not None and not _is_plain(of_model["within"], tensors):
            for group in self.groups.groups:
                parts = [part for part in (self._planned_part(tensor, group) for tensor in mlp) if part is not None]
                if parts:
                    # The experts come scaled, and λ scales what the method makes of them.
                    applied = {"weight": 1.0, "lambda": 1.0}
                    told_as = f"within {group}"
                    self.within[group] = Delegation("within", of_a_group, parts, self._own, applied, told_as)

    @property
    def delegations(self) -> list[Delegation]:
        """Who merges groups, and who merges the rest, each once."""
        return [*self.within.values(), *super().delegations]

    def scratch(self, name: str, shape: Sequence[int], experts: int) -> int:
        """See `PreparedMerge.scratch`; where `within` names a method, a group's part of base and experts is held."""
        largest = 0
        for group, delegation in self.within.items():
            if name in delegation.tensors:
                slices = self.layout.slices[name]
                part = [*shape]
                part[slices.axis] = len(self._indices(slices, group))
                held = 4 * math.prod(part) * (experts + 3) + delegation.scratch(name, part, experts)
                largest = max(largest, held)
        return 4 * math.prod(shape) + largest if largest else super().scratch(name, shape, experts)

    def findings(self) -> list[str]:
        """Tell how many neurons there are of each group, and what other methods found."""
        totals = self.groups.totals().items()
        own = "MLP neurons by group: " + ", ".join(f"{count:,} {group}" for group, count in totals)
        return [own, *super().findings()]

    def merge_neurons(self, inputs: Inputs, parameters: Mapping[str, Any], out_dtype: torch.dtype) -> Tensor | None:
        """Take step 3 for a tensor of MLP neurons; step 4 has any other."""
        name, base, experts = inputs
        slices = self.layout.slices.get(name)
        if slices is None or slices.kind != "mlp":
            return None
        slices.check_shape(name, base)
        scale = parameters["lambda"]
        if not self.within:
            return self.combine(inputs, slices, self._coefficients(slices.layer, list(experts)), scale, out_dtype)
        merged = torch.empty_like(base, dtype=out_dtype)
        for group, delegation in self.within.items():
            if name not in delegation.tensors:
                continue
            indices = self._indices(slices, group).to(base.device)
            origin, scaled = _part(base, experts, self._factors[slices.layer][group], slices.axis, indices)
            part = delegation.merge(Inputs(name, origin, scaled), torch.float32)
            part = torch.lerp(origin, part, scale) if scale != 1.0 else part
            merged.index_copy_(slices.axis, indices, part.to(merged.dtype))
        return merged

    def _factors_of(
        self, layer: str, tensors: Sequence[PlannedTensor], own: Mapping[Hashable, str]
    ) -> dict[str, dict[Hashable, float]]:
        """λ_{g,t} of a layer: {group: {expert: factor}}."""
        given = self.agreed(tensors, _FACTORS, layer)

        def share(group: str, expert: Hashable) -> float:
            if group == own[expert]:
                return given["in_group"][expert]
            return given["general"] if group == GENERAL else given["out_group"][expert]

        weights: dict[Hashable, float] = given["weight"]
        return {group: {e: weights[e] * share(group, e) for e in weights} for group in self.groups.groups}

    def _coefficients(self, layer: str, experts: Sequence[Hashable]) -> Tensor:
        """λ_{g,t} of every neuron of a layer, shape (experts, neurons), float64."""
        table = [[self._factors[layer][g].get(e, 0.0) for g in self.groups.groups] for e in experts]
        return torch.tensor(table, dtype=torch.float64)[:, self.groups.labels[layer]]

    def _indices(self, slices: Slices, group: str) -> Tensor:
        """Which slices of a tensor belong to a group's neurons, int64."""
        neurons = self.groups.neurons_of(group, slices.layer)
        width = len(self.groups.labels[slices.layer])
        return torch.cat([neurons + copy * width for copy in range(slices.copies)])

    def _planned_part(self, tensor: PlannedTensor, group: str) -> PlannedTensor | None:
        """A group's part of a tensor, as if it were a tensor of its own; None where the layer has no such neuron."""
        slices = self.layout.slices[tensor.name]
        indices = self._indices(slices, group)
        if not len(indices):
            return None

        def load() -> tuple[Tensor | None, dict[Hashable, Tensor]]:
            base, experts = tensor.load()
            if base is None or not base.is_floating_point():
                return base, experts
            slices.check_shape(tensor.name, base)
            return _part(base, experts, self._factors[slices.layer][group], slices.axis, indices.to(base.device))

        total = slices.copies * len(self.groups.labels[slices.layer])
        entries = None if tensor.entries is None else tensor.entries * len(indices) // total
        return replace(tensor, load=load, entries=entries)


def _is_plain(within: str, tensors: Sequence[PlannedTensor]) -> bool:
    """Whether `within` is task arithmetic as the formula has it."""
    if within != PLAIN:
        return False
    normalised = any(t.parameters.get("within_normalize", t.parameters.get("normalize")) for t in tensors)
    scaled = [t.parameters.get("within_lambda") for t in tensors]
    scaled += [v for t in tensors for v in t.expert_parameters.get("within_weight", {}).values()]
    return not normalised and all(value is None for value in scaled)


def _part(
    base: Tensor, experts: Mapping[Hashable, Tensor], factors: Mapping[Hashable, float], axis: int, indices: Tensor
) -> tuple[Tensor, dict[Hashable, Tensor]]:
    """(θ₀, {expert: λ_{g,t} τ_t as a task vector}) of some slices, float32."""
    origin = base.index_select(axis, indices).float()
    scaled: dict[Hashable, Tensor] = {}
    for expert, tensor in experts.items():
        part = tensor.as_subclass(Tensor).index_select(axis, indices)
        part = part.as_subclass(TaskVector) if isinstance(tensor, TaskVector) else part
        update = fill_task_vector(torch.empty_like(origin), part, origin)
        scaled[expert] = update.mul_(factors[expert]).as_subclass(TaskVector)
    return origin, scaled
