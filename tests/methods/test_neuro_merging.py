"""The six steps of NeuroMerging through the method itself, by hand and against the oracle."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from neuron_methods.methods.contract import MergeSettings
from neuron_methods.support.errors import UserError
from tests import oracle
from tests.support.tensors import (
    PLAIN,
    assert_agree,
    make_experts,
    make_model,
    merge,
    merge_models,
    merge_with,
    randoms,
    rows,
    with_updates,
)

# Step 1: trim


def test_step_1_trim_has_one_threshold_per_expert_over_all_tensors() -> None:
    base = {"small": torch.zeros(2, 2), "large": torch.zeros(2, 2), "points": torch.zeros(2)}
    expert = {
        "small": rows([1.0, 2.0], [3.0, 4.0]),
        "large": rows([10.0, -20.0], [30.0, 40.0]),
        "points": torch.tensor([-5.0, 0.5]),
    }
    # sorted: .5 1 2 3 4 5 10 20 30 40; density 0.5: rank 5, threshold 4
    merged = merge_models(base, [expert], density=0.5, lambda_orthogonal=1.0)
    assert merged["small"].tolist() == [[0.0, 0.0], [0.0, 4.0]]
    assert merged["large"].tolist() == [[10.0, -20.0], [30.0, 40.0]]
    assert merged["points"].tolist() == [-5.0, 0.0]


def test_step_1_trim_per_tensor() -> None:
    base = {"small": torch.zeros(2, 2), "large": torch.zeros(2, 2), "points": torch.zeros(2)}
    expert = {
        "small": rows([1.0, 2.0], [3.0, 4.0]),
        "large": rows([10.0, -20.0], [30.0, 40.0]),
        "points": torch.tensor([-5.0, 0.5]),
    }
    # the rank-th smallest is kept: ranks 2, 2 and 1
    for scale in (1.0, "auto"):
        merged = merge_models(base, [expert], density=0.5, trim="tensor", lambda_orthogonal=scale)
        factor = 1.0 if scale == 1.0 else 115.5 / (115.5 - 11.0)
        assert merged["small"].flatten().tolist() == pytest.approx([v * factor for v in (0.0, 2.0, 3.0, 4.0)])
        assert merged["large"].flatten().tolist() == pytest.approx([v * factor for v in (0.0, -20.0, 30.0, 40.0)])
        assert merged["points"].tolist() == pytest.approx([-5.0 * factor, 0.5 * factor])


def test_step_1_trim_has_a_density_per_expert() -> None:
    base = torch.zeros(1, 4)
    experts = [rows([1.0, 2.0, 3.0, 4.0]), rows([4.0, 3.0, 2.0, 1.0])]
    merged = merge(base, *experts, density=[0.25, 0.75], lambda_orthogonal=1.0, consensus="sum")
    expected = oracle.merge_rows(
        base, experts, thresholds=[3.0, 1.0], weights=[1, 1], lambda_orthogonal=1, consensus="sum"
    )
    assert torch.allclose(merged.double(), expected)


def test_step_1_trim_comes_before_the_weight() -> None:
    base, first, second = torch.zeros(1, 4), rows([1.0, 2.0, 0.0, 0.0]), rows([0.0, 0.0, 3.0, 4.0])
    # ranks 3 of (0 0 1 2) and (0 0 3 4): thresholds 1 and 3, whatever the weights
    merged = merge(base, first, second, density=0.25, weight=[100.0, 0.01], lambda_orthogonal=1.0)
    assert merged.tolist() == [pytest.approx([100.0, 200.0, 0.03, 0.04])]


def test_step_1_trim_counts_point_weights() -> None:
    base = {"rows": torch.zeros(1, 2), "points": torch.zeros(6)}
    expert = {"rows": rows([1.0, 2.0]), "points": torch.tensor([3.0, 4.0, 5.0, 6.0, 7.0, 8.0])}
    merged = merge_models(base, [expert], density=0.5, lambda_orthogonal=1.0)
    assert merged["rows"].tolist() == [[0.0, 0.0]]
    assert merged["points"].tolist() == [0.0, 4.0, 5.0, 6.0, 7.0, 8.0]


# Steps 2 and 3: split, and the parallel parts


def test_step_2_split_gives_back_one_expert() -> None:
    base, expert = randoms((20, 9), 2)
    merged = merge(base, expert, density=1.0, lambda_parallel=1.0, lambda_orthogonal=1.0)
    assert torch.allclose(merged, expert, atol=1e-6)


def test_step_2_split_separates_the_two_scales() -> None:
    # w = (2, 0), τ = (3, 4) = 1.5 w + (0, 4)
    base, expert = rows([2.0, 0.0]), rows([5.0, 4.0])
    assert merge(base, expert, **PLAIN).tolist() == [[2.0, 4.0]]
    assert merge(base, expert, density=1.0, lambda_parallel=1.0, lambda_orthogonal=0.0).tolist() == [[5.0, 0.0]]
    assert merge(base, expert, density=1.0, lambda_parallel=0.5, lambda_orthogonal=-2.0).tolist() == [[3.5, -8.0]]


def test_step_2_split_of_a_zero_base_row_is_all_orthogonal() -> None:
    base, expert = rows([0.0, 0.0], [2.0, 0.0]), rows([3.0, 4.0], [5.0, 4.0])
    merged = merge(base, expert, density=1.0, lambda_parallel=1.0, lambda_orthogonal=0.0)
    assert merged.tolist() == [[0.0, 0.0], [5.0, 0.0]]
    assert merge(base, expert, **PLAIN).tolist() == [[3.0, 4.0], [2.0, 4.0]]


def test_step_3_parallel_averages_the_coefficients_and_multiplies_the_base_row() -> None:
    # coefficients 1.5 and 0.5: 1 × w, and not 1 × w / ‖w‖
    base, first, second = rows([2.0, 0.0]), rows([5.0, 4.0]), rows([3.0, -7.0])
    merged = merge(base, first, second, density=1.0, lambda_parallel=1.0, lambda_orthogonal=0.0)
    assert merged.tolist() == [[4.0, 0.0]]
    summed = merge(base, first, second, density=1.0, lambda_parallel=1.0, lambda_orthogonal=0.0, consensus="sum")
    assert summed.tolist() == [[6.0, 0.0]]


def test_step_3_parallel_elects_the_stronger_sign() -> None:
    base = rows([2.0, 0.0])
    experts = [base * 1.5, base * 1.25, base * 0.75]  # 0.5, 0.25, −0.25
    merged = merge(base, *experts, density=1.0, lambda_parallel=1.0, lambda_orthogonal=0.0)
    assert merged.tolist() == [[2.75, 0.0]]


@pytest.mark.parametrize("scratch", [1, 1 << 28])
@pytest.mark.parametrize(("others", "elected"), [(1.0, 1.0), (-1.0, -1.0)])
def test_step_3_parallel_resolves_ties_by_all_neurons_of_the_tensor(
    others: float, elected: float, scratch: int
) -> None:
    base = torch.full((5, 3), 0.3)
    coefficients = torch.tensor([[0.5, -0.5], [others, others], [others, others], [-others, 0.0], [others, 0.0]])
    experts = [base + coefficients[:, t : t + 1] * base for t in range(2)]
    settings = MergeSettings(scratch_bytes=scratch)
    merged = merge_with(settings, base, *experts, density=1.0, lambda_parallel=1.0, lambda_orthogonal=0.0)
    expected = torch.tensor([0.5 * elected, others, others, -others, others])
    assert torch.allclose(merged, base + expected.unsqueeze(1) * base, atol=1e-6)


def test_step_3_parallel_ties_are_ties_in_float32() -> None:
    """Coefficients that oppose each other exactly but for the order in which float64 products were added."""
    base, update = randoms((6, 500), 2)
    update[1:] = base[1:] * 0.25
    experts = [base + 0.5 * base, base - 0.5 * base]
    first = merge(base, *experts, density=1.0, lambda_parallel=1.0, lambda_orthogonal=0.0)
    second = merge(base, *experts[::-1], density=1.0, lambda_parallel=1.0, lambda_orthogonal=0.0)
    assert torch.allclose(first, base * 0.5, atol=1e-5)
    assert torch.allclose(second, base * 0.5, atol=1e-5)


# Step 4: the orthogonal parts


def test_step_4_orthogonal_adds_disjoint_experts() -> None:
    base = rows([0.0, 0.0, 0.0])
    assert with_updates(base, rows([3.0, 0.0, 0.0]), rows([0.0, 2.0, 0.0])).tolist() == [[3.0, 2.0, 0.0]]


def test_step_4_orthogonal_averages_experts_that_agree() -> None:
    base = rows([0.0, 0.0, 2.0])
    assert with_updates(base, rows([3.0, 4.0, 0.0]), rows([9.0, 12.0, 0.0])).tolist() == [pytest.approx([6, 8, 0])]
    update = rows([3.0, 4.0, 0.0])
    assert with_updates(base, update, update).tolist() == [pytest.approx([3.0, 4.0, 0.0])]


def test_step_4_orthogonal_ignores_experts_with_nothing_in_the_neuron() -> None:
    base = torch.zeros(2, 3)
    first, second = rows([3.0, 4.0, 0.0], [0.0, 0.0, 0.0]), rows([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
    merged = with_updates(base, first, second, torch.zeros(2, 3))
    assert torch.allclose(merged, first + second)


def test_step_4_orthogonal_ignores_experts_that_trimming_emptied() -> None:
    base = torch.zeros(2, 2)
    # rank 3 of (0.1 0.2 5 6): the first neuron of the second expert is emptied
    first, second = rows([5.0, 6.0], [0.1, 0.2]), rows([0.1, 0.2], [5.0, 6.0])
    merged = merge(base, first, second, density=0.25, lambda_orthogonal=1.0)
    assert torch.allclose(merged, rows([5.0, 6.0], [5.0, 6.0]))


def test_step_4_orthogonal_keeps_rank_energy() -> None:
    base, first, second = torch.zeros(1, 2), rows([3.0, 0.0]), rows([0.0, 2.0])
    assert with_updates(base, first, second, rank_energy=0.69).tolist() == [[3.0, 0.0]]
    assert with_updates(base, first, second, rank_energy=0.70).tolist() == [[3.0, 2.0]]


@pytest.mark.parametrize("order", list(permutations(range(2))))
def test_step_4_orthogonal_does_not_let_the_order_settle_a_tie(order: tuple[int, ...]) -> None:
    updates = [rows([3.0, 4.0]), rows([-3.0, -4.0])]
    merged = with_updates(rows([0.0, 0.0]), *(updates[index] for index in order))
    assert merged.tolist() == [pytest.approx([-3.0, -4.0])]


# Step 5: point weights


def test_step_5_points_are_elected_and_averaged_entry_by_entry() -> None:
    base = torch.zeros(4)
    first, second = torch.tensor([1.0, 2.0, -1.0, 0.0]), torch.tensor([3.0, -1.0, -5.0, 4.0])
    assert with_updates(base, first, second).tolist() == [2.0, 2.0, -3.0, 4.0]
    assert with_updates(base, first, second, consensus="sum").tolist() == [4.0, 2.0, -6.0, 4.0]


def test_step_5_points_resolve_ties_by_the_entries_of_the_tensor() -> None:
    first, second = torch.tensor([2.0, 1.0, 1.0, -1.0]), torch.tensor([-2.0, 1.0, 1.0, -1.0])
    assert with_updates(torch.zeros(4), first, second).tolist() == [2.0, 1.0, 1.0, -1.0]
    assert with_updates(torch.zeros(4), -first, -second).tolist() == [-2.0, -1.0, -1.0, 1.0]
    assert with_updates(torch.zeros(2), first[[0, 3]], second[[0, 3]]).tolist() == [-2.0, -1.0]
    assert with_updates(torch.zeros(1), first[:1], second[:1]).tolist() == [-2.0]


def test_step_5_points_take_scalars() -> None:
    base = torch.tensor(2.0)
    merged = merge(base, torch.tensor(3.0), torch.tensor(6.0), **PLAIN)
    assert merged.shape == ()
    assert merged.item() == 4.5


def test_step_5_points_take_lambda_orthogonal_and_no_other() -> None:
    base, expert = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    merged = merge(base, expert, density=1.0, lambda_orthogonal=0.5, lambda_parallel=7.0)
    assert merged.tolist() == [1.5, 3.0]


def test_step_6_points_may_take_the_mean_of_both_scales() -> None:
    """As with both scales tuned (Fang et al., merging_methods.py): half of ψ is scaled by each."""
    base = {"points": torch.tensor([1.0, 2.0]), "rows": rows([2.0, 0.0])}
    expert = {"points": torch.tensor([2.0, 4.0]), "rows": rows([5.0, 4.0])}
    scales = {"density": 1.0, "lambda_parallel": -0.5, "lambda_orthogonal": 2.5}
    merged = merge_models(base, [expert], **scales, lambda_points="mean")
    assert merged["points"].tolist() == [2.0, 4.0]
    assert merged["rows"].tolist() == merge_models(base, [expert], **scales)["rows"].tolist() == [[0.5, 10.0]]


def test_step_6_points_take_half_of_the_automatic_scale_where_the_other_one_is_0() -> None:
    base, expert = torch.zeros(4), torch.tensor([1.0, 2.0, 3.0, 4.0])  # removed 3 of 10
    merged = merge(base, expert, density=0.25, lambda_points="mean")
    assert merged.tolist() == pytest.approx([0.0, 0.0, 1.5 / 0.7, 2.0 / 0.7])


def test_step_6_points_have_no_mean_of_a_scale_that_differs_by_neuron() -> None:
    with pytest.raises(UserError, match=r"lambda_points: mean .* lambda_orthogonal: norm"):
        merge(*randoms((4, 4), 2), lambda_points="mean", lambda_orthogonal="norm")


# Step 6: scale


def test_step_6_scale_is_automatic() -> None:
    # first: rank 3 of (1 2 3 4): removed 3 of 10; second: rank 3 of (1 1 1 7): threshold 1, nothing removed
    base, first, second = torch.zeros(1, 4), rows([1.0, 2.0, 3.0, 4.0]), rows([1.0, 1.0, 1.0, 7.0])
    alone = merge(base, first, density=0.25)
    assert alone.tolist() == [pytest.approx([0.0, 0.0, 3.0 / 0.7, 4.0 / 0.7])]
    assert merge(base, second, density=0.25).tolist() == [[1.0, 1.0, 1.0, 7.0]]
    both = merge(base, first, second, density=0.25)
    plain = merge(base, first, second, density=0.25, lambda_orthogonal=1.0)
    assert torch.allclose(both, plain / 0.7)


def test_step_6_scale_is_automatic_over_the_whole_model() -> None:
    base = {"rows": torch.zeros(1, 2), "points": torch.zeros(2)}
    expert = {"rows": rows([1.0, 4.0]), "points": torch.tensor([2.0, 3.0])}
    merged = merge_models(base, [expert], density=0.25)  # rank 3: removed 3 of 10
    assert merged["rows"].tolist() == [pytest.approx([0.0, 4.0 / 0.7])]
    assert merged["points"].tolist() == pytest.approx([0.0, 3.0 / 0.7])


@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_step_6_scale_is_one_where_values_are_summed(trim: str) -> None:
    base, experts = torch.zeros(3, 8), randoms((3, 8), 3)
    automatic = merge(base, *experts, density=0.3, consensus="sum", trim=trim)
    assert torch.equal(automatic, merge(base, *experts, density=0.3, consensus="sum", trim=trim, lambda_orthogonal=1.0))


@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_step_6_scale_does_not_hear_experts_of_weight_zero(trim: str) -> None:
    base, first, second = torch.zeros(1, 4), rows([1.0, 2.0, 3.0, 4.0]), rows([1.0, 1.0, 1.0, 7.0])
    merged = merge(base, first, second, density=0.25, weight=[0.0, 1.0], trim=trim)
    assert merged.tolist() == [[1.0, 1.0, 1.0, 7.0]]


def test_step_6_scale_of_an_unchanged_model_is_one() -> None:
    base = make_model(0)
    assert_agree(merge_models(base, [base, base]), base, 1e-12)


@pytest.mark.parametrize("consensus", ["mean", "sum"])
def test_step_6_scale_may_match_the_norm_of_every_neuron(consensus: str) -> None:
    base, *experts = randoms((6, 32), 4)
    wanted = torch.stack([expert - base for expert in experts]).norm(dim=2).mean(dim=0)
    settings = {"density": 0.4, "consensus": consensus}
    matched = merge(base, *experts, **settings, lambda_orthogonal="norm") - base
    assert torch.allclose(matched.norm(dim=1), wanted, rtol=1e-5)
    plain = merge(base, *experts, **settings, lambda_orthogonal=1.0) - base
    assert torch.allclose(torch.nn.functional.cosine_similarity(matched, plain), torch.ones(6))
    doubled = merge(base, *experts, **settings, lambda_orthogonal="norm", weight=2.0) - base
    assert torch.allclose(doubled, 2 * matched, atol=1e-5)


def test_step_6_norm_of_points_is_matched_over_the_tensor() -> None:
    base, first, second = torch.zeros(2), torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    merged = merge(base, first, second, density=1.0, lambda_orthogonal="norm")
    assert merged.tolist() == pytest.approx([2.1, 2.8])  # 3.5 long


def test_step_6_norm_is_of_the_experts_that_take_part() -> None:
    base, *experts = randoms((5, 16), 3)
    settings = {"density": 1.0, "lambda_orthogonal": "norm"}
    alone = merge(base, experts[0], **settings)
    assert torch.allclose(merge(base, *experts, weight=[1.0, 0.0], **settings), alone, atol=1e-6)
    assert torch.allclose((alone - base).norm(dim=1), (experts[0] - base).norm(dim=1))
    points = [tensor[0] for tensor in (base, *experts)]
    assert torch.allclose(merge(*points, weight=[1.0, 0.0], **settings), points[1], atol=1e-6)


def test_step_6_norm_of_experts_that_cancel_out_or_changed_nothing_is_nothing() -> None:
    base, update = randoms((5, 16), 2)
    for experts in ([base + update, base - update], [base, base]):
        for tensors in ([base, *experts], [t[0] for t in (base, *experts)]):
            merged = merge(*tensors, density=1.0, lambda_orthogonal="norm", consensus="sum")
            assert merged.isfinite().all()
    assert torch.equal(merge(base, base, base, density=1.0, lambda_orthogonal="norm"), base)


def test_weights_multiply_the_update() -> None:
    base, first, second = torch.zeros(1, 3), rows([3.0, 0.0, 0.0]), rows([0.0, 2.0, 0.0])
    assert with_updates(base, first, second, weight=[2.0, -1.0]).tolist() == [[6.0, -2.0, 0.0]]
    points = with_updates(torch.zeros(3), first[0], second[0], weight=[2.0, -1.0])
    assert points.tolist() == [6.0, -2.0, 0.0]


def test_an_expert_of_weight_zero_takes_no_part() -> None:
    base, *experts = randoms((10, 8), 3)
    without = merge(base, experts[0], density=0.5)
    assert torch.allclose(merge(base, *experts, density=0.5, weight=[1.0, 0.0]), without, atol=1e-6)
    points = [tensor[0] for tensor in (base, *experts)]
    assert torch.allclose(merge(*points, **PLAIN, weight=[1.0, 0.0]), points[1])


# Our own: trimming by what experts differ in


DIFFERING = {"trim": "differing", "lambda_orthogonal": 1.0}


def test_trim_differing_keeps_what_experts_differ_in() -> None:
    base = torch.zeros(2, 2)
    first, second = rows([8.0, 4.0], [2.0, 6.0]), rows([8.0, 0.0], [0.0, 0.0])
    # variances 0 and 4, 1 and 9
    merged = merge(base, first, second, density=0.5, **DIFFERING)
    assert merged.tolist() == [[0.0, 4.0], [0.0, 6.0]]
    points = merge(base.flatten(), first.flatten(), second.flatten(), density=0.5, **DIFFERING)
    assert points.tolist() == [0.0, 4.0, 0.0, 6.0]


def test_trim_differing_keeps_all_at_density_1_and_selects_in_each_tensor_by_itself() -> None:
    base = make_model(1)
    experts = make_experts(base, 3)
    assert_agree(
        merge_models(base, experts, density=1.0, **DIFFERING),
        merge_models(base, experts, density=1.0, lambda_orthogonal=1.0),
        tolerance=1e-7,
    )
    merged = merge_models(base, experts, density=0.25, **DIFFERING)
    for name in ("embed", "proj"):
        updates = torch.stack([expert[name] - base[name] for expert in experts]).double()
        kept = updates.var(dim=0, correction=0)
        kept = kept > kept.flatten().kthvalue(kept.numel() * 3 // 4).values
        masked = [base[name] + update.float() * kept for update in updates]
        expected = merge(base[name], *masked, **PLAIN)
        assert torch.allclose(merged[name], expected, atol=1e-6)


def test_trim_differing_does_not_depend_on_blocks_or_on_experts_of_weight_zero() -> None:
    base, *experts = randoms((40, 8), 5)
    options = {"density": 0.3, "spectral_exponent": 0.5, "lambda_parallel": 0.5, **DIFFERING}
    whole = merge(base, *experts, **options)
    assert torch.allclose(merge_with(MergeSettings(scratch_bytes=1), base, *experts, **options), whole, atol=1e-6)
    without = merge(base, *experts[:3], **options)
    assert torch.allclose(merge(base, *experts, weight=[1.0, 1.0, 1.0, 0.0], **options), without, atol=1e-6)


# Our own: a tempered spectrum


def test_spectral_exponent_is_of_all_neurons_together() -> None:
    # singular values 9 and 16, of one neuron each, become 3c and 4c
    c = 337**0.5 / 5
    update = with_updates(torch.zeros(2, 2), rows([9.0, 0.0], [0.0, 16.0]), spectral_exponent=0.5)
    assert torch.allclose(update, rows([3 * c, 0.0], [0.0, 4 * c]), atol=1e-5)


def test_spectral_exponent_leaves_an_orthogonal_update() -> None:
    base, *experts = randoms((10, 8), 4)
    update = merge(base, *experts, **PLAIN, spectral_exponent=0.3) - base
    assert (update * base).sum(dim=1).abs().max() < 1e-5
    plain = merge(base, *experts, **PLAIN) - base
    assert (update - plain).abs().max() > 0.1


def test_spectral_exponent_keeps_lambda_linear() -> None:
    base, *experts = randoms((10, 8), 4)
    updates = [
        merge(base, *experts, density=0.5, lambda_orthogonal=x, spectral_exponent=0.5) - base for x in (1.0, 2.5)
    ]
    assert torch.allclose(updates[1], 2.5 * updates[0], atol=1e-5)


def test_spectral_exponent_has_no_say_over_points_and_blocks() -> None:
    points = randoms((9,), 3)
    assert torch.equal(merge(*points, spectral_exponent=0.5), merge(*points))
    matrices = randoms((40, 8), 4)
    options = {"trim": "tensor", "lambda_orthogonal": "norm", "spectral_exponent": 0.5}
    one_by_one = merge_with(MergeSettings(scratch_bytes=1), *matrices, **options)
    whole = merge(*matrices, **options)
    assert torch.allclose(one_by_one, whole, atol=1e-6)


# All steps together, against the oracle


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"density": 0.4, "lambda_orthogonal": 0.7},
        {"density": 0.9, "lambda_parallel": 0.8},
        {"density": 1.0, "rank_energy": 0.7},
        {"density": 0.5, "consensus": "sum", "lambda_parallel": -0.5},
        {"density": 0.6, "spectral_exponent": 0.5, "lambda_parallel": 0.5},
        {"density": 1.0, "spectral_exponent": 0.0},
        {"density": 0.5, "lambda_points": "mean", "lambda_parallel": 0.4},
    ],
    ids=str,
)
@pytest.mark.parametrize("experts", [1, 2, 3, 5])
def test_models_agree_with_the_oracle(experts: int, parameters: dict) -> None:
    base = make_model(1)
    others = make_experts(base, experts)
    expected = oracle.merge_model(base, others, **parameters)
    assert_agree(merge_models(base, others, **parameters), expected)


def test_weighted_models_agree_with_the_oracle() -> None:
    base = make_model(2)
    others = make_experts(base, 3)
    weights = [0.5, -1.0, 2.0]
    expected = oracle.merge_model(base, others, density=0.3, weights=weights, lambda_parallel=1.0)
    assert_agree(merge_models(base, others, density=0.3, weight=weights, lambda_parallel=1.0), expected)
