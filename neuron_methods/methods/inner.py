"""Other methods at work within one of ours: any name in mergekit's registry, on the tensors ours leaves to it.

A parameter of ours (a *slot*: `rest`, `within`) names the method. Parameters reach it like this, for each tensor:

1. `SLOT_NAME` (`rest_density`, `within_normalize`), wherever the YAML may set a parameter;
2. else NAME itself: as our method resolved it where both have it and ours hands it on (`weight`, `density`,
   `lambda`), as the YAML sets it where only the inner method has it;
3. else the inner method's own default.

mergekit resolves declared parameters only, so a method with inner ones is *configured* before planning: a copy whose
spec also declares theirs. Inner methods compute in float32 whatever dtype the models are stored in.
"""

from __future__ import annotations

import copy
import difflib
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    MergeMethod,
    ParameterScope,
    ParameterSpec,
    PerInputValues,
    TensorEntry,
    TensorGroup,
    TensorMetadata,
)
from pydantic import BeforeValidator
from torch import Tensor

from neuron_methods.kernels.task_vectors import TaskVector
from neuron_methods.methods.contract import MergeContext, PlannedMethod, PlannedTensor, current_context, merge_context
from neuron_methods.methods.neuron_layout import experts_of
from neuron_methods.support.errors import UserError


class CompositeMethod(PlannedMethod):
    """A planned method that leaves some tensors to other methods.

    Attributes:
        slots: parameters whose value names a method.
        handed_on: own parameters that are handed on to inner methods under the same name.
    """

    slots: ClassVar[tuple[str, ...]] = ()
    handed_on: ClassVar[frozenset[str]] = frozenset({"weight", "density", "lambda"})

    def configured(self, words: Mapping[str, Iterable[Any]]) -> CompositeMethod:
        """This method, with the parameters of the methods it will use.

        Args:
            words: per slot every value that the configuration gives it anywhere; its default is added.

        Raises:
            UserError: no method has that name.
        """
        own = {p.name: p for p in self.spec.parameters}
        extra: dict[str, ParameterSpec] = {}
        ambiguous: set[str] = set()
        for slot in self.slots:
            named = dict.fromkeys([*words.get(slot, ()), own[slot].default])
            for method in filter(None, (find_method(slot, word) for word in named)):
                for parameter in method.spec.parameters:
                    scope = (
                        ParameterScope.SHARED if parameter.scope == ParameterScope.SHARED else ParameterScope.NON_BASE
                    )
                    for name in (f"{slot}_{parameter.name}", parameter.name):
                        if name in own or name in ambiguous:
                            continue
                        if name in extra and extra[name].scope != scope:
                            # One for all here, one per expert there: only the long names can say which.
                            del extra[name]
                            ambiguous.add(name)
                            continue
                        extra[name] = ParameterSpec(name, Any, scope, default=None, description=f"for {slot}")
        configured = copy.copy(self)
        configured.spec = replace(self.spec, parameters=(*self.spec.parameters, *extra.values()))
        return configured

    @abstractmethod
    def inner_merges(self, tensors: Sequence[PlannedTensor]) -> list[InnerMerge]:
        """The inner methods at work on a plan."""

    @abstractmethod
    def merge_neurons(
        self,
        name: str,
        base: Tensor,
        experts: Mapping[Hashable, Tensor],
        context: MergeContext,
        parameters: Mapping[str, Any],
    ) -> Tensor | None:
        """Merge a tensor that ours merges itself; None for one that `context.state.rest` has."""

    def measures(self, tensors: Sequence[PlannedTensor]) -> bool:
        """Whether an inner method reads tensors in advance."""
        return any(inner.measures() for inner in self.inner_merges(tensors))

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one tensor: by this method's own steps, by the method of `rest`, or as the base has it.

        Args:
            group: base and experts, all of one shape and device.
            **parameters: as the spec declares them.

        Returns:
            The merged tensor in the dtype mergekit asked for, else the base's.
        """
        context = current_context() or MergeContext()
        name, base = group.metadata.name or "tensor", group.base.tensor
        experts = {entry.id: entry.tensor for entry in group.non_base}
        merged = self.merge_neurons(name, base, experts, context, parameters)
        if merged is not None:
            return merged
        inner = context.state.rest.get(name)
        if inner is None:
            return copy_base(base, context)
        return inner.merge(name, base, experts, context, vocabulary_axis=group.metadata.vocabulary_axis)


def method_name(slot: str, *words: str) -> Any:
    """Type of a parameter that names a registered method, or is one of a few other words."""

    def validate(value: Any) -> str:
        if value not in words and find_method(slot, value) is None:
            raise UserError(f"{slot}: {value!r} is no merge method; name one that mergekit knows")
        return str(value)

    return Annotated[str, BeforeValidator(validate)]


def find_method(slot: str, name: Any) -> MergeMethod | None:
    """The registered method of that name; None for `base`, which is no method.

    Raises:
        UserError: there is none, or it has inner methods itself.
    """
    if name == "base":
        return None
    methods = {method.spec.name: method for method in registry.registered_methods()}
    if name not in methods:
        close = difflib.get_close_matches(str(name), [*methods, "base"], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f" (there are: {', '.join(methods)})"
        raise UserError(f"{slot}: no merge method is called {name!r}{hint}")
    if isinstance(methods[name], CompositeMethod):
        raise UserError(f"{slot}: {name} divides its tensors among other methods and cannot itself be one of them")
    return methods[name]


@dataclass(eq=False)
class InnerMerge:
    """One method on the tensors left to it.

    Attributes:
        slot: the parameter that names it.
        method: the method.
        fixed: its parameters that ours has already applied, and the values that make it leave them alone.
        tensors: what it will merge, with its own parameters; by name.
        state: what its own measuring pass found, for a method that is planned.
    """

    slot: str
    method: MergeMethod
    fixed: Mapping[str, Any] = field(default_factory=dict)
    handed_on: frozenset[str] = frozenset()
    tensors: dict[str, PlannedTensor] = field(default_factory=dict)
    state: Any = None

    @property
    def _planned(self) -> PlannedMethod | None:
        return self.method if isinstance(self.method, PlannedMethod) else None

    @property
    def takes_base(self) -> bool:
        """Whether the method is shown the base; methods that would take it for one more expert are not."""
        return self.method.spec.contract.base in (BasePolicy.REQUIRED, BasePolicy.OPTIONAL)

    @property
    def takes_task_vectors(self) -> bool:
        """Whether experts may come as task vectors."""
        return self._planned is not None and self._planned.takes_task_vectors

    def add(self, tensor: PlannedTensor, experts: Sequence[Hashable], own: Iterable[str]) -> None:
        """Take on a tensor.

        Args:
            tensor: with the outer method's parameters.
            experts: ids of its experts.
            own: names of the outer method's own parameters.

        Raises:
            UserError: a parameter is missing, or the method does not take this many inputs.
        """
        private = set(own) - self.handed_on
        shared: dict[str, Any] = {}
        per_expert: dict[str, dict[Hashable, Any]] = {}
        for parameter in self.method.spec.parameters:
            if parameter.scope == ParameterScope.SHARED:
                shared[parameter.name] = self._resolve(parameter, tensor, private, None)
            else:
                per_expert[parameter.name] = {e: self._resolve(parameter, tensor, private, e) for e in experts}
        self.tensors[tensor.name] = replace(tensor, parameters=shared, expert_parameters=per_expert)
        base_id = _BASE if self.takes_base else None
        ids = [*([_BASE] if self.takes_base else []), *experts]
        try:
            self.method.validate_inputs(ids, base_id)
        except ValueError as error:
            raise UserError(f"{self.slot}: {self.method.spec.name}: {error}") from None

    def check(self) -> None:
        """Let a planned method refuse what it cannot merge."""
        if self._planned is not None and self.tensors:
            self._planned.check(list(self.tensors.values()))

    def measures(self) -> bool:
        """Whether the method reads its tensors in advance."""
        return self._planned is not None and bool(self.tensors) and self._planned.measures(list(self.tensors.values()))

    def measure(self, context: MergeContext) -> None:
        """Run the method's own measuring pass over its tensors."""
        if self._planned is not None and self.tensors:
            self.state = self._planned.measure(list(self.tensors.values()), replace(context, state=None))

    def merge(
        self, name: str, base: Tensor, experts: Mapping[Hashable, Tensor], context: MergeContext, **metadata: Any
    ) -> Tensor:
        """Merge one of the tensors.

        Args:
            name: the tensor's.
            base: θ₀.
            experts: {id: θ_t, or a `TaskVector`}.
            context: the outer merge's.
            **metadata: `vocabulary_axis`, if the tensor has one.

        Returns:
            The merged tensor, in the dtype to be written.
        """
        planned = self.tensors[name]
        direct = self.takes_task_vectors
        entries = [TensorEntry(id=_BASE, tensor=base if direct else base.float(), is_base=True)] * self.takes_base
        entries += [
            TensorEntry(id=e, tensor=tensor if direct else _weights(tensor, base)) for e, tensor in experts.items()
        ]
        parameters = dict(planned.parameters)
        for parameter, values in planned.expert_parameters.items():
            parameters[parameter] = PerInputValues([(e, values[e]) for e in experts])
        group = TensorGroup(tuple(entries), TensorMetadata(name=name, **metadata))
        out_dtype = context.out_dtype or base.dtype
        inner_context = replace(context, state=self.state, out_dtype=out_dtype)
        try:
            with merge_context(inner_context):
                (merged,) = self.method._execute_resolved((group,), [parameters], out_dtype=out_dtype)
        except ValueError as error:
            raise UserError(f"{name}: {self.slot}: {self.method.spec.name}: {error}") from None
        return merged

    def _resolve(self, parameter: ParameterSpec, tensor: PlannedTensor, private: set[str], expert: Any) -> Any:
        def given(name: str) -> Any:
            if expert is None:
                return tensor.parameters.get(name)
            return tensor.expert_parameters.get(name, {}).get(expert)

        name = parameter.name
        value = given(f"{self.slot}_{name}")
        if value is None and name in self.fixed:
            value = self.fixed[name]
        if value is None and name not in private:
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


def rest_merges(method: CompositeMethod, tensors: Sequence[PlannedTensor]) -> dict[str, InnerMerge | None]:
    """The method that `rest` names for each tensor that belongs to no neuron; None for the base."""
    merges: dict[str, InnerMerge] = {}
    rest: dict[str, InnerMerge | None] = {}
    own = [p.name for p in type(method).spec.parameters]
    experts = experts_of(tensors)
    for tensor in tensors:
        word = tensor.parameters["rest"]
        found = find_method("rest", word)
        if found is None:
            rest[tensor.name] = None
            continue
        inner = merges.setdefault(word, InnerMerge("rest", found, handed_on=method.handed_on))
        inner.add(tensor, [e for e in experts if e in tensor.expert_parameters["weight"]], own)
        rest[tensor.name] = inner
    return rest


_BASE = "the base"


def _weights(expert: Tensor, base: Tensor) -> Tensor:
    """θ_t in float32, from the weights or the task vector."""
    if isinstance(expert, TaskVector):
        return expert.as_subclass(Tensor).float() + base.float()
    return expert.float()


def configured_values(setting: Any) -> Iterator[Any]:
    """Every value that a parameter's setting in a configuration may take, conditions and gradients included."""
    if isinstance(setting, (list, tuple)):
        for entry in setting:
            yield from configured_values(entry)
    elif hasattr(setting, "value"):
        yield from configured_values(setting.value)
    else:
        yield setting


def copy_base(base: Tensor, context: MergeContext) -> Tensor:
    """θ₀ in the dtype to be written."""
    return base.to(context.out_dtype or base.dtype, copy=True)


def is_floating(tensor: Tensor | None) -> bool:
    """Whether there is something to merge: buffers of integers are copied by mergekit."""
    return tensor is not None and torch.is_floating_point(tensor)
