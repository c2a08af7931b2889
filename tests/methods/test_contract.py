"""What methods of ours share: parameters with names and ranges, the context of a merge, the plan in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from mergekit.common import ModelReference
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from torch import Tensor

from neuron_methods.methods.contract import (
    MergeContext,
    PlannedMethod,
    PlannedTensor,
    choice,
    current_context,
    merge_context,
    number,
    number_or,
)
from neuron_methods.support.errors import UserError


def spec(value_type: Any) -> ParameterSpec:
    return ParameterSpec("knob", value_type, ParameterScope.SHARED)


@pytest.mark.parametrize(("value", "expected"), [(0, 0.0), (1, 1.0), (0.5, 0.5), ("0.25", 0.25), ("1e-3", 1e-3)])
def test_numbers_within_bounds_are_floats(value: object, expected: float) -> None:
    found = spec(number("knob", 0.0, 1.0)).validate(value)
    assert found == expected
    assert isinstance(found, float)


@pytest.mark.parametrize("value", [-0.001, 1.001, math.nan, math.inf, "x", "", None, [0.5], True, False])
def test_numbers_out_of_bounds_are_refused(value: object) -> None:
    with pytest.raises(UserError) as error:
        spec(number("knob", 0.0, 1.0)).validate(value)
    assert str(error.value) == f"knob must be a number in [0, 1]; got {value!r}"


def test_open_bounds_are_out_of_bounds() -> None:
    assert spec(number("knob", 0.0, 1.0, low_open=True)).validate(1e-300) == 1e-300
    with pytest.raises(UserError, match=r"^knob must be a number in \(0, 1\]; got 0$"):
        spec(number("knob", 0.0, 1.0, low_open=True)).validate(0)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "many"])
def test_unbounded_numbers_are_finite(value: object) -> None:
    assert spec(number("knob")).validate(-1e300) == -1e300
    with pytest.raises(UserError, match=r"^knob must be a finite number; got "):
        spec(number("knob")).validate(value)


def test_choices() -> None:
    assert spec(choice("knob", "one", "two")).validate("two") == "two"
    for wrong in ("three", 1, None, "One", ""):
        with pytest.raises(UserError) as error:
            spec(choice("knob", "one", "two")).validate(wrong)
        assert str(error.value) == f"knob must be one of one, two; got {wrong!r}"


def test_a_number_or_a_word() -> None:
    knob = spec(number_or("knob", "auto"))
    assert knob.validate("auto") == "auto"
    assert knob.validate("0.5") == 0.5
    assert knob.validate(-3) == -3.0
    for wrong in ("Auto", math.inf, math.nan, None, True, [1.0]):
        with pytest.raises(UserError) as error:
            knob.validate(wrong)
        assert str(error.value) == f"knob must be a finite number or 'auto'; got {wrong!r}"


class Recorder(PlannedMethod):
    """Adds the mean update to the base, and keeps what it was shown."""

    spec = MergeMethodSpec(
        name="recorder",
        parameters=(
            ParameterSpec("weight", number("weight"), ParameterScope.NON_BASE, default=1.0),
            ParameterSpec("shared", str, ParameterScope.SHARED, default="x"),
        ),
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    )

    def __init__(self) -> None:
        self.checked: list[Sequence[PlannedTensor]] = []
        self.measured: list[Sequence[PlannedTensor]] = []
        self.contexts: list[MergeContext | None] = []
        self.dtypes: list[list[torch.dtype]] = []
        self.gradients: list[bool] = []
        self.refuse = False

    def check(self, tensors: Sequence[PlannedTensor]) -> None:
        self.checked.append(tensors)
        if self.refuse:
            raise UserError("refused")

    def measure(self, tensors: Sequence[PlannedTensor], context: MergeContext) -> Any:
        self.measured.append(tensors)
        self.gradients.append(torch.is_grad_enabled())
        return {"measured": len(tensors)}

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        context = current_context()
        self.contexts.append(context)
        self.dtypes.append([entry.tensor.dtype for entry in group.entries])
        self.gradients.append(torch.is_grad_enabled())
        assert context is not None
        return group.base.tensor.to(context.out_dtype or torch.float32)


def models(**tensors: Tensor) -> dict[str, dict[str, Tensor]]:
    return {"base": tensors, "a": {name: tensor + 1 for name, tensor in tensors.items()}}


def test_a_merge_in_memory_is_checked_and_measured_once_over_all_tensors() -> None:
    method = Recorder()
    merge_state_dicts(models(x=torch.zeros(2), y=torch.ones(3, 4)), method, base="base", parameters={"weight": [0.5]})
    assert len(method.checked) == len(method.measured) == 1
    tensors = method.measured[0]
    assert [t.name for t in tensors] == ["x", "y"]
    assert [t.parameters for t in tensors] == [{"shared": "x"}] * 2
    assert [dict(t.expert_parameters["weight"]) for t in tensors] == [{"a": 0.5}] * 2
    base, experts = tensors[1].load()
    assert base.tolist() == torch.ones(3, 4).tolist()
    assert {e: t.tolist() for e, t in experts.items()} == {"a": torch.full((3, 4), 2.0).tolist()}
    assert [context.state for context in method.contexts] == [{"measured": 2}] * 2


def test_what_check_refuses_is_not_measured() -> None:
    method = Recorder()
    method.refuse = True
    with pytest.raises(UserError, match="refused"):
        merge_state_dicts(models(x=torch.zeros(2)), method, base="base")
    assert method.measured == method.contexts == []


def test_a_context_that_was_measured_is_not_measured_again() -> None:
    method = Recorder()
    context = MergeContext(state="known", scratch_bytes=7)
    with merge_context(context):
        merge_state_dicts(models(x=torch.zeros(2)), method, base="base")
    assert method.measured == []
    assert (method.contexts[0].state, method.contexts[0].scratch_bytes) == ("known", 7)


def test_a_context_without_state_keeps_its_settings_and_stays_as_it_was() -> None:
    method = Recorder()
    context = MergeContext(allow_nonfinite=True, scratch_bytes=7)
    with merge_context(context):
        merge_state_dicts(models(x=torch.zeros(2)), method, base="base")
        merge_state_dicts(models(x=torch.zeros(2), y=torch.zeros(2)), method, base="base")
    assert [len(tensors) for tensors in method.measured] == [1, 2]
    assert context.state is None
    assert all(found.allow_nonfinite and found.scratch_bytes == 7 for found in method.contexts)


def test_contexts_nest_and_end() -> None:
    outer, inner = MergeContext(), MergeContext()
    assert current_context() is None
    with merge_context(outer):
        with pytest.raises(ZeroDivisionError), merge_context(inner):
            assert current_context() is inner
            raise ZeroDivisionError
        assert current_context() is outer
    assert current_context() is None


def test_inputs_come_in_the_dtype_they_are_stored_in() -> None:
    stored = {"base": {"x": torch.zeros(2).half()}, "a": {"x": torch.zeros(2).half()}}
    for dtype, out_dtype, written in (
        (None, None, torch.float16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, None, torch.float32),
        (None, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
    ):
        method = Recorder()
        merged = merge_state_dicts(stored, method, base="base", dtype=dtype, out_dtype=out_dtype)
        assert method.dtypes == [[torch.float16, torch.float16]]
        assert method.contexts[0].out_dtype == merged["x"].dtype == written


def test_mixed_dtypes_are_promoted_and_not_rounded() -> None:
    method = Recorder()
    merged = merge_tensors(
        [torch.zeros(2).half(), torch.zeros(2).bfloat16()], method, base_index=0, dtype=torch.float16
    )
    assert method.dtypes == [[torch.float32, torch.float32]]
    assert merged.dtype == torch.float16


def test_nothing_is_differentiated() -> None:
    method = Recorder()
    merge_state_dicts([torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)], method, base=0)
    assert method.gradients == [False] * 3
    assert torch.is_grad_enabled()


def test_tied_weights_in_memory_repeat() -> None:
    method = Recorder()
    tensor, copy = torch.zeros(2), torch.zeros(2)
    stored = {"x": tensor, "tied": tensor, "copied": copy, "empty": torch.zeros(0)}
    expert = torch.ones(2)
    experts = {"x": expert, "tied": expert, "copied": torch.ones(2), "empty": torch.zeros(0)}
    merge_state_dicts({"base": stored, "a": experts}, method, base="base")
    assert {t.name: t.repeats for t in method.measured[0]} == {
        "x": False,
        "tied": True,
        "copied": False,
        "empty": False,
    }
    untied = Recorder()
    merge_state_dicts({"base": stored, "a": {**experts, "tied": torch.ones(2)}}, untied, base="base")
    assert not any(t.repeats for t in untied.measured[0])


def test_a_plan_that_nobody_showed_is_refused() -> None:
    references = [ModelReference.model_validate(name) for name in ("base", "expert")]
    with pytest.raises(UserError, match=r"^layer\.weight: mergekit runs this merge without showing its plan"):
        merge_tensors([torch.zeros(2)] * 2, Recorder(), base_index=0, ids=references, name="layer.weight")
