"""Tempering a spectrum, against the singular value decomposition itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neuron_methods.kernels.spectrum import remove_parallel_, temper_spectrum_


def by_svd(update: Tensor, exponent: float, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
    s = s[:rank]
    powers = s**exponent
    return (u[:, :rank] * (powers * s.norm() / powers.norm())) @ vh[:rank]


def of_rank(rank: int, shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(shape[0], rank, generator=generator)
    return left * torch.logspace(0, -2, rank) @ torch.randn(rank, shape[1], generator=generator)


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (9, 9), (1, 5), (5, 1)])
def test_agrees_with_the_decomposition(shape: tuple[int, int], exponent: float) -> None:
    update = of_rank(min(shape), shape)
    expected = by_svd(update, exponent, min(shape))
    assert (temper_spectrum_(update, exponent) - expected).abs().max() < 1e-5 * expected.norm()  # see ROUNDING


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_directions_that_hold_nothing_are_not_lifted(shape: tuple[int, int]) -> None:
    update = of_rank(3, shape)
    expected = by_svd(update, 0.0, 3)
    found = temper_spectrum_(update, 0.0)
    assert (found - expected).abs().max() < 1e-5 * update.norm()
    assert torch.linalg.svdvals(found)[3] < 1e-4 * torch.linalg.svdvals(found)[0]


def test_exponent_0_makes_directions_alike_at_the_length_there_was() -> None:
    found = temper_spectrum_(torch.diag(torch.tensor([3.0, 4.0, 0.0])), 0.0)
    each = 5 / 2**0.5
    assert torch.allclose(found, torch.diag(torch.tensor([each, each, 0.0])), atol=1e-6)


def test_exponent_a_half_takes_roots() -> None:
    # 9 and 16 become 3c and 4c with c = sqrt(81 + 256) / 5
    c = 337**0.5 / 5
    found = temper_spectrum_(torch.diag(torch.tensor([9.0, 16.0])), 0.5)
    assert torch.allclose(found, torch.diag(torch.tensor([3 * c, 4 * c])), atol=1e-5)


def test_exponent_1_changes_no_bit() -> None:
    update = of_rank(4, (8, 5))
    assert torch.equal(temper_spectrum_(update.clone(), 1.0), update)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_of_the_update_is_kept(size: float) -> None:
    update = of_rank(4, (8, 5))
    found = temper_spectrum_(update * size, 0.5) / size
    assert torch.allclose(found, temper_spectrum_(update, 0.5), atol=1e-5)


def test_no_update_stays_none() -> None:
    assert torch.equal(temper_spectrum_(torch.zeros(4, 3), 0.5), torch.zeros(4, 3))
    assert temper_spectrum_(torch.zeros(0, 3), 0.5).shape == (0, 3)


def test_order_of_neurons_does_not_matter() -> None:
    update, order = of_rank(5, (20, 7)), torch.randperm(20, generator=torch.Generator().manual_seed(1))
    permuted = temper_spectrum_(update[order], 0.5)
    assert torch.allclose(permuted, temper_spectrum_(update, 0.5)[order], atol=1e-5)


def test_removes_what_is_parallel_to_the_base() -> None:
    update = torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    base = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    assert remove_parallel_(update, base).tolist() == [[3.0, 0.0], [1.0, 2.0]]
    assert update.tolist() == [[3.0, 0.0], [1.0, 2.0]]
