"""The statistics of one weight, against plain loops over its neurons."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from neuron_methods.kernels.task_vectors import LowRankTaskVector, TaskVector
from neuron_methods.sharing.report.collect import Collector
from neuron_methods.sharing.report.weight_statistics import (
    cosines,
    distances,
    overlap,
    response_kept,
    sample_rows,
    top_share,
    weight_statistics,
)


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(12, 7, generator=generator)
    experts = [base + 0.1 * torch.randn(12, 7, generator=generator) for _ in range(3)]
    experts[0][4] = base[4]  # one expert leaves a neuron alone
    experts[2][5] = 2 * experts[1][5] - base[5]  # two agree in direction
    merged = base + 0.7 * (experts[0] - base) - 0.1 * (experts[1] - base)
    return base, experts, merged


def test_statistics_are_what_their_definitions_say(weights):
    base, experts, merged = weights
    found = weight_statistics(base, experts, merged)
    before = after = pairs = changes = 0
    products, parallel = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    spectrum = torch.zeros(3, dtype=torch.float64)
    for i in range(len(base)):
        w = base[i].double()
        updates = [e[i].double() - w for e in experts]
        delta = merged[i].double() - w
        rows = torch.stack([*updates, delta])
        products += rows @ rows.T
        parallel += (rows @ w) ** 2 / (w @ w)
        active = [u for u in updates if u.norm() > 0]
        pairs += len(active) * (len(active) - 1) // 2
        changes += len(active)
        before += sum(bool(a @ b < -1e-3 * a.norm() * b.norm()) for a, b in combinations(active, 2))
        after += sum(bool(delta @ a < -1e-3 * a.norm() * delta.norm()) for a in active)
        orthogonal = torch.stack([u - (u @ w) / (w @ w) * w for u in updates])
        singular = torch.linalg.svdvals(orthogonal) ** 2
        spectrum += singular / singular.sum()
        for t, u in enumerate(updates):
            assert found.importance[t, i] == pytest.approx(float(u.norm() / w.norm()), rel=1e-5)
            kept = float(delta @ u / (u @ u)) if u.norm() > 0 else 0.0
            assert found.kept[t, i] == pytest.approx(kept, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(found.products, products, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.parallel, parallel, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.spectrum, spectrum, rtol=1e-5, atol=1e-8)
    assert (found.neurons, found.pairs, found.changes) == (12, pairs, changes) == (12, 34, 35)
    assert (found.conflict_before, found.conflict_after) == (before, after)
    assert 0 < before < pairs and 0 < after < changes
    assert found.base == pytest.approx(float(base.double().square().sum()), rel=1e-6)


def test_response_kept_is_that_of_the_update_s_own_rows(weights):
    base, experts, merged = weights
    found = weight_statistics(base, experts, merged)
    delta = (merged - base).double()
    for t, expert in enumerate(experts):
        update = (expert - base).double()
        kept = 1 - (delta - update).matmul(update.T).norm() / update.matmul(update.T).norm()
        assert float(response_kept(found.answered, found.missed)[t]) == pytest.approx(float(kept), rel=1e-5)
    for whole, expected in ((experts[1], 1.0), (base, 0.0)):
        found = weight_statistics(base, experts, whole)
        assert float(response_kept(found.answered, found.missed)[1]) == pytest.approx(expected, abs=1e-6)


def test_many_rows_are_added_up_for_the_response(weights, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(600, 24, generator=generator)
    expert = base + 0.1 * torch.randn(600, 4, generator=generator) @ torch.randn(4, 24, generator=generator)
    merged = base + 0.6 * (expert - base)
    for scratch in (1 << 25, 1000):
        monkeypatch.setattr("neuron_methods.sharing.report.weight_statistics._SCRATCH", scratch)
        found = weight_statistics(base, [expert], merged)
        assert float(response_kept(found.answered, found.missed)[0]) == pytest.approx(0.6, abs=1e-4)


def test_cosines_and_distances_follow_from_the_products(weights):
    base, experts, merged = weights
    products = weight_statistics(base, experts, merged).products
    a, b = ((e - base).flatten().double() for e in experts[:2])
    assert cosines(products)[0, 1] == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-5)
    expected = [float((merged - other).norm()) for other in (base, *experts)]
    assert distances(products).tolist() == pytest.approx(expected, rel=1e-4)


def test_a_task_vector_given_directly_counts_as_the_expert(weights):
    base, experts, merged = weights
    given = [(e - base).as_subclass(TaskVector) for e in experts]
    one, other = weight_statistics(base, experts, merged), weight_statistics(base, given, merged)
    torch.testing.assert_close(one.products, other.products)


def test_blocks_and_several_weights_add_up(weights, monkeypatch):
    base, experts, merged = weights
    whole = weight_statistics(base, experts, merged)
    monkeypatch.setattr("neuron_methods.sharing.report.weight_statistics._SCRATCH", 500)
    blocks = weight_statistics(base, experts, merged)
    halves = weight_statistics(base[:5], [e[:5] for e in experts], merged[:5]) + weight_statistics(
        base[5:], [e[5:] for e in experts], merged[5:]
    )
    for other in (blocks, halves):
        torch.testing.assert_close(whole.products, other.products)
        torch.testing.assert_close(whole.kept, other.kept)
        assert (whole.neurons, whole.conflict_before) == (other.neurons, other.conflict_before)


def test_nothing_changed_is_no_number_out_of_nothing():
    base = torch.randn(4, 3)
    found = weight_statistics(base, [base.clone(), base.clone()], base.clone())
    assert (found.pairs + found.changes, found.with_spectrum, float(found.products.abs().sum())) == (0, 0, 0.0)
    assert math.isfinite(float(found.kept.sum() + found.spectrum.sum() + found.parallel.sum()))
    broken = base.clone()
    broken[0, 0] = float("nan")
    found = weight_statistics(base, [broken, base * 1.1], torch.zeros(4, 3))
    assert bool(found.products.isfinite().all())


def test_a_sample_is_the_same_every_time_and_evenly_likely():
    assert sample_rows(5, None).tolist() == sample_rows(5, 9).tolist() == [0, 1, 2, 3, 4]
    chosen = sample_rows(1000, 50)
    assert chosen.tolist() == sample_rows(1000, 50).tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == 50 and 350 < float(chosen.float().mean()) < 650


def test_a_sample_estimates_the_whole():
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(2000, 16, generator=generator)
    a = base + 0.1 * torch.randn(2000, 16, generator=generator)
    b = base + 0.5 * (a - base) + 0.1 * torch.randn(2000, 16, generator=generator)
    whole, part = (weight_statistics(base, [a, b], a, limit=n) for n in (None, 200))
    assert part.neurons == 200
    assert float(cosines(part.products)[0, 1]) == pytest.approx(float(cosines(whole.products)[0, 1]), abs=0.05)


def test_top_and_overlap():
    values = torch.tensor([0.0, 3.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert top_share(values, 0.1).nonzero().flatten().tolist() == [1]
    assert top_share(values, 0.9).nonzero().flatten().tolist() == [1, 2, 3]
    assert not bool(top_share(torch.zeros(4), 0.5).any())
    first, second = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    assert overlap(first, second) == pytest.approx(1 / 3)
    assert overlap(~(first | ~first), first & ~first) == 0.0


def test_updates_that_are_known_by_their_factors_are_looked_at_as_what_they_are() -> None:
    base, b, a = torch.randn(6, 8), torch.randn(6, 2), torch.randn(2, 8)
    low, dense = LowRankTaskVector.of(b, a, (6, 8)), (b @ a).as_subclass(TaskVector)
    name = "model.layers.0.mlp.up_proj.weight"
    found = [
        Collector("base", ["one"], None).look(name, {"base": base, "one": one}, base + b @ a) for one in (low, dense)
    ]
    assert found[0] is not None and found[0].to_json() == found[1].to_json()
