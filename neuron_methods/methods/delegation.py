"""Tensors that a method of ours delegates to other methods: any name in mergekit's registry.

A parameter of ours (a *slot*: `rest`, `within`) names the method. Parameters reach it like this, for each tensor:

1. `SLOT_NAME` (`rest_density`, `within_normalize`), wherever the YAML may set a parameter;
2. else NAME itself: as our method resolved it where both have it and ours hands it on (`weight`, `density`,
   `lambda`), as the YAML sets it where only the other method has it;
3. else the other method's own default.

mergekit resolves declared parameters only, so a method that delegates is *configured* before planning: a copy whose
spec also declares theirs. The other methods compute in float32 whatever dtype the models are stored in.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    MergeMethod,
    ParameterScope,
    ParameterSpec,
    TensorEntry,
    TensorGroup,
    TensorMetadata,
)
from torch import Tensor

from neuron_methods.kernels.rows import CACHE_BYTES, row_blocks
from neuron_methods.kernels.select import combine_bytes, combine_slices
from neuron_methods.kernels.task_vectors import TaskVector
from neuron_methods.methods.contract import (
    Inputs,
    MergeSettings,
    PlannedMethod,
    PlannedTensor,
    PreparedMerge,
    by_expert,
    grouped,
    only_value,
)
from neuron_methods.methods.footprint import ENTRYWISE, bytes_of_method
from neuron_methods.methods.neuron_layout import NeuronLayout, Slices
from neuron_methods.methods.parameters import declared
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import unknown

_BASE = "the base"
# Parameters of ours that reach the method of `rest` under the same name.
_HANDED_ON = {"weight", "density", "lambda"}
_MERGED_WHOLE = ", but a neuron is merged whole; give one value, or a filter that covers all of them"


class DelegatingMethod(PlannedMethod):
    """A planned method that leaves some tensors to other methods.

    Attributes:
        slots: parameters whose value names a method.
    """

    slots: ClassVar[tuple[str, ...]] = ()

    def configured(self, words: Mapping[str, Iterable[Any]]) -> DelegatingMethod:
        """Copy this method, and give the copy the parameters of the methods it will use.

        Args:
            words: per slot every value that the configuration gives it anywhere; its default is added.

        Raises:
            UserError: no method has that name.
        """
        own = {p.name: p for p in self.spec.parameters}
        scopes: dict[str, dict[ParameterScope, str]] = {}
        for slot in self.slots:
            named = dict.fromkeys([*words.get(slot, ()), own[slot].default])
            for method in filter(None, (find_method(slot, word) for word in named)):
                for parameter in method.spec.parameters:
                    shared = parameter.scope == ParameterScope.SHARED
                    for name in (f"{slot}_{parameter.name}", parameter.name):
                        of_name = scopes.setdefault(name, {})
                        of_name[ParameterScope.SHARED if shared else ParameterScope.NON_BASE] = slot
        # Where it is one for all here and one per expert there, only the long names can say which.
        extra = [
            ParameterSpec(name, Any, scope, default=None, description=f"for {slot}")
            for name, found in scopes.items()
            for scope, slot in found.items()
            if name not in own and len(found) == 1
        ]
        configured = copy.copy(self)
        configured.spec = replace(self.spec, parameters=(*self.spec.parameters, *extra))
        return configured


def method_of(slot: str, *words: str, default: str, about: str) -> ParameterSpec:
    """Declare a parameter that names a registered method, or is one of a few other words."""

    def validate(value: Any) -> str:
        if value not in words and find_method(slot, value) is None:
            raise UserError(f"{slot}: {value!r} is no merge method; name one that mergekit knows")
        return str(value)

    return declared(slot, validate, default, "merge", about)


def find_method(slot: str, name: Any) -> MergeMethod | None:
    """Find the registered method of a name; None for `base`, which is no method.

    Raises:
        UserError: there is none, or it delegates tensors itself.
    """
    if name == "base":
        return None
    methods = {method.spec.name: method for method in registry.registered_methods()}
    if name not in methods:
        raise UserError(f"{slot}: {unknown('merge method', name, [*methods, 'base'])}")
    if isinstance(methods[name], DelegatingMethod):
        raise UserError(f"{slot}: {name} divides its tensors among other methods and cannot itself be one of them")
    return methods[name]


class Delegation:
    """The tensors that are left to one method, with its own parameters."""

    def __init__(
        self,
        slot: str,
        method: MergeMethod,
        tensors: Iterable[PlannedTensor],
        private: Iterable[str],
        fixed: Mapping[str, Any] | None = None,
        told_as: str = "",
    ) -> None:
        """Resolve the method's parameters for every tensor, and prepare it if it is a planned one.

        Args:
            slot: the parameter that names the method.
            method: the method.
            tensors: what it will merge, with the parameters of the method that delegates.
            private: parameters of the method that delegates which mean something else to this one.
            fixed: parameters that have been applied already, and the values that make the method leave them alone.
            told_as: whose findings those of the method are, if not the slot's.

        Raises:
            UserError: a parameter is missing, the method does not take this many inputs, or it refuses them.
        """
        self.slot, self.method, self.told_as = slot, method, told_as or slot
        self._private, self._fixed = set(private), fixed or {}
        self._takes_base = method.spec.contract.base in (BasePolicy.REQUIRED, BasePolicy.OPTIONAL)
        self.tensors = {tensor.name: self._resolved(tensor) for tensor in tensors}
        self.prepared: PreparedMerge | None = None
        if isinstance(method, PlannedMethod) and self.tensors:
            self.prepared = method.prepare(list(self.tensors.values()))

    def merge(self, inputs: Inputs, out_dtype: torch.dtype) -> Tensor:
        """Merge one of the tensors, whose experts may be `TaskVector`s; raises UserError if the method cannot."""
        if self.method.spec.name in ENTRYWISE and inputs.base.ndim:
            return self._merge_in_blocks(inputs, out_dtype)
        return self._merge_whole(inputs, out_dtype)

    def scratch(self, name: str, shape: Sequence[int], experts: int) -> int:
        """Bound the bytes that `merge` takes for a tensor; see `PreparedMerge.scratch`."""
        if self.prepared is not None:
            return self.prepared.scratch(name, shape, experts)
        entries = math.prod(shape)
        inputs = experts + self._takes_base
        if self.method.spec.name in ENTRYWISE and shape:
            of_row = 4 * entries // max(1, shape[0])
            block = min(max(CACHE_BYTES // (inputs + 2), of_row), 4 * entries) // 4
            return 4 * entries + block * 4 * inputs + bytes_of_method(self.method.spec.name, block, inputs, 4)
        return 4 * entries * inputs + bytes_of_method(self.method.spec.name, entries, inputs, 4)

    def _merge_in_blocks(self, inputs: Inputs, out_dtype: torch.dtype) -> Tensor:
        """Merge rows of a tensor at a time, so that no copy of an expert is held whole."""
        name, base, experts = inputs
        merged = torch.empty(base.shape, dtype=out_dtype, device=base.device)
        width = 4 * (base.numel() // max(1, len(base))) * (len(experts) + 3)
        for block in row_blocks(len(base), width, CACHE_BYTES):
            rows = Inputs(name, base[block], {expert: tensor[block] for expert, tensor in experts.items()})
            merged[block].copy_(self._merge_whole(rows, out_dtype))
        return merged

    def _merge_whole(self, inputs: Inputs, out_dtype: torch.dtype) -> Tensor:
        name, base, experts = inputs
        planned = self.tensors[name]
        direct = self.prepared is not None  # a method of ours, which takes task vectors
        # A method that has no use for a base would take it for one more expert.
        entries = [TensorEntry(_BASE, base if direct else base.float(), is_base=True)] if self._takes_base else []
        entries += [TensorEntry(e, tensor if direct else _weights(tensor, base)) for e, tensor in experts.items()]
        group = TensorGroup(tuple(entries), TensorMetadata(name))
        parameters = {p: {e: of[e] for e in experts} for p, of in planned.expert_parameters.items()}
        parameters |= planned.parameters
        try:
            if self.prepared is not None:
                return self.prepared.merge(group, parameters, out_dtype)
            (merged,) = self.method((group,), parameters=parameters, out_dtype=out_dtype)
        except ValueError as error:
            raise UserError(f"{name}: {self.slot}: {self.method.spec.name}: {error}") from None
        return merged

    def _resolved(self, tensor: PlannedTensor) -> PlannedTensor:
        """The tensor with the method's own parameters."""
        experts = list(tensor.expert_parameters["weight"])
        shared: dict[str, Any] = {}
        per_expert: dict[str, dict[Hashable, Any]] = {}
        for parameter in self.method.spec.parameters:
            if parameter.scope == ParameterScope.SHARED:
                shared[parameter.name] = self._value(parameter, tensor, None)
            else:
                per_expert[parameter.name] = {e: self._value(parameter, tensor, e) for e in experts}
        try:
            self.method.validate_inputs([_BASE, *experts][not self._takes_base :], _BASE if self._takes_base else None)
        except ValueError as error:
            raise UserError(f"{self.slot}: {self.method.spec.name}: {error}") from None
        return replace(tensor, parameters=shared, expert_parameters=per_expert)

    def _value(self, parameter: ParameterSpec, tensor: PlannedTensor, expert: Any) -> Any:
        def given(name: str) -> Any:
            if expert is None:
                return tensor.parameters.get(name)
            return tensor.expert_parameters.get(name, {}).get(expert)

        name = parameter.name
        value = given(f"{self.slot}_{name}")
        if value is None:
            value = self._fixed.get(name)
        if value is None and name not in self._private:
            value = given(name)
        if value is None and parameter.required:
            whose = f" of {expert}" if expert is not None else ""
            raise UserError(
                f"{self.slot}: {self.method.spec.name} needs the parameter {name!r}{whose}; give {self.slot}_{name} "
                f"(at {tensor.name})"
            )
        try:
            return parameter.validate(parameter.default if value is None else value)
        except UserError as error:
            raise UserError(f"{self.slot}: {self.method.spec.name}: {error}") from None
        except ValueError:
            raise UserError(
                f"{self.slot}: {self.method.spec.name} cannot take {value!r} for its parameter {name!r}"
            ) from None


class DelegatingMerge(PreparedMerge):
    """A merge that knows whose neurons its tensors are, and leaves some tensors to other methods.

    Attributes:
        name: of the method, for messages.
        tensors: the plan.
        layout: whose slices the tensors are.
        experts: ids, in the order of the plan.
        rest: tensor name -> who merges it; None keeps the base's.
    """

    def __init__(self, method: DelegatingMethod, tensors: Sequence[PlannedTensor]) -> None:
        """Lay out the plan.

        Raises:
            UserError: as `NeuronLayout` does.
        """
        self.name, self.tensors = method.spec.name, tensors
        self.layout = NeuronLayout(tensors, self.name)
        self.experts = list(by_expert(tensors, "weight"))
        self.rest: dict[str, Delegation | None] = {}
        self._own = frozenset(p.name for p in type(method).spec.parameters)

    @property
    def delegations(self) -> list[Delegation]:
        """Who merges what this method does not, each once."""
        return list(dict.fromkeys(filter(None, self.rest.values())))

    def agreed(self, tensors: Sequence[PlannedTensor], names: Iterable[str], where: str) -> dict[str, Any]:
        """Read parameters that have to be the same for all of some tensors, as one neuron owns slices of all of them.

        Args:
            tensors: at least one.
            names: the parameters.
            where: what the tensors are, for messages: "layers.3", "the model".

        Returns:
            {name: value, or {expert id: value}}.

        Raises:
            UserError: one of them varies.
        """

        def one(what: str, values: Iterable[Any]) -> Any:
            return only_value(values, f"{self.name}: {what} varies over the tensors of {where}", _MERGED_WHOLE)

        found: dict[str, Any] = {}
        for name in names:
            if name in tensors[0].parameters:
                found[name] = one(name, (t.parameters[name] for t in tensors))
            else:
                found[name] = {e: one(f"{name} of {e}", values) for e, values in by_expert(tensors, name).items()}
        return found

    def leave(self, tensors: Sequence[PlannedTensor]) -> None:
        """Leave tensors to the methods that `rest` names, or to the base."""
        for name, together in grouped(tensors, lambda tensor: tensor.parameters["rest"]).items():
            method = find_method("rest", name)
            who = Delegation("rest", method, together, self._own - _HANDED_ON) if method is not None else None
            self.rest.update(dict.fromkeys((tensor.name for tensor in together), who))

    def reads(self) -> set[str]:
        """Name the tensors that the other methods read in advance."""
        return set().union(*(d.prepared.reads() for d in self.delegations if d.prepared is not None))

    def measure(self, settings: MergeSettings) -> None:
        """Let the other methods measure what is theirs."""
        super().measure(settings)
        for delegation in self.delegations:
            if delegation.prepared is not None:
                delegation.prepared.measure(settings)

    def scratch(self, name: str, shape: Sequence[int], experts: int) -> int:
        """See `PreparedMerge.scratch`; of a tensor of neurons it is that of `combine`."""
        result = 4 * math.prod(shape)
        if name in self.rest:
            delegation = self.rest[name]
            return result if delegation is None else delegation.scratch(name, shape, experts)
        return result + combine_bytes(shape, experts)

    def measuring(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """See `PreparedMerge.measuring`."""
        return max((d.prepared.measuring(shapes) for d in self.delegations if d.prepared is not None), default=0)

    def remaining(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """See `PreparedMerge.remaining`."""
        return sum(d.prepared.remaining(shapes) for d in self.delegations if d.prepared is not None)

    def tellers(self) -> list[PreparedMerge]:
        """List who tells something: this merge, and those of the other methods."""
        return [self, *(delegation.prepared for delegation in self.delegations if delegation.prepared is not None)]

    def findings(self) -> list[str]:
        """Tell what the other methods found, each line with the parameter that names its method."""
        return [
            f"{delegation.told_as}: {line}"
            for delegation in self.delegations
            if delegation.prepared is not None
            for line in delegation.prepared.findings()
        ]

    def merge_tensor(self, inputs: Inputs, parameters: Mapping[str, Any], out_dtype: torch.dtype) -> Tensor:
        """Merge one tensor: by this method's own steps, by the method of `rest`, or as the base has it."""
        merged = self.merge_neurons(inputs, parameters, out_dtype)
        if merged is not None:
            return merged
        delegation = self.rest.get(inputs.name)
        if delegation is None:
            return inputs.base.to(out_dtype, copy=True)
        return delegation.merge(inputs, out_dtype)

    def combine(self, inputs: Inputs, slices: Slices, coefficients: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """Merge a tensor of neurons into θ₀ + λ Σ_t a_t τ_t, a_t being `coefficients` and λ `scale`."""
        return combine_slices(
            inputs.base,
            list(inputs.experts.values()),
            coefficients,
            slices.axis,
            torch.empty_like(inputs.base, dtype=dtype),
            scale=scale,
            copies=slices.copies,
            clean=self.settings.allow_nonfinite,
        )

    @abstractmethod
    def merge_neurons(self, inputs: Inputs, parameters: Mapping[str, Any], out_dtype: torch.dtype) -> Tensor | None:
        """Merge a tensor of neurons; None for one that is left to another method, or to the base."""


def _weights(expert: Tensor, base: Tensor) -> Tensor:
    """θ_t in float32, from the weights or the task vector."""
    if isinstance(expert, TaskVector):
        return expert.dense().float() + base.float()
    return expert.float()


def configured_values(setting: Any) -> Iterator[Any]:
    """Yield every value that a parameter's setting in a configuration may take, conditions and gradients included."""
    if isinstance(setting, (list, tuple)):
        for entry in setting:
            yield from configured_values(entry)
    elif hasattr(setting, "value"):
        yield from configured_values(setting.value)
    else:
        yield setting
