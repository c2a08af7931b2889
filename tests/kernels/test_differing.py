"""Selecting the entries in which experts differ most."""

from __future__ import annotations

import pytest
import torch

from neuron_methods.kernels.differing import keep_differing_, largest_left_out, variances


def test_variance_is_over_the_experts() -> None:
    updates = torch.tensor([[[1.0, 2.0, 0.0], [1.0, -2.0, 3.0]]])
    assert variances(updates).tolist() == [[0.0, 4.0, 2.25]]


def test_one_expert_differs_from_the_base_alone() -> None:
    assert variances(torch.tensor([[2.0, -3.0]])).tolist() == [4.0, 9.0]


def test_order_of_the_experts_has_no_say() -> None:
    updates = torch.randn(50, 7, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(variances(updates), variances(updates.flip(1)))


@pytest.mark.parametrize(("density", "kept"), [(1.0, 5), (0.7, 4), (0.5, 3), (0.21, 2), (0.2, 1), (0.1, 1)])
def test_the_largest_left_out_keeps_the_share_above_it(density: float, kept: int) -> None:
    values = torch.tensor([4.0, 1.0, 3.0, 5.0, 2.0])
    largest = largest_left_out(values.clone(), density)
    assert int((values > largest).sum()) == kept


def test_zeroes_the_same_entries_of_all_experts() -> None:
    updates = torch.tensor([[1.0, 2.0, 3.0], [1.0, -2.0, 4.0]])
    keep_differing_(updates, variances(updates), 0.2)
    assert updates.tolist() == [[0.0, 2.0, 3.0], [0.0, -2.0, 4.0]]
