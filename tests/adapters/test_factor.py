"""Factors against torch's own SVD."""

from __future__ import annotations

import pytest
import torch

from neuron_methods.adapters.factor import factor


def falling(rows: int, columns: int, decay: float) -> torch.Tensor:
    """A matrix with singular values decay, decay², …"""
    torch.manual_seed(0)
    most = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, most, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, most, dtype=torch.float64)).Q
    values = decay ** torch.arange(1, most + 1, dtype=torch.float64)
    return (left * values @ right.T).float()


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20)])
@pytest.mark.parametrize("rank", [1, 5, 20, 99])
def test_rank_gives_the_best_approximation(shape: tuple[int, int], rank: int) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    factors = factor(update, rank=rank)
    left, values, right = torch.linalg.svd(update.double(), full_matrices=False)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    assert factors.rank == min(rank, 20)
    assert (factors.a.shape, factors.b.shape) == ((factors.rank, shape[1]), (shape[0], factors.rank))
    torch.testing.assert_close((factors.b @ factors.a).double(), best, rtol=1e-4, atol=1e-5)
    assert factors.energy == pytest.approx(float(values.square().sum()), rel=1e-6)
    assert factors.error == pytest.approx(float(values[rank:].square().sum()), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_energy_gives_the_smallest_rank_that_keeps_it(energy: float) -> None:
    update = falling(40, 30, 0.7)
    factors = factor(update, energy=energy)
    squares = torch.linalg.svdvals(update.double()).square()
    share = squares.cumsum(0) / squares.sum()
    assert factors.energy_kept >= energy - 1e-6
    if energy < 1:
        assert factors.rank == int((share < energy).sum()) + 1


def test_rank_and_energy_together_keep_what_both_allow() -> None:
    update = falling(40, 30, 0.7)
    assert factor(update, energy=0.5, rank=20).rank < 5
    assert factor(update, energy=0.9999, rank=3).rank == 3


def test_an_update_of_low_rank_takes_no_more_than_its_rank() -> None:
    torch.manual_seed(0)
    update = torch.randn(50, 4) @ torch.randn(4, 60)
    factors = factor(update, rank=32)
    assert factors.rank <= 6  # of the 32, all others are rounding
    assert factors.energy_kept > 1 - 1e-10


def test_no_update() -> None:
    factors = factor(torch.zeros(3, 5), energy=0.9)
    assert torch.equal(factors.b @ factors.a, torch.zeros(3, 5))
    assert factors.energy_kept == 1.0


def test_factors_share_the_singular_values() -> None:
    factors = factor(falling(30, 20, 0.5), rank=6)
    torch.testing.assert_close(factors.a.norm(dim=1), factors.b.norm(dim=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(200, 120), (120, 200)])
def test_random_projection_is_as_good_as_the_exact_way(shape: tuple[int, int]) -> None:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 2e-3
    for update in (falling(*shape, 0.9), falling(*shape, 0.5) + noise):
        exact, projected = factor(update, rank=20), factor(update, rank=20, exact_limit=64)
        assert projected.error <= 1.01 * exact.error + 1e-12
        assert projected.rank == exact.rank


@pytest.mark.parametrize("energy", [0.9, 0.99])
def test_random_projection_finds_the_rank_for_an_energy(energy: float) -> None:
    update = falling(700, 600, 0.97)
    exact, projected = factor(update, energy=energy), factor(update, energy=energy, exact_limit=64)
    assert abs(projected.rank - exact.rank) <= 1
    assert projected.energy_kept >= energy - 1e-4


def test_error_counts_the_rounding_of_the_factors() -> None:
    update = falling(40, 30, 0.8)
    rounded = factor(update, rank=30, dtype=torch.bfloat16)
    assert rounded.a.dtype == rounded.b.dtype == torch.bfloat16
    assert rounded.error > 100 * factor(update, rank=30).error
    assert rounded.error == pytest.approx(
        float((update - rounded.b.float() @ rounded.a.float()).square().sum()), rel=1e-3
    )
