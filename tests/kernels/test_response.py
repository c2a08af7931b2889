"""Merging by response against least squares on stacked factors in float64, its properties, and its published kin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuron_methods.kernels.low_rank import LowRank, truncated
from neuron_methods.kernels.response import (
    Expert,
    Response,
    ResponseOptions,
    automatic_ridge,
    decompose_responses,
    merge_responses,
)
from neuron_methods.kernels.rows import added_up, condensed

MANY, FEW = (30, 12), (5, 40)


@dataclass
class Case:
    """An expert in float64, and as the kernel is given it."""

    update: Tensor
    weight: float
    factors: list[Tensor | None]
    expert: Expert


def randoms(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(shape: tuple[int, int], seed: int, inputs: str = "update", rank: int = 0, weight: float = 1.0) -> Case:
    n, d = shape
    measured = randoms(7, d, seed=seed + 50) * 3
    factors: list[Tensor | None] = {"update": [None], "data": [measured], "both": [measured, None]}[inputs]
    if rank:
        low = LowRank(randoms(n, rank, seed=seed) * (seed + 1), randoms(rank, d, seed=seed + 20))
        return Case(low.b.double() @ low.a.double(), weight, factors, Expert(low, weight, factors))
    dense = randoms(n, d, seed=seed) * (seed + 1)
    return Case(dense.double(), weight, factors, Expert(dense.__getitem__, weight, factors))


def toward(cases: Sequence[Case], options: ResponseOptions) -> Tensor:
    speaking = [c for c in cases if c.update.any() or any(f is not None and f.any() for f in c.factors)] or cases
    total = sum(c.weight for c in speaking)
    mean = sum(c.update * (c.weight / total) for c in speaking)
    taking = sum(c.weight > 0 for c in speaking)
    return {"zero": torch.zeros_like(mean), "mean": mean, "sum": mean * taking}[options.toward]


def rows_of(c: Case, cases: Sequence[Case], options: ResponseOptions) -> Tensor:
    """√w_t F_t / ‖F_t‖: several factors count alike."""
    parts = [c.update if f is None else f.double() for f in c.factors]
    parts = [part / part.norm() for part in parts if part.norm() > 0]
    if not parts:
        return c.update.new_zeros(0, c.update.shape[1])
    stacked = torch.cat(parts) / len(parts) ** 0.5
    loudness = c.update.norm() if options.loudness == "own" else 1.0
    return stacked * loudness * (c.weight / sum(other.weight for other in cases)) ** 0.5


def oracle(cases: Sequence[Case], options: ResponseOptions) -> tuple[Tensor, float, float, Tensor]:
    """The merge by least squares on stacked rows, unscaled then scaled; energy, missed, S."""
    taking = [c for c in cases if c.weight > 0]
    rows = [rows_of(c, taking, options) for c in taking]
    stacked = torch.cat(rows)
    assert options.ridge is not None
    ridge = options.ridge * float(stacked.square().sum()) / stacked.shape[1]
    t = toward(taking, options)
    answers = torch.cat([r @ (c.update - t).T for r, c in zip(rows, taking, strict=True)])
    system = torch.cat([stacked, ridge**0.5 * torch.eye(stacked.shape[1], dtype=torch.float64)])
    wanted = torch.cat([answers, answers.new_zeros(stacked.shape[1], answers.shape[1])])
    solved = torch.linalg.lstsq(system, wanted, rcond=1e-6, driver="gelsd").solution.T + t
    got = torch.cat([r @ solved.T for r in rows])
    asked = torch.cat([r @ c.update.T for r, c in zip(rows, taking, strict=True)])
    undone = got.any() and options.toward == "zero"
    scale = float((got * asked).sum() / got.square().sum()) if undone else 1.0
    missed = float((scale * got - asked).square().sum())
    return scale * solved, float(asked.square().sum()), missed, stacked.T @ stacked


def dense(response: Response) -> Tensor:
    update = response.update
    return update.b.double() @ update.a.double() if isinstance(update, LowRank) else update.double()


def merge(cases: Sequence[Case], options: ResponseOptions) -> Response:
    return merge_responses([c.expert for c in cases], tuple(cases[0].update.shape), options)


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= tolerance * float(expected.norm()) + 1e-30


def assert_exact(cases: Sequence[Case], options: ResponseOptions) -> Response:
    expected, energy, missed, _ = oracle(cases, options)
    response = merge(cases, options)
    assert_near(dense(response), expected)
    assert response.energy == pytest.approx(energy, rel=1e-5)
    assert response.missed == pytest.approx(missed, rel=1e-4, abs=1e-5 * energy)
    return response


@pytest.mark.parametrize("loudness", ["equal", "own"])
@pytest.mark.parametrize("towards", ["zero", "mean", "sum"])
@pytest.mark.parametrize("inputs", ["update", "data", "both"])
@pytest.mark.parametrize("kind", ["dense", "low rank", "mixed"])
@pytest.mark.parametrize("shape", [MANY, FEW], ids=["many", "few"])
@pytest.mark.parametrize("ridge", [0.1, 1e-3, 3.0, 1000.0])
def test_it_is_least_squares_on_stacked_factors(
    shape: tuple[int, int], kind: str, inputs: str, towards: str, loudness: str, ridge: float
) -> None:
    ranks = {"dense": (0, 0, 0), "low rank": (2, 3, 1), "mixed": (2, 0, 3)}[kind]
    weights = (1.0, 0.5, 2.0)
    cases = [case(shape, i, inputs, r, w) for i, (r, w) in enumerate(zip(ranks, weights, strict=True))]
    response = assert_exact(cases, ResponseOptions(ridge, towards, loudness))
    assert isinstance(response.update, LowRank) == (kind == "low rank")
    if isinstance(response.update, LowRank):
        assert response.update.a.shape == (sum(ranks), shape[1])


@pytest.mark.parametrize("towards", ["zero", "mean", "sum"])
@pytest.mark.parametrize("inputs", ["update", "data", "both"])
@pytest.mark.parametrize("kind", ["dense", "low rank", "mixed"])
@pytest.mark.parametrize("shape", [(30, 12), (5, 40), (12, 30), (2, 30)])
def test_without_a_ridge_it_is_the_pseudo_inverse(shape: tuple[int, int], kind: str, inputs: str, towards: str) -> None:
    """Whether or not the inputs span all columns: what they say nothing about is T's."""
    ranks = {"dense": (0, 0, 0), "low rank": (2, 3, 1), "mixed": (2, 0, 3)}[kind]
    cases = [case(shape, i, inputs, min(r, shape[0])) for i, r in enumerate(ranks)]
    assert_exact(cases, ResponseOptions(0.0, towards))


@pytest.mark.parametrize("inputs", [["update", "data", "both"], ["data", "update", "data"]])
@pytest.mark.parametrize("shape", [MANY, FEW])
def test_experts_may_differ_in_where_their_inputs_come_from(shape: tuple[int, int], inputs: list[str]) -> None:
    assert_exact([case(shape, i, name, rank=i) for i, name in enumerate(inputs)], ResponseOptions(0.1))


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 9), (9, 2)])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("ridge", [0.1, 0.0])
def test_single_rows_and_columns(shape: tuple[int, int], rank: int, ridge: float) -> None:
    assert_exact([case(shape, i, "both", rank) for i in range(2)], ResponseOptions(ridge))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_nothing_to_merge(shape: tuple[int, int]) -> None:
    for towards in ("zero", "sum"):
        found = merge_responses([Expert(torch.zeros(shape).__getitem__)] * 2, shape, ResponseOptions(toward=towards))
        assert dense(found).shape == shape
        assert (found.energy, found.missed) == (0.0, 0.0)


def test_factors_of_narrow_dtypes_count_as_they_are_stored() -> None:
    measured = randoms(7, 40, seed=5).bfloat16()
    cases = [case(FEW, i) for i in range(2)]
    cases[0] = replace(cases[0], factors=[measured], expert=replace(cases[0].expert, inputs=[measured]))
    assert_exact(cases, ResponseOptions(0.1))


@pytest.mark.parametrize("shape", [(64, 48), (40, 512)])
def test_updates_whose_directions_differ_much_in_length(shape: tuple[int, int]) -> None:
    """As those of trained models do; and whatever the ridge, what is asked for is what is solved."""
    cases = []
    for seed in range(3):
        u, _, v = torch.linalg.svd(randoms(*shape, seed=seed), full_matrices=False)
        update = (u * torch.arange(1, min(shape) + 1).float().pow(-1.5)) @ v
        cases.append(Case(update.double(), 1.0, [None], Expert(update.__getitem__)))
    for ridge in (0.1, 1e-4, 1e-8):
        expected, *_ = oracle(cases, ResponseOptions(ridge))
        assert_near(dense(merge(cases, ResponseOptions(ridge))), expected)


# ------------------------------------------------------------------------------------------------- properties

shapes = st.tuples(st.integers(2, 20), st.integers(2, 20))
some = settings(max_examples=40, deadline=None)


@some
@given(shapes, st.integers(0, 10**6), st.sampled_from([0, 2]), st.sampled_from([0.0, 1e-9]))
def test_without_much_of_a_ridge_one_expert_comes_back_as_itself(
    shape: tuple[int, int], seed: int, rank: int, ridge: float
) -> None:
    alone = case(shape, seed % 1000, rank=rank)
    assert_near(dense(merge([alone], ResponseOptions(ridge))), alone.update, 1e-4)


@some
@given(shapes, st.integers(0, 999), st.floats(0, 1e4), st.sampled_from(["mean", "sum"]), st.sampled_from([0, 1]))
def test_toward_mean_or_sum_one_expert_comes_back_at_any_ridge(
    shape: tuple[int, int], seed: int, ridge: float, towards: str, rank: int
) -> None:
    alone = case(shape, seed, "both", rank)
    assert_near(dense(merge([alone], ResponseOptions(ridge, towards))), alone.update)


@some
@given(shapes, st.integers(0, 999), st.floats(1e-3, 100), st.integers(2, 4))
def test_equal_experts_give_that_expert(shape: tuple[int, int], seed: int, ridge: float, count: int) -> None:
    same = case(shape, seed)
    # In float32 no better than width / ridge times its rounding.
    tolerance = 1e-5 if ridge < 0.01 else max(1e-5, shape[1] / ridge * 2**-24)
    assert_near(dense(merge([same] * count, ResponseOptions(ridge, "mean"))), same.update, tolerance)
    assert_near(dense(merge([same] * count, ResponseOptions(0.0))), same.update, 1e-4)


@some
@given(st.integers(2, 12), st.integers(2, 6), st.integers(0, 999), st.integers(2, 4), st.booleans())
def test_experts_with_disjoint_inputs_are_all_kept(n: int, width: int, seed: int, count: int, low: bool) -> None:
    cases = []
    for i in range(count):
        update = torch.zeros(n, width * count)
        block = slice(i * width, (i + 1) * width)
        update[:, block] = randoms(n, width, seed=seed + i)
        a = torch.eye(width * count)[block].contiguous()
        expert = Expert(LowRank(update[:, block].contiguous(), a) if low else update.__getitem__)
        cases.append(Case(update.double(), 1.0, [None], expert))
    for towards in ("zero", "mean"):
        merged = merge(cases, ResponseOptions(0.0, towards))
        assert_near(dense(merged), sum(c.update for c in cases), 1e-4)
        assert merged.missed <= 1e-6 * merged.energy


OPTIONS = [ResponseOptions(0.1, t, loud) for t in ("zero", "sum") for loud in ("equal", "own")]


@some
@given(shapes, st.integers(0, 999), st.permutations(range(3)), st.sampled_from(OPTIONS), st.sampled_from([0, 2]))
def test_the_order_of_experts_does_not_matter(
    shape: tuple[int, int], seed: int, order: list[int], options: ResponseOptions, rank: int
) -> None:
    cases = [case(shape, seed + i, "both", rank, weight=i + 1.0) for i in range(3)]
    expected = merge(cases, options)
    found = merge([cases[i] for i in order], options)
    assert_near(dense(found), dense(expected))
    assert found.missed == pytest.approx(expected.missed, rel=1e-3, abs=1e-5 * expected.energy)


@some
@given(shapes, st.integers(0, 999), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.sampled_from(OPTIONS))
def test_scales_that_mean_nothing_change_nothing(
    shape: tuple[int, int], seed: int, loud: float, heavy: float, options: ResponseOptions
) -> None:
    cases = [case(shape, seed + i, "both", weight=i + 0.5) for i in range(3)]
    expected = dense(merge(cases, options))
    louder = [None if f is None else f * loud for f in cases[1].factors]
    changed = [cases[0], replace(cases[1], expert=replace(cases[1].expert, inputs=louder)), cases[2]]
    assert_near(dense(merge(changed, options)), expected)
    heavier = [replace(c, expert=replace(c.expert, weight=c.weight * heavy)) for c in cases]
    assert_near(dense(merge(heavier, options)), expected)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rank", [0, 2])
def test_an_expert_of_weight_0_takes_no_part(options: ResponseOptions, rank: int) -> None:
    def never(block: slice) -> Tensor:
        raise AssertionError("formed")

    cases = [case(MANY, i, "both", rank) for i in range(2)]
    expected = merge(cases, options)
    found = merge_responses([*(c.expert for c in cases), Expert(never, 0.0)], MANY, options)
    assert torch.equal(dense(found), dense(expected))
    assert (found.energy, found.missed) == (expected.energy, expected.missed)


def test_experts_that_all_weigh_0_are_no_merge() -> None:
    with pytest.raises(ValueError, match="weigh 0"):
        merge_responses([Expert(torch.zeros(MANY).__getitem__, 0.0)], MANY, ResponseOptions())


@pytest.mark.parametrize("ridge", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("shape", [MANY, FEW])
def test_an_expert_without_any_update(shape: tuple[int, int], ridge: float) -> None:
    """It says nothing by itself; measured inputs say that they want no answer."""
    n, d = shape
    nothing = torch.zeros(n, d)
    silent = Case(nothing.double(), 1.0, [None], Expert(nothing.__getitem__))
    options = ResponseOptions(ridge, "zero")
    cases = [case(shape, 0), case(shape, 1)]
    assert_near(dense(merge([*cases, silent], options)), dense(merge(cases, options)))
    factors = [randoms(7, d, seed=8)]
    asking = Case(nothing.double(), 1.0, factors, Expert(nothing.__getitem__, 1.0, factors))
    assert_exact([*cases, asking], options)
    for towards in ("zero", "mean", "sum"):
        assert_exact([*cases, silent], ResponseOptions(ridge, towards))
        found = merge([silent, silent], ResponseOptions(ridge, towards))
        assert not dense(found).any()
        assert (found.energy, found.missed) == (0.0, 0.0)


@pytest.mark.parametrize("ridge", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("shape", [MANY, FEW])
def test_inputs_that_are_all_zeros_say_nothing(shape: tuple[int, int], ridge: float) -> None:
    factors = [torch.zeros(45, shape[1])]
    cases = [replace(c, factors=factors, expert=replace(c.expert, inputs=factors)) for c in (case(shape, 0),)]
    for towards in ("zero", "mean", "sum"):
        options = ResponseOptions(ridge, towards)
        assert_near(dense(merge(cases, options)), toward(cases, options))


@pytest.mark.parametrize("shape", [MANY, FEW])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_adapters_of_rank_0(shape: tuple[int, int], ridge: float) -> None:
    n, d = shape
    none = LowRank(torch.zeros(n, 0), torch.zeros(0, d))
    silent = Case(torch.zeros(n, d).double(), 1.0, [None], Expert(none))
    cases = [case(shape, 0, rank=2), silent, case(shape, 1, rank=3)]
    found = assert_exact(cases, ResponseOptions(ridge, "mean"))
    assert isinstance(found.update, LowRank) and found.update.a.shape == (5, d)
    found = merge([silent, silent], ResponseOptions(ridge, "sum"))
    assert isinstance(found.update, LowRank) and found.update.a.shape == (0, d)


@pytest.mark.parametrize("shape", [MANY, FEW, (12, 12)])
@pytest.mark.parametrize("inputs", ["update", "data"])
@pytest.mark.parametrize("towards", ["zero", "sum"])
def test_low_rank_is_the_dense_merge(shape: tuple[int, int], inputs: str, towards: str) -> None:
    cases = [case(shape, i, inputs, rank=3) for i in range(3)]
    formed = [replace(c, expert=replace(c.expert, update=c.update.float().__getitem__)) for c in cases]
    options = ResponseOptions(0.1, towards)
    assert_near(dense(merge(cases, options)), dense(merge(formed, options)))


def test_nothing_given_is_changed() -> None:
    for rank in (0, 2):
        for towards in ("zero", "sum"):
            cases = [case(FEW, i, "both", rank) for i in range(2)]
            update = cases[0].update.float()
            held = [update, *(f for f in cases[0].factors if f is not None)]
            given = cases[0].expert if rank else replace(cases[0].expert, update=update.__getitem__)
            if isinstance(given.update, LowRank):
                held += [given.update.a, given.update.b]
            before = [t.clone() for t in held]
            merge_responses([given, cases[1].expert], FEW, ResponseOptions(0.1, towards))
            assert all(torch.equal(one, same) for one, same in zip(held, before, strict=True))


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("shape", [MANY, FEW])
def test_it_is_repeatable_bit_for_bit(shape: tuple[int, int], rank: int) -> None:
    cases = [case(shape, i, "both", rank) for i in range(3)]
    one, two = (merge(cases, ResponseOptions()) for _ in range(2))
    assert torch.equal(dense(one), dense(two))
    assert (one.energy, one.missed) == (two.energy, two.missed)


@pytest.mark.parametrize("towards", ["zero", "mean"])
@pytest.mark.parametrize("kinds", [(0, 0), (0, 2)])
@pytest.mark.parametrize("rows", [2, 8, 29])
def test_few_rows_stand_for_the_inputs(rows: int, kinds: tuple[int, int], towards: str) -> None:
    cases = [case(MANY, i, rank=rank) for i, rank in enumerate(kinds)]
    stood_for = [
        c if rank else replace(c, factors=[condensed(added_up(c.update.float(), 8 * rows), rows)])
        for c, rank in zip(cases, kinds, strict=True)
    ]
    options = ResponseOptions(0.1, towards, rows=rows)
    expected, *_ = oracle(stood_for, options)
    assert_near(dense(merge(cases, options)), expected)
    kept = decompose_responses([c.expert for c in cases], MANY, options)
    assert_near(dense(kept.merge(0.1)), expected)


@pytest.mark.parametrize(("shape", "rows"), [((300, 40), 128), ((1000, 900), 169), ((4096, 11008), 512), ((9, 80), 9)])
def test_how_many_rows_stand_for_an_update_goes_by_its_rank(shape: tuple[int, int], rows: int) -> None:
    assert ResponseOptions(rows=None).rows_of(shape) == rows
    assert ResponseOptions(rows=7).rows_of(shape) == 7
    assert ResponseOptions(rows=0).rows_of(shape) == shape[0]


@pytest.mark.parametrize("shape", [(60, 20), (20, 60)])
def test_condensed_rows_keep_all_of_an_update_of_no_higher_rank(shape: tuple[int, int]) -> None:
    update = randoms(shape[0], 5, seed=1) @ randoms(5, shape[1], seed=2)
    found = condensed(update, 6)
    assert found.shape == (6, shape[1])
    assert_near(found.T @ found, update.T @ update)
    assert condensed(update, shape[0]) is update
    nothing = condensed(torch.zeros(shape), 3)
    assert nothing.shape == (3, shape[1]) and not nothing.any()


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_condensed_rows_keep_more_than_as_many_that_are_added_up(power: float) -> None:
    update = steep((200, 150), power, 1)
    moment = update.T @ update
    lost = {
        name: float((f.T @ f - moment).norm() / moment.norm())
        for name, f in (("condensed", condensed(update, 30)), ("added up", added_up(update, 30)))
    }
    best = float(torch.linalg.svdvals(update)[30:].pow(4).sum().sqrt() / moment.norm())
    assert best < lost["condensed"] < 3 * best + 0.01 < lost["added up"]


@pytest.mark.parametrize("rows", [0, 30, 100])
def test_rows_that_are_few_enough_stay_as_they_are(rows: int) -> None:
    inputs = randoms(30, 12, seed=1)
    assert added_up(inputs, rows) is inputs


def test_rows_that_are_added_up_keep_the_moment_on_average() -> None:
    """Every row goes to one place with one sign, and places are shared out evenly."""
    found = added_up(torch.eye(30), 8)
    assert found.shape == (8, 30)
    assert torch.equal(found.abs().sum(0), torch.ones(30))
    assert sorted(found.abs().sum(1).tolist()) == [3.0, 3.0, *[4.0] * 6]
    assert torch.equal((found.T @ found).diagonal(), torch.ones(30))
    assert 5 < int((found.sum(0) > 0).sum()) < 25


# ------------------------------------------------------------------------------------------------ published kin


@pytest.mark.parametrize("shape", [(30, 12), (6, 12), (3, 12)])
def test_the_published_form_of_actmat(shape: tuple[int, int]) -> None:
    """(Σ Δ_t C_t)(Σ C_t)⁺ with C_t = Δ_tᵀΔ_t, undivided (arXiv:2604.01329)."""
    cases = [case(shape, i) for i in range(3)]
    moments = [c.update.T @ c.update for c in cases]
    answered = sum(c.update @ moment for c, moment in zip(cases, moments, strict=True))
    expected = answered @ torch.linalg.pinv(sum(moments), rtol=1e-10, hermitian=True)
    assert_near(dense(merge(cases, ResponseOptions(0.0, "zero", "own"))), expected)


def test_the_form_of_regmean() -> None:
    """(Σ Δ_t G_t)(Σ G_t)⁻¹ with G_t = X_tᵀX_t, whose size the weights stand for (arXiv:2212.09849)."""
    inputs = [randoms(60, 12, seed=70 + i) * (i + 1) for i in range(3)]
    updates = [randoms(20, 12, seed=i) for i in range(3)]
    experts = [Expert(u.__getitem__, float(x.square().sum()), [x]) for u, x in zip(updates, inputs, strict=True)]
    grams = [x.double().T @ x.double() for x in inputs]
    answered = sum(u.double() @ g for u, g in zip(updates, grams, strict=True))
    expected = answered @ torch.linalg.inv(sum(grams))
    assert_near(dense(merge_responses(experts, (20, 12), ResponseOptions(0.0))), expected)


# ---------------------------------------------------------------------------------------------------- truncated


def low_rank_merge(
    inputs: str, towards: str, ranks: Sequence[int] = (3, 2, 4), shape: tuple[int, int] = (14, 30)
) -> tuple[LowRank, Tensor, Tensor]:
    """A merge in factors, its moments, and S."""
    cases = [case(shape, i, inputs, rank) for i, rank in enumerate(ranks)]
    options = ResponseOptions(0.1, towards)
    merged = merge(cases, options)
    *_, s = oracle(cases, options)
    assert isinstance(merged.update, LowRank) and merged.moments is not None
    return merged.update, merged.moments, s


@pytest.mark.parametrize("towards", ["zero", "sum"])
@pytest.mark.parametrize("inputs", ["update", "data", "both"])
@pytest.mark.parametrize("shape", [(14, 30), (20, 8)])
def test_moments_weigh_directions_by_what_they_answer(shape: tuple[int, int], inputs: str, towards: str) -> None:
    update, moments, s = low_rank_merge(inputs, towards, shape=shape)
    a = update.a.double()
    assert_near(moments, a @ s @ a.T)


@pytest.mark.parametrize("towards", ["zero", "sum"])
@pytest.mark.parametrize("inputs", ["update", "data"])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_truncated_is_the_best_in_what_it_answers(rank: int, inputs: str, towards: str) -> None:
    update, moments, s = low_rank_merge(inputs, towards)
    reduced, kept = truncated(update, moments, rank, None)
    assert reduced.b.shape == (14, rank) and reduced.a.shape == (rank, 30)
    values, vectors = torch.linalg.eigh(s)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    answers = update.b.double() @ update.a.double() @ root
    squares = torch.linalg.svdvals(answers).square()
    lost = ((update.b.double() @ update.a.double() - reduced.b.double() @ reduced.a.double()) @ root).square().sum()
    assert float(lost) == pytest.approx(float(squares[rank:].sum()), rel=1e-4, abs=1e-7 * float(squares.sum()))
    assert kept == pytest.approx(float(squares[:rank].sum() / squares.sum()), abs=1e-6)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95, 1.0])
def test_truncated_keeps_the_share_that_is_asked_for_and_no_more(share: float) -> None:
    update, moments, _ = low_rank_merge("data", "zero")
    reduced, kept = truncated(update, moments, None, share)
    assert kept >= share - 1e-8
    if len(reduced.a) > 1:
        assert truncated(update, moments, len(reduced.a) - 1, None)[1] < share
    assert len(truncated(update, moments, 1, share)[0].a) == 1


@pytest.mark.parametrize("rank", [None, 9, 20])
def test_at_full_rank_nothing_is_lost(rank: int | None) -> None:
    update, moments, _ = low_rank_merge("data", "sum")
    reduced, kept = truncated(update, moments, rank, None)
    assert kept == 1.0
    assert len(reduced.a) == 9
    assert_near(reduced.dense().double(), update.dense().double(), 1e-6)


@pytest.mark.parametrize("shape", [(5, 30), (30, 5), (4, 4)])
def test_more_directions_than_neurons_or_inputs_are_as_many_as_those(shape: tuple[int, int]) -> None:
    update, moments, _ = low_rank_merge("data", "sum", shape=shape)
    reduced, kept = truncated(update, moments, None, None)
    assert len(reduced.a) == min(shape)
    assert kept == pytest.approx(1.0)
    assert_near(reduced.dense().double(), update.dense().double(), 1e-6)


def test_directions_that_no_input_asks_for_go_by_length() -> None:
    """Under `toward: sum` they are part of the merge: of two, the shorter one goes first."""
    b, a = torch.eye(6)[:, :3].contiguous(), torch.eye(8)[:3] * torch.tensor([[1.0], [5.0], [2.0]])
    moments = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    reduced, kept = truncated(LowRank(b, a), moments, 2, None)
    assert kept == 1.0
    expected = (b @ a).clone()
    expected[2] = 0
    assert_near(reduced.dense().double(), expected.double(), 1e-6)


def test_nothing_can_be_truncated() -> None:
    update, moments = LowRank(torch.zeros(4, 2), torch.zeros(2, 6)), torch.zeros(2, 2).double()
    reduced, kept = truncated(update, moments, 1, 0.9)
    assert kept == 1.0
    assert not reduced.dense().any()
    assert reduced.b.shape == (4, 1)


@pytest.mark.parametrize("shape", [MANY, FEW])
def test_the_automatic_ridge_is_what_the_inputs_are_worth(shape: tuple[int, int]) -> None:
    n, d = shape
    full, measured = [case(shape, i) for i in range(2)], [case(shape, i, "both", rank=3) for i in range(2)]
    adapters = [case(shape, i, rank=r) for i, r in enumerate((2, 4, 3))]
    for ridge, cases in ((0.1, full), (0.1, [full[0], adapters[0]]), (0.01, measured), (0.01, [full[0], measured[0]])):
        assert automatic_ridge([c.expert for c in cases], d) == ridge
        assert_exact(cases, ResponseOptions(ridge))
        assert_near(dense(merge(cases, ResponseOptions())), dense(merge(cases, ResponseOptions(ridge))), 1e-12)
    # Orthogonal adapters of one rank come out as (1 + c) / (1 + c T) of their sum, with c = 6 here.
    eye, b = torch.eye(d), randoms(n, 6, seed=1)
    apart = [
        Expert(
            LowRank(
                b[:, 2 * t : 2 * t + 2], torch.linalg.qr(b[:, 2 * t : 2 * t + 2]).R.inverse() @ eye[2 * t : 2 * t + 2]
            )
        )
        for t in range(3)
    ]
    update = merge_responses(apart, shape, ResponseOptions()).update
    assert isinstance(update, LowRank)
    total = sum(e.update.dense() for e in apart if isinstance(e.update, LowRank))
    assert_near(update.dense(), total * 7 / 19, 1e-5)


def test_adapters_that_have_drawn_the_same_factor_are_told_apart_by_what_they_make_of_it() -> None:
    """And the less the rows of their factors have in common, the firmer they are held together."""
    n, d, rank = 20, 24, 3
    a, other = randoms(rank, d, seed=1), randoms(rank, d, seed=2)
    same = [Expert(LowRank(randoms(n, rank, seed=t), randoms(rank, rank, seed=9 + t) @ a)) for t in range(3)]
    assert automatic_ridge(same, d) == pytest.approx(0.1 * d / rank)
    assert automatic_ridge(same[:1], d) == pytest.approx(0.1 * d / rank)
    moved = [Expert(LowRank(randoms(n, rank, seed=t), a + t * 0.2 * other)) for t in range(2)]
    one, two = (torch.linalg.qr(e.update.a.double().T).Q for e in moved if isinstance(e.update, LowRank))
    shared = float(torch.linalg.svdvals(one.T @ two).square().mean())
    assert automatic_ridge(moved, d) == pytest.approx(6 * (1 - shared) * d / rank)


# ---------------------------------------------------------------------------------------------- how exact, and when


def steep(shape: tuple[int, int], power: float, seed: int) -> Tensor:
    """An update whose singular values fall as j^−power, of directions that are each expert's own but for the first."""
    n, d = shape
    k = min(n, d)
    left, right = torch.linalg.qr(randoms(n, k, seed=seed).double()).Q, randoms(d, k, seed=seed + 100).double()
    right[:, 0] = randoms(d, seed=7).double()
    values = torch.arange(1, k + 1, dtype=torch.float64) ** -power
    return (left * values @ torch.linalg.qr(right).Q.T).float()


def steep_cases(shape: tuple[int, int], power: float, inputs: str) -> list[Case]:
    found = []
    for seed in range(3):
        update = steep(shape, power, seed)
        factor = steep((50, shape[1]), power, seed + 30) * 300
        factors: list[Tensor | None] = {"update": [None], "data": [factor], "both": [factor, None]}[inputs]
        found.append(Case(update.double(), 1.0, factors, Expert(update.__getitem__, 1.0, factors)))
    return found


@pytest.mark.parametrize("inputs", ["update", "data", "both"])
@pytest.mark.parametrize("shape", [(120, 90), (30, 190)], ids=["many", "few"])
@pytest.mark.parametrize("power", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("ridge", [0.1, 0.01, 1e-3])
def test_it_is_exact_however_steep_the_spectra(shape: tuple[int, int], power: float, inputs: str, ridge: float) -> None:
    for towards in ("zero", "mean"):
        assert_exact(steep_cases(shape, power, inputs), ResponseOptions(ridge, towards))


RIDGES = (0.0, 1e-3, 0.1, 3.0, 1000.0)


@pytest.mark.parametrize("kind", ["dense", "low rank", "mixed"])
@pytest.mark.parametrize("towards", ["zero", "mean", "sum"])
@pytest.mark.parametrize("inputs", ["update", "both"])
@pytest.mark.parametrize("shape", [MANY, FEW], ids=["many", "few"])
def test_one_decomposition_is_the_merge_by_any_ridge(
    shape: tuple[int, int], kind: str, inputs: str, towards: str
) -> None:
    ranks = {"dense": (0, 0), "low rank": (2, 3), "mixed": (2, 0)}[kind]
    cases = [case(shape, i, inputs, r, i + 1.0) for i, r in enumerate(ranks)]
    kept = decompose_responses([c.expert for c in cases], shape, ResponseOptions(None, towards))
    for ridge in RIDGES:
        expected, energy, missed, s = oracle(cases, ResponseOptions(ridge, towards))
        found = kept.merge(ridge)
        assert_near(dense(found), expected)
        assert found.energy == pytest.approx(energy, rel=1e-5)
        assert found.missed == pytest.approx(missed, rel=1e-4, abs=1e-5 * energy)
        fresh = merge(cases, ResponseOptions(ridge, towards))
        assert_near(dense(found), dense(fresh))
        assert isinstance(found.update, LowRank) == (kind == "low rank")
        if isinstance(found.update, LowRank):
            assert found.moments is not None and fresh.moments is not None
            assert_near(found.moments, fresh.moments)
            a = found.update.a.double()
            assert_near(found.moments, a @ s @ a.T)
    assert_near(dense(kept.merge(None)), dense(merge(cases, ResponseOptions(None, towards))))


@pytest.mark.parametrize("shape", [(60, 45), (20, 95)], ids=["many", "few"])
def test_one_decomposition_of_steep_spectra_is_exact(shape: tuple[int, int]) -> None:
    cases = steep_cases(shape, 1.0, "both")
    kept = decompose_responses([c.expert for c in cases], shape, ResponseOptions(None, "mean"))
    for ridge in (1.0, 0.1, 0.01, 1e-3):
        assert_near(dense(kept.merge(ridge)), oracle(cases, ResponseOptions(ridge, "mean"))[0])


def test_a_decomposition_of_nothing_is_nothing() -> None:
    nothing = [Expert(torch.zeros(FEW).__getitem__) for _ in range(2)]
    kept = decompose_responses(nothing, FEW, ResponseOptions())
    for ridge in (0.0, 0.1):
        found = kept.merge(ridge)
        assert not dense(found).any()
        assert (found.energy, found.missed) == (0.0, 0.0)
    assert kept.nbytes > 0
