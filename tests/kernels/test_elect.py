"""Elect and average, against numbers worked out by hand."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from neuron_methods.kernels.elect import elect_and_reduce, elect_signs, reduce_elected, resolve_ties
from tests import oracle


def row(*experts: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(experts, dtype=dtype)


def test_the_sign_is_elected_by_magnitude_and_its_carriers_are_averaged() -> None:
    values = row([3.0, -1.0, 0.5], [-1.0, -3.0, 0.5], [1.0, 2.0, -4.0])
    # sums 3, −2, −3: mean of (3, 1), of (−1, −3), of (−4)
    assert elect_and_reduce(values).tolist() == [2.0, -2.0, -4.0]


def test_one_expert_keeps_its_values() -> None:
    assert elect_and_reduce(row([3.0, -1.0, 0.0])).tolist() == [3.0, -1.0, 0.0]


def test_zeros_do_not_count_in_the_mean() -> None:
    assert elect_and_reduce(row([0.0], [6.0], [0.0], [2.0])).tolist() == [4.0]
    assert elect_and_reduce(row([-0.0], [-6.0], [0.0])).tolist() == [-6.0]


def test_values_against_the_elected_sign_do_not_count() -> None:
    # 5 − 1 − 1 elects +; dividing by all three would give 5/3, by two 5/2
    assert elect_and_reduce(row([5.0], [-1.0], [-1.0])).tolist() == [5.0]


def test_all_zero_gives_zero() -> None:
    assert elect_and_reduce(torch.zeros(3, 4)).tolist() == [0.0] * 4


def test_a_tie_takes_the_positive_majority_of_its_row() -> None:
    values = row([2.0, 1.0, -5.0, 3.0], [-2.0, 1.0, 1.0, 3.0])
    # signs 0, +, −, +: majority +
    assert elect_and_reduce(values).tolist() == [2.0, 1.0, -5.0, 3.0]


def test_a_tie_takes_the_negative_majority_of_its_row() -> None:
    values = row([2.0, -1.0, -5.0, 3.0], [-2.0, -1.0, 1.0, 3.0])
    assert elect_and_reduce(values).tolist() == [-2.0, -1.0, -5.0, 3.0]


def test_a_tie_is_negative_where_its_row_balances() -> None:
    values = row([2.0, 1.0, -1.0], [-2.0, 1.0, -1.0])
    assert elect_and_reduce(values).tolist() == [-2.0, 1.0, -1.0]


def test_a_row_of_ties_alone_is_negative() -> None:
    assert elect_and_reduce(row([2.0, -1.0], [-2.0, 1.0])).tolist() == [-2.0, -1.0]


def test_the_majority_counts_signs_and_not_magnitudes() -> None:
    values = row([2.0, 100.0, -1.0, -1.0], [-2.0, 100.0, -1.0, -1.0])
    assert elect_and_reduce(values).tolist() == [-2.0, 100.0, -1.0, -1.0]


def test_zero_columns_have_no_say_in_the_majority() -> None:
    values = row([2.0, 0.0, 0.0, 1.0], [-2.0, 0.0, 0.0, 1.0])
    assert elect_and_reduce(values).tolist() == [2.0, 0.0, 0.0, 1.0]


def test_a_tie_of_several_experts_averages_the_carriers() -> None:
    values = row([4.0, 1.0], [2.0, 1.0], [-1.0, 1.0], [-5.0, 1.0])
    assert elect_and_reduce(values).tolist() == [3.0, 1.0]


def test_each_row_resolves_its_own_ties() -> None:
    values = torch.stack([row([2.0, 1.0], [-2.0, 1.0]), row([2.0, -1.0], [-2.0, -1.0])], dim=1)
    assert values.shape == (2, 2, 2)
    assert elect_and_reduce(values).tolist() == [[2.0, 1.0], [-2.0, -1.0]]


def test_sum_consensus_adds_the_carriers() -> None:
    values = row([3.0, -1.0, 2.0], [-1.0, -3.0, -2.0], [1.0, 2.0, 0.0])
    # the third column ties; signs +, − balance: negative
    assert elect_and_reduce(values, "sum").tolist() == [4.0, -4.0, -2.0]


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_float32_cancellation_makes_no_tie(order: tuple[int, ...]) -> None:
    # In float32, 1e8 + 1 is 1e8: the sum would be 0 in some orders and 1 in others.
    values = row([1e8, -1.0], [1.0, -1.0], [-1e8, -1.0])[list(order)]
    assert elect_signs(values).tolist() == [1.0, -1.0]
    assert elect_and_reduce(values).tolist() == [5e7, -1.0]


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_the_order_of_the_experts_does_not_matter(order: tuple[int, ...]) -> None:
    values = row([2.0, 1.0, 0.0, 8.0], [-2.0, 3.0, 0.0, -1.0], [4.0, 0.0, 0.0, -2.0], [-4.0, -1.0, 0.0, -4.0])
    expected = [3.0, 2.0, 0.0, 8.0]
    assert elect_and_reduce(values[list(order)]).tolist() == expected


def test_tie_tolerance_takes_small_sums_for_ties() -> None:
    values = row([1.0, 1.0], [-1.0 + 1e-6, 1.0], dtype=torch.float64)
    assert elect_signs(values, 1e-5).tolist() == [0.0, 1.0]
    assert elect_signs(values, 1e-7).tolist() == [1.0, 1.0]
    assert elect_signs(-values, 1e-7).tolist() == [-1.0, -1.0]
    flipped = values * torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert elect_and_reduce(flipped, tie_tolerance=1e-5).tolist() == [-1.0 + 1e-6, -1.0]


def test_a_sum_of_the_tolerance_itself_is_a_tie() -> None:
    assert elect_signs(row([0.5], [-0.25]), 0.25).tolist() == [0.0]


def test_resolve_ties_leaves_elected_signs_alone() -> None:
    signs = torch.tensor([[1.0, 0.0, 1.0, -1.0], [-1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert resolve_ties(signs).tolist() == [[1.0, 1.0, 1.0, -1.0], [-1.0] * 4, [-1.0] * 4]


def test_nothing_carries_an_elected_sign_that_is_forced() -> None:
    assert reduce_elected(row([1.0], [2.0]), torch.tensor([-1.0])).tolist() == [0.0]


def test_no_positions() -> None:
    assert elect_and_reduce(torch.zeros(3, 0)).shape == (0,)
    assert elect_and_reduce(torch.zeros(3, 2, 0)).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_the_values(dtype: torch.dtype) -> None:
    assert elect_and_reduce(row([1.0], [2.0], dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("consensus", ["mean", "sum"])
@pytest.mark.parametrize("experts", [1, 2, 3, 5])
def test_small_integers_agree_with_the_oracle(experts: int, consensus: str) -> None:
    generator = torch.Generator().manual_seed(experts)
    for _ in range(200):
        values = torch.randint(-2, 3, (experts, 5), generator=generator).float()
        expected = oracle.elect_and_reduce(values.tolist(), consensus)
        assert elect_and_reduce(values, consensus).tolist() == pytest.approx(expected, abs=1e-6)
