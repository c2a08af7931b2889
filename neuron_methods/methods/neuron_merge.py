"""NeuronMerge: task arithmetic with one set of weights per functional group of neurons.

Gu et al., "NeuronMerge: Merging Models via Functional Neuron Groups", Findings of ACL 2025, 2025.findings-acl.471.

1. Describe    every MLP neuron of the base by its top activations             `mergekit-neuron profile`
2. Classify    it into one functional group                                    `mergekit-neuron groups`
3. Merge       neurons of group g, over all slices of tensors they own:        kernels/select.py
               θ₀ + λ Σ_t λ_{g,t} τ_t,   λ_{g,t} = weight_t · (in_group where g is t's own group, `general` for general
               neurons, out_group for other experts' groups)
4. The rest    attention, embeddings, norms: the method that `rest` names

`within` names another method for step 3: it merges each group by itself, as if the group's rows and columns were all
there is, from experts θ₀ + λ_{g,t} τ_t with weight 1 each, and λ scales the difference it makes. A method that
measures the whole model first (`neuro_merging`) measures one group at a time.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

from neuron_methods.kernels.groups import group_coefficient
from neuron_methods.kernels.select import combine_slices
from neuron_methods.kernels.task_vectors import TaskVector, fill_task_vector
from neuron_methods.methods.contract import MergeContext, PlannedTensor, number
from neuron_methods.methods.groups_file import NeuronGroups
from neuron_methods.methods.inner import (
    CompositeMethod,
    InnerMerge,
    find_method,
    is_floating,
    method_name,
    rest_merges,
)
from neuron_methods.methods.neuron_layout import NeuronLayout, Slices, agreed, experts_of
from neuron_methods.support.errors import UserError

NAME = "neuron_merge"
# The default of `within`. Its formula is a sum of task vectors, which needs no detour over another method.
PLAIN = "task_arithmetic"

PARAMETERS = (
    ParameterSpec(
        "groups",
        str,
        ParameterScope.SHARED,
        default="",
        description="file of mergekit-neuron groups, of the base model",
    ),
    ParameterSpec(
        "group",
        str,
        ParameterScope.NON_BASE,
        default="",
        description="functional group the expert was trained for",
    ),
    ParameterSpec(
        "weight",
        number("weight"),
        ParameterScope.NON_BASE,
        default=1.0,
        description="multiplies the expert's task vector in all groups",
    ),
    ParameterSpec(
        "in_group",
        number("in_group"),
        ParameterScope.NON_BASE,
        default=1.0,
        description="factor for neurons of the expert's own group",
    ),
    ParameterSpec(
        "out_group",
        number("out_group"),
        ParameterScope.NON_BASE,
        default=0.0,
        description="factor for neurons of other experts' groups",
    ),
    ParameterSpec(
        "general",
        number("general"),
        ParameterScope.SHARED,
        default=0.5,
        description="factor for general neurons",
    ),
    ParameterSpec(
        "lambda",
        number("lambda"),
        ParameterScope.SHARED,
        default=1.0,
        description="scale of the merged update; also handed to rest, where its method has a lambda",
    ),
    ParameterSpec(
        "within",
        method_name("within"),
        ParameterScope.SHARED,
        default=PLAIN,
        description="merge method within a group",
    ),
    ParameterSpec(
        "rest",
        method_name("rest", "base"),
        ParameterScope.SHARED,
        default=PLAIN,
        description="merge method for everything that is no MLP neuron's, or base",
    ),
)
_FACTORS = ("weight", "in_group", "out_group")


@dataclass
class GroupedPlan:
    """How each tensor is merged.

    Attributes:
        layout: whose slices the tensors are.
        groups: the file.
        factors: layer -> {group: {expert: λ_{g,t}}}.
        within: group -> the method that merges it; empty where plain task arithmetic does.
        rest: tensor name -> the method that merges it; None keeps the base's.
    """

    layout: NeuronLayout
    groups: NeuronGroups
    factors: dict[str, dict[str, dict[Hashable, float]]]
    within: dict[str, InnerMerge] = field(default_factory=dict)
    rest: dict[str, InnerMerge | None] = field(default_factory=dict)

    def coefficients(self, layer: str, experts: Sequence[Hashable]) -> Tensor:
        """λ_{g,t} of every neuron of a layer, shape (experts, neurons), float64."""
        labels = self.groups.labels[layer]
        table = [[self.factors[layer][g].get(e, 0.0) for g in self.groups.groups] for e in experts]
        return torch.tensor(table, dtype=torch.float64)[:, labels]

    def indices(self, slices: Slices, group: str) -> Tensor:
        """Which slices of a tensor belong to a group's neurons, int64."""
        neurons = self.groups.neurons_of(group, slices.layer)
        width = len(self.groups.labels[slices.layer])
        return torch.cat([neurons + copy * width for copy in range(slices.copies)])

    @property
    def inner(self) -> list[InnerMerge]:
        """All inner methods, each once."""
        return [*self.within.values(), *dict.fromkeys(filter(None, self.rest.values()))]


class NeuronMerge(CompositeMethod):
    """The method `neuron_merge` as mergekit sees it."""

    takes_task_vectors = True
    slots = ("within", "rest")

    spec = MergeMethodSpec(
        name=NAME,
        pretty_name="NeuronMerge",
        reference_url="https://aclanthology.org/2025.findings-acl.471/",
        parameters=PARAMETERS,
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
    )

    def check(self, tensors: Sequence[PlannedTensor]) -> None:
        """Refuse groups that do not fit model or experts, and what inner methods refuse.

        Raises:
            UserError: naming the file, the group, or the parameter.
        """
        if tensors:
            for inner in self._plan(tensors).inner:
                inner.check()

    def inner_merges(self, tensors: Sequence[PlannedTensor]) -> list[InnerMerge]:
        """The methods that `within` and `rest` name, `within` once per group."""
        return self._plan(tensors).inner if tensors else []

    def measure(self, tensors: Sequence[PlannedTensor], context: MergeContext) -> GroupedPlan:
        """Read the groups, and let inner methods measure what is theirs."""
        plan = self._plan(tensors)
        for inner in plan.inner:
            inner.measure(context)
        return plan

    def findings(self, state: GroupedPlan) -> list[str]:
        """How many neurons there are of each group."""
        counts = state.groups.counts().values()
        total = {group: sum(layer[group] for layer in counts) for group in state.groups.groups}
        return ["MLP neurons by group: " + ", ".join(f"{count:,} {group}" for group, count in total.items())]

    def merge_neurons(
        self,
        name: str,
        base: Tensor,
        experts: Mapping[Hashable, Tensor],
        context: MergeContext,
        parameters: Mapping[str, Any],
    ) -> Tensor | None:
        """Step 3 for a tensor of MLP neurons; step 4 has any other."""
        plan: GroupedPlan = context.state
        slices = plan.layout.slices.get(name)
        if slices is None or slices.kind != "mlp":
            return None
        slices.check_shape(name, base)
        merged = torch.empty_like(base, dtype=context.out_dtype or base.dtype)
        scale = parameters["lambda"]
        if not plan.within:
            return combine_slices(
                base,
                list(experts.values()),
                plan.coefficients(slices.layer, list(experts)),
                slices.axis,
                merged,
                scale=scale,
                copies=slices.copies,
                clean=context.allow_nonfinite,
            )
        wide = replace(context, out_dtype=torch.float32)
        for label, inner in plan.within.items():
            if name not in inner.tensors:
                continue
            indices = plan.indices(slices, label).to(base.device)
            origin, scaled = _part(base, experts, plan.factors[slices.layer][label], slices.axis, indices)
            part = inner.merge(name, origin, scaled, wide)
            part = torch.lerp(origin, part, scale) if scale != 1.0 else part
            merged.index_copy_(slices.axis, indices, part.to(merged.dtype))
        return merged

    def _plan(self, tensors: Sequence[PlannedTensor]) -> GroupedPlan:
        layout = NeuronLayout(tensors, NAME)
        experts = experts_of(tensors)
        mlp = layout.of_kind(tensors, "mlp")
        shared, _ = agreed(NAME, mlp, ("groups", "within"), experts, "the model")
        _, own = agreed(NAME, mlp, ("group",), experts, "the model")
        if not shared["groups"]:
            raise UserError(f"{NAME} needs groups: FILE, made by `mergekit-neuron groups` from a profile of the base")
        groups = NeuronGroups.read(shared["groups"])
        groups.check_model(shared["groups"], layout.neurons)
        groups.check_experts(shared["groups"], own["group"])
        by_layer: dict[str, list[PlannedTensor]] = {}
        for tensor in mlp:
            by_layer.setdefault(layout.slices[tensor.name].layer, []).append(tensor)
        factors = {layer: _factors(layer, t, experts, groups, own["group"]) for layer, t in by_layer.items()}
        rest = rest_merges(self, [*layout.of_kind(tensors), *layout.of_kind(tensors, "attention")])
        plan = GroupedPlan(layout, groups, factors, rest=rest)
        method = find_method("within", shared["within"])
        if not _is_plain(shared["within"], tensors):
            names = [p.name for p in type(self).spec.parameters]
            for group in groups.groups:
                inner = InnerMerge("within", method, fixed={"weight": 1.0, "lambda": 1.0})
                for tensor in mlp:
                    part = _planned_part(tensor, plan, group)
                    if part is not None:
                        inner.add(part, [e for e in experts if e in tensor.expert_parameters["weight"]], names)
                if inner.tensors:
                    plan.within[group] = inner
        return plan


def _factors(
    layer: str,
    tensors: Sequence[PlannedTensor],
    experts: Sequence[Hashable],
    groups: NeuronGroups,
    own: dict[Hashable, str],
) -> dict[str, dict[Hashable, float]]:
    """λ_{g,t} of a layer."""
    shared, values = agreed(NAME, tensors, ("general", *_FACTORS), experts, layer)
    return {
        group: {
            expert: values["weight"][expert]
            * group_coefficient(
                group,
                own[expert],
                in_group=values["in_group"][expert],
                out_group=values["out_group"][expert],
                general=shared["general"],
            )
            for expert in values["weight"]
        }
        for group in groups.groups
    }


def _is_plain(within: str, tensors: Sequence[PlannedTensor]) -> bool:
    """Whether `within` is task arithmetic as the formula has it."""
    if within != PLAIN:
        return False
    given = [t.parameters.get(f"within_{p}", t.parameters.get(p)) for t in tensors for p in ("normalize",)]
    changed = [t.parameters.get("within_lambda") for t in tensors]
    changed += [v for t in tensors for v in t.expert_parameters.get("within_weight", {}).values()]
    return not any(given) and all(value is None for value in changed)


def _planned_part(tensor: PlannedTensor, plan: GroupedPlan, group: str) -> PlannedTensor | None:
    """A group's part of a tensor, as if it were a tensor of its own; None where the layer has no such neuron."""
    slices = plan.layout.slices[tensor.name]
    indices = plan.indices(slices, group)
    if not len(indices):
        return None

    def load() -> tuple[Tensor | None, dict[Hashable, Tensor]]:
        base, experts = tensor.load()
        if not is_floating(base):
            return base, experts
        slices.check_shape(tensor.name, base)
        return _part(base, experts, plan.factors[slices.layer][group], slices.axis, indices.to(base.device))

    total = slices.copies * len(plan.groups.labels[slices.layer])
    entries = None if tensor.entries is None else tensor.entries * len(indices) // total
    return replace(tensor, load=load, entries=entries)


def _part(
    base: Tensor, experts: dict[Hashable, Tensor], factors: dict[Hashable, float], axis: int, indices: Tensor
) -> tuple[Tensor, dict[Hashable, Tensor]]:
    """(θ₀, {expert: λ_{g,t} τ_t as a task vector}) of some slices, float32."""
    if not is_floating(base):
        raise UserError("neuron_merge: MLP weights must be floating-point tensors")
    origin = base.index_select(axis, indices).float()
    scaled = {}
    for expert, tensor in experts.items():
        part = tensor.as_subclass(Tensor).index_select(axis, indices)
        part = part.as_subclass(TaskVector) if isinstance(tensor, TaskVector) else part
        update = fill_task_vector(torch.empty_like(origin), part, origin)
        scaled[expert] = update.mul_(factors[expert]).as_subclass(TaskVector)
    return origin, scaled
