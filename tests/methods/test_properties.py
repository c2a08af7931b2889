"""What holds of NeuroMerging whatever the numbers are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_state_dicts
from torch import Tensor

import neuron_methods
from tests import oracle

neuron_methods.register()

StateDict = dict[str, Tensor]
SEEDS = st.integers(0, 2**31)
DENSITIES = st.sampled_from([0.05, 0.15, 0.5, 1.0])
LAMBDAS = st.sampled_from([0.0, 1.0, -0.3])
CONSENSUS = st.sampled_from(["mean", "sum"])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def models(seed: int, count: int, neurons: int = 9, width: int = 7) -> list[StateDict]:
    """A base and experts: a matrix, a convolution, a bias and a scale."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (neurons, width), "conv": (4, 3, 2, 2), "bias": (neurons,), "scale": ()}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = [
        {n: t + 0.1 * torch.randn(t.shape, generator=generator).pow(3) for n, t in base.items()} for _ in range(count)
    ]
    return [base, *experts]


def merge(base: StateDict, *experts: StateDict, **parameters: object) -> StateDict:
    return merge_state_dicts([base, *experts], "neuro_merging", base=0, parameters=parameters)


def differences(found: StateDict, expected: StateDict) -> Tensor:
    assert found.keys() == expected.keys()
    return torch.cat([(found[name].double() - expected[name].double()).abs().flatten() for name in expected])


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, trim=st.sampled_from(["model", "tensor"]), consensus=CONSENSUS)
def test_one_expert_with_everything_kept_is_that_expert(seed: int, trim: str, consensus: str) -> None:
    base, expert = models(seed, 1)
    merged = merge(
        base, expert, density=1.0, lambda_parallel=1.0, lambda_orthogonal=1.0, trim=trim, consensus=consensus
    )
    assert differences(merged, expert).max() < 1e-5


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, trim=st.sampled_from(["model", "tensor"]))
def test_lambda_zero_is_the_base(seed: int, trim: str) -> None:
    base, *experts = models(seed, 3)
    merged = merge(base, *experts, lambda_orthogonal=0.0, trim=trim)
    assert all(torch.equal(merged[name], base[name]) for name in base)


@settings(max_examples=40, deadline=None)
@given(
    seed=SEEDS,
    density=DENSITIES,
    parallel=LAMBDAS,
    consensus=CONSENSUS,
    order=st.permutations(range(3)),
    rank_energy=st.sampled_from([0.8, 1.0]),
)
def test_the_order_of_the_experts_does_not_matter(
    seed: int, density: float, parallel: float, consensus: str, order: list[int], rank_energy: float
) -> None:
    base, *experts = models(seed, 3)
    weights = [1.0, 0.5, -2.0]
    options = {
        "density": density,
        "lambda_parallel": parallel,
        "consensus": consensus,
        "rank_energy": rank_energy,
    }
    merged = merge(base, *experts, weight=weights, **options)
    permuted = merge(base, *(experts[i] for i in order), weight=[weights[i] for i in order], **options)
    assert differences(permuted, merged).max() < 1e-4


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, density=DENSITIES, parallel=LAMBDAS, count=st.integers(1, 4))
def test_permuting_neurons_permutes_the_result(seed: int, density: float, parallel: float, count: int) -> None:
    base, *experts = models(seed, count)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))

    def permuted(model: StateDict) -> StateDict:
        return {**model, "matrix": model["matrix"][order], "bias": model["bias"][order]}

    merged = merge(base, *experts, density=density, lambda_parallel=parallel)
    found = merge(permuted(base), *map(permuted, experts), density=density, lambda_parallel=parallel)
    assert differences(found, permuted(merged)).max() < 1e-5


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, density=DENSITIES, factor=st.sampled_from([2.0**-6, 0.5, 4.0]), parallel=LAMBDAS)
def test_scaling_all_updates_scales_the_merged_update(
    seed: int, density: float, factor: float, parallel: float
) -> None:
    # Numbers of few digits, so that the scaled experts are what they should be, ties included.
    base, *experts = ({n: torch.round(t * 64) / 64 for n, t in model.items()} for model in models(seed, 3))
    scaled = [{n: base[n] + factor * (t - base[n]) for n, t in expert.items()} for expert in experts]
    options = {"density": density, "lambda_parallel": parallel}
    merged, found = merge(base, *experts, **options), merge(base, *scaled, **options)
    expected = {name: base[name] + factor * (merged[name] - base[name]) for name in base}
    assert differences(found, expected).max() < 1e-4 * max(1.0, factor)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, density=DENSITIES, parallel=LAMBDAS, consensus=CONSENSUS, count=st.integers(1, 5))
def test_random_models_agree_with_the_oracle(
    seed: int, density: float, parallel: float, consensus: str, count: int
) -> None:
    base, *experts = models(seed, count)
    options = {"density": density, "lambda_parallel": parallel, "consensus": consensus}
    flat = [{n: t.flatten(1) if t.ndim > 2 else t for n, t in model.items()} for model in (base, *experts)]
    expected = oracle.merge_model(flat[0], flat[1:], **options)
    found = merge(base, *experts, **options)
    found["conv"] = found["conv"].flatten(1)
    scale = max(1.0, float(expected["matrix"].abs().max()))
    assert differences(found, expected).max() < 1e-4 * scale


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, density=DENSITIES, consensus=CONSENSUS, parallel=LAMBDAS, orthogonal=LAMBDAS)
def test_points_at_the_mean_of_both_scales_lie_midway_and_matrices_stay(
    seed: int, density: float, consensus: str, parallel: float, orthogonal: float
) -> None:
    base, *experts = models(seed, 3)
    options = {"density": density, "consensus": consensus, "lambda_parallel": parallel}
    found = merge(base, *experts, **options, lambda_orthogonal=orthogonal, lambda_points="mean")
    first, second = (merge(base, *experts, **options, lambda_orthogonal=scale) for scale in (parallel, orthogonal))
    for name, weights in base.items():
        expected = (first[name] + second[name]) / 2 if weights.ndim < 2 else second[name]
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_number_of_threads_does_not_matter(count: int, threads: None) -> None:
    base, *experts = models(3, count, neurons=200, width=300)
    results = []
    for number in (1, 2):
        torch.set_num_threads(number)
        results.append(merge(base, *experts, lambda_parallel=0.5))
    assert differences(*results).max() < 1e-5


@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_repeated_runs_give_the_same_bytes(trim: str) -> None:
    base, *experts = models(4, 3, neurons=200, width=300)
    first = merge(base, *experts, lambda_parallel=0.5, trim=trim)
    for _ in range(3):
        again = merge(base, *experts, lambda_parallel=0.5, trim=trim)
        assert all(torch.equal(again[name], first[name]) for name in first)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, density=DENSITIES, consensus=CONSENSUS)
def test_an_expert_equal_to_the_base_changes_nothing_but_what_it_trims(
    seed: int, density: float, consensus: str
) -> None:
    base, *experts = models(seed, 2)
    merged = merge(base, *experts, density=density, consensus=consensus, lambda_orthogonal=1.0)
    found = merge(base, *experts, base, density=density, consensus=consensus, lambda_orthogonal=1.0)
    assert differences(found, merged).max() < 1e-5


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, count=st.integers(2, 4))
def test_experts_that_agree_are_merged_to_what_they_agree_on(seed: int, count: int) -> None:
    base, expert = models(seed, 1)
    together = merge(base, *[expert] * count, density=0.3, lambda_parallel=1.0)
    assert differences(together, merge(base, expert, density=0.3, lambda_parallel=1.0)).max() < 1e-5
