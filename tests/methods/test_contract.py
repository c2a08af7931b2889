"""What methods of ours share: parameters with names and ranges, the steps of a merge, the plan in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from mergekit.common import ModelReference
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    TensorGroup,
)
from torch import Tensor

from neuron_methods.methods.contract import (
    PREPARED,
    Inputs,
    MergeSettings,
    PlannedMethod,
    PlannedTensor,
    PreparedMerge,
)
from neuron_methods.methods.parameters import choice, number
from neuron_methods.support.errors import UserError


class Recorder(PlannedMethod):
    """Adds the mean update to the base, and keeps what it was shown."""

    spec = MergeMethodSpec(
        name="recorder",
        parameters=(
            number("weight", default=1.0, of="expert", about=""),
            choice("shared", "x", about=""),
        ),
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    )

    def __init__(self) -> None:
        self.prepared: list[Sequence[PlannedTensor]] = []
        self.measured: list[MergeSettings] = []
        self.merged: list[str | None] = []
        self.dtypes: list[list[torch.dtype]] = []
        self.written: list[torch.dtype] = []
        self.gradients: list[bool] = []
        self.refuse = False

    def prepare(self, tensors: Sequence[PlannedTensor]) -> PreparedMerge:
        self.prepared.append(tensors)
        if self.refuse:
            raise UserError("refused")
        return Recording(self)


class Recording(PreparedMerge):
    def __init__(self, method: Recorder) -> None:
        self.method = method

    def measure(self, settings: MergeSettings) -> None:
        self.method.measured.append(settings)
        self.method.gradients.append(torch.is_grad_enabled())

    def merge_tensor(self, inputs: Inputs, parameters: Mapping[str, Any], out_dtype: torch.dtype) -> Tensor:
        self.method.merged.append(inputs.name)
        self.method.dtypes.append([tensor.dtype for tensor in (inputs.base, *inputs.experts.values())])
        self.method.written.append(out_dtype)
        self.method.gradients.append(torch.is_grad_enabled())
        return inputs.base.to(out_dtype)


def models(**tensors: Tensor) -> dict[str, dict[str, Tensor]]:
    return {"base": tensors, "a": {name: tensor + 1 for name, tensor in tensors.items()}}


def test_a_merge_in_memory_is_prepared_and_measured_once_over_all_tensors() -> None:
    method = Recorder()
    merge_state_dicts(models(x=torch.zeros(2), y=torch.ones(3, 4)), method, base="base", parameters={"weight": [0.5]})
    (tensors,) = method.prepared
    assert len(method.measured) == 1
    assert [t.name for t in tensors] == method.merged == ["x", "y"]
    assert [t.parameters for t in tensors] == [{"shared": "x"}] * 2
    assert [dict(t.expert_parameters["weight"]) for t in tensors] == [{"a": 0.5}] * 2
    base, experts = tensors[1].load()
    assert base.tolist() == torch.ones(3, 4).tolist()
    assert {e: t.tolist() for e, t in experts.items()} == {"a": torch.full((3, 4), 2.0).tolist()}


def test_what_is_refused_is_neither_measured_nor_merged() -> None:
    method = Recorder()
    method.refuse = True
    with pytest.raises(UserError, match="refused"):
        merge_state_dicts(models(x=torch.zeros(2)), method, base="base")
    assert method.measured == method.merged == []


def test_a_merge_that_comes_prepared_is_not_prepared_again() -> None:
    method = Recorder()
    group = TensorGroup.from_tensors([torch.zeros(2), torch.ones(2)], base_index=0, name="x")
    (merged,) = method._execute_resolved((group,), [{PREPARED: Recording(method)}], out_dtype=torch.float16)
    assert method.prepared == method.measured == []
    assert method.merged == ["x"]
    assert merged.dtype == torch.float16


def test_no_tensors_are_merged_to_none() -> None:
    method = Recorder()
    assert merge_state_dicts({"base": {}, "a": {}}, method, base="base") == {}
    assert method.prepared == []


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
        assert method.written == [merged["x"].dtype] == [written]


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
    assert {t.name: t.repeats() for t in method.prepared[0]} == {
        "x": False,
        "tied": True,
        "copied": False,
        "empty": False,
    }
    untied = Recorder()
    merge_state_dicts({"base": stored, "a": {**experts, "tied": torch.ones(2)}}, untied, base="base")
    assert not any(t.repeats() for t in untied.prepared[0])


def test_a_plan_that_nobody_showed_is_refused() -> None:
    references = [ModelReference.model_validate(name) for name in ("base", "expert")]
    with pytest.raises(UserError, match=r"^layer\.weight: mergekit runs this merge without showing its plan"):
        merge_tensors([torch.zeros(2)] * 2, Recorder(), base_index=0, ids=references, name="layer.weight")
