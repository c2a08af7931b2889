from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_methods.kernels.select import (
    combine_slices,
    conflict_coefficients,
    keep_threshold,
    relative_norms,
    slice_squares,
)
from neuron_methods.kernels.task_vectors import TaskVector

torch.manual_seed(0)
BASE, EXPERT = torch.randn(6, 4), torch.randn(6, 4)


def test_squared_norms_follow_the_owned_axis() -> None:
    update = (EXPERT - BASE).double()
    for axis in (0, 1):
        assert torch.allclose(slice_squares(BASE, EXPERT, axis), update.square().sum(1 - axis), rtol=1e-6)
        assert torch.allclose(slice_squares(BASE, None, axis), BASE.double().square().sum(1 - axis), rtol=1e-6)
    whole = slice_squares(BASE, EXPERT, 0, update=False)
    assert torch.allclose(whole, EXPERT.double().square().sum(1), rtol=1e-6)


def test_both_slices_of_a_fused_projection_count_for_one_neuron() -> None:
    squares = BASE.double().square().sum(1)
    assert torch.allclose(slice_squares(BASE, None, 0, copies=2), squares[:3] + squares[3:], rtol=1e-6)


def test_a_bias_is_one_entry_per_neuron() -> None:
    assert torch.allclose(slice_squares(BASE[:, 0], None, 0), BASE[:, 0].double().square(), rtol=1e-6)


def test_task_vectors_count_as_updates() -> None:
    vector = (EXPERT - BASE).as_subclass(TaskVector)
    assert torch.equal(slice_squares(BASE, vector, 1), slice_squares(BASE, EXPERT, 1))
    assert torch.allclose(slice_squares(BASE, vector, 1, update=False), EXPERT.double().square().sum(0), rtol=1e-5)


def test_large_tensors_are_summed_in_blocks() -> None:
    base, expert = torch.randn(3000, 900), torch.randn(3000, 900)
    for axis in (0, 1):
        expected = (expert - base).double().square().sum(1 - axis)
        assert torch.allclose(slice_squares(base, expert, axis), expected, rtol=1e-5)


def test_relative_norms_are_finite_without_base_weights() -> None:
    norms = relative_norms(torch.tensor([4.0, 1.0, 0.0]).double(), torch.tensor([1.0, 0.0, 0.0]).double())
    assert norms[0] == 2
    assert torch.isfinite(norms).all()
    assert norms[1] > 1e6
    assert norms[2] == 0


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.floats(0.01, 1.0))
@settings(max_examples=200, deadline=None)
def test_the_threshold_keeps_the_top_share(values: list[float], density: float) -> None:
    importances = torch.tensor(values, dtype=torch.float64)
    rank = int(len(values) * (1 - density))
    expected = sorted(values)[rank - 1] if rank else -float("inf")
    assert keep_threshold(importances, density) == expected


def test_weighted_shares_are_in_proportion_to_weight_times_importance() -> None:
    importances = torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]).double()
    kept = torch.tensor([[True, True, False], [True, False, False]])
    shares = conflict_coefficients(importances, kept, [2.0, 1.0], "weighted")
    assert torch.allclose(shares, torch.tensor([[0.4, 1.0, 0.0], [0.6, 0.0, 0.0]]).double())


def test_weighted_shares_without_importance_are_in_proportion_to_weight() -> None:
    shares = conflict_coefficients(torch.zeros(2, 1).double(), torch.ones(2, 1).bool(), [3.0, 1.0], "weighted")
    assert shares.flatten().tolist() == [0.75, 0.25]


def test_the_winner_takes_the_neuron_whole() -> None:
    importances = torch.tensor([[1.0, 2.0, 3.0, 1.0], [3.0, 1.0, 3.0, 9.0]]).double()
    kept = torch.tensor([[True, True, True, True], [True, True, True, False]])
    shares = conflict_coefficients(importances, kept, [1.0, 1.0], "winner")
    assert shares.tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]


def test_the_sum_takes_each_update_with_its_weight() -> None:
    kept = torch.tensor([[True, False], [True, True]])
    shares = conflict_coefficients(torch.rand(2, 2).double(), kept, [0.5, 2.0], "sum")
    assert shares.tolist() == [[0.5, 0.0], [2.0, 2.0]]


@pytest.mark.parametrize("conflict", ["weighted", "winner", "sum"])
def test_nobody_wants_a_neuron(conflict: str) -> None:
    shares = conflict_coefficients(torch.rand(2, 3).double(), torch.zeros(2, 3).bool(), [1.0, 0.0], conflict)
    assert not shares.any()


@pytest.mark.parametrize("conflict", ["weighted", "winner", "sum"])
def test_an_expert_without_weight_takes_no_part(conflict: str) -> None:
    shares = conflict_coefficients(torch.rand(2, 3).double() + 1, torch.ones(2, 3).bool(), [1.0, 0.0], conflict)
    assert torch.equal(shares, torch.tensor([[1.0] * 3, [0.0] * 3]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [0, 1])
def test_combining_one_whole_expert_is_that_expert_to_the_bit(dtype: torch.dtype, axis: int) -> None:
    base, expert = BASE.to(dtype), (BASE + EXPERT * 1e-3).to(dtype)
    ones = torch.zeros(2, base.shape[axis])
    ones[1] = 1
    merged = combine_slices(base, [EXPERT.to(dtype), expert], ones, axis, torch.empty_like(base))
    assert torch.equal(merged, expert)


def test_combining_is_the_formula() -> None:
    coefficients = torch.rand(2, 4).double()
    other = torch.randn(6, 4)
    merged = combine_slices(BASE, [EXPERT, other], coefficients, 1, torch.empty_like(BASE), scale=0.7)
    expected = BASE + 0.7 * (coefficients[0] * (EXPERT - BASE) + coefficients[1] * (other - BASE))
    assert torch.allclose(merged, expected.float(), atol=1e-6)


def test_combining_a_fused_projection_gives_both_slices_one_coefficient() -> None:
    coefficients = torch.tensor([[1.0, 0.0, 0.5]])
    merged = combine_slices(BASE, [EXPERT], coefficients, 0, torch.empty_like(BASE), copies=2)
    middle = (BASE + EXPERT) / 2
    expected = torch.stack([EXPERT[0], BASE[1], middle[2], EXPERT[3], BASE[4], middle[5]])
    assert torch.allclose(merged, expected, atol=1e-6)


def test_clean_treats_nonfinite_updates_as_none() -> None:
    expert = EXPERT.clone()
    expert[0, 0], expert[1, 1] = float("nan"), float("inf")
    merged = combine_slices(BASE, [expert], torch.ones(1, 6), 0, torch.empty_like(BASE), clean=True)
    assert merged[0, 0] == BASE[0, 0]
    assert merged[1, 1] == BASE[1, 1]
    assert torch.equal(merged[2:], EXPERT[2:])
    assert torch.isfinite(slice_squares(BASE, expert, 0, clean=True)).all()
    assert not torch.isfinite(slice_squares(BASE, expert, 0)).all()
