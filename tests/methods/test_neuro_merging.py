"""The six steps of NeuroMerging through the method itself, by hand and against the oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import permutations

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import neuron_methods
from neuron_methods.errors import UserError
from neuron_methods.kernels.task_vectors import TaskVector
from neuron_methods.methods.contract import MergeContext, merge_context
from neuron_methods.methods.neuro_merging import merge_neurons
from tests import oracle

neuron_methods.register()

StateDict = dict[str, Tensor]
# What leaves the update as it is, so that one step at a time can be looked at.
PLAIN = {"density": 1.0, "lambda_orthogonal": 1.0}


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values)


def merge(base: Tensor, *experts: Tensor, name: str = "weight", **parameters: object) -> Tensor:
    """One tensor merged by mergekit's in-memory API."""
    return merge_tensors([base, *experts], "neuro_merging", base_index=0, name=name, parameters=parameters)


def merge_models(base: StateDict, experts: Sequence[StateDict], **parameters: object) -> StateDict:
    models = {"base": base, **{f"expert-{index}": expert for index, expert in enumerate(experts)}}
    return merge_state_dicts(models, "neuro_merging", base="base", parameters=parameters)


def with_updates(base: Tensor, *updates: Tensor, **parameters: object) -> Tensor:
    """What the merge adds to a zero base: every update is orthogonal there."""
    return merge(base, *(base + update for update in updates), **{**PLAIN, **parameters}) - base


def randoms(shape: tuple[int, ...], count: int, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for _ in range(count)]


def make_model(seed: int, dtype: torch.dtype = torch.float32) -> StateDict:
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (30, 12),
        "proj": (16, 12),
        "norm": (12,),
        "bias": (16,),
        "scale": (),
    }
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def make_experts(base: StateDict, count: int, seed: int = 100) -> list[StateDict]:
    """Updates of many sizes, a few of them large, as fine-tuning leaves them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: (weights.float() + 0.01 * torch.randn(weights.shape, generator=generator).pow(3)).to(weights.dtype)
            for name, weights in base.items()
        }
        for _ in range(count)
    ]


def assert_agree(found: StateDict, expected: StateDict, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        difference = (found[name].double() - expected[name].double()).abs()
        assert difference.numel() == 0 or difference.max() < tolerance, name


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
    with merge_context(MergeContext(scratch_bytes=scratch)):
        merged = merge(base, *experts, density=1.0, lambda_parallel=1.0, lambda_orthogonal=0.0)
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


# All steps together, against the oracle


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"density": 0.4, "lambda_orthogonal": 0.7},
        {"density": 0.9, "lambda_parallel": 0.8},
        {"density": 1.0, "rank_energy": 0.7},
        {"density": 0.5, "consensus": "sum", "lambda_parallel": -0.5},
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


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtypes", [*([d, d, d] for d in DTYPES), *permutations(DTYPES)], ids=str)
def test_stored_dtypes_may_be_any_and_mixed(dtypes: Sequence[torch.dtype]) -> None:
    full = [{"rows": a, "points": a[0]} for a in randoms((12, 10), 3, scale=0.1)]
    stored = [{name: t.to(dtype) for name, t in model.items()} for model, dtype in zip(full, dtypes, strict=True)]
    merged = merge_state_dicts(stored, "neuro_merging", base=0, out_dtype=torch.float32, parameters={"density": 0.4})
    assert_agree(merged, oracle.merge_model(stored[0], stored[1:], density=0.4), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scratch", [1, 1 << 28])
def test_the_output_is_rounded_once(dtype: torch.dtype, scratch: int) -> None:
    base = make_model(3)
    others = make_experts(base, 2)
    models = [base, *others]
    full = merge_state_dicts(models, "neuro_merging", base=0)
    with merge_context(MergeContext(scratch_bytes=scratch)):
        rounded = merge_state_dicts(models, "neuro_merging", base=0, out_dtype=dtype)
    for name in base:
        assert rounded[name].dtype == dtype
        assert torch.equal(rounded[name], full[name].to(dtype)) or scratch == 1, name
        assert torch.allclose(rounded[name].float(), full[name], rtol=2**-8, atol=1e-6), name


def test_the_output_has_the_dtype_of_the_inputs() -> None:
    for dtype in DTYPES:
        base = make_model(4, dtype)
        merged = merge_models(base, make_experts(base, 2))
        assert {tensor.dtype for tensor in merged.values()} == {dtype}


def test_small_updates_of_bfloat16_models_are_not_rounded_away() -> None:
    """The task vector is the difference of what is stored, not of what is written."""
    base = torch.full((4, 8), 1.0)
    expert = base + 1e-4 * torch.arange(32.0).reshape(4, 8)
    merged = merge_tensors(
        [base, expert], "neuro_merging", base_index=0, dtype=torch.bfloat16, out_dtype=torch.float32, parameters=PLAIN
    )
    assert torch.allclose(merged, oracle.merge_model({"": base}, [{"": expert}], density=1.0)[""].float(), atol=1e-7)


# Shapes


@pytest.mark.parametrize(
    ("shape", "flattened", "name"),
    [
        ((6, 3, 2, 2), (6, 12), "conv"),
        ((6, 3, 4), (6, 12), "conv"),
        ((1, 3, 2, 2), (1, 12), "conv"),
        ((1, 6, 5), (6, 5), "position_embeddings"),
        ((1, 1, 5), (1, 5), "cls_token"),
        ((3, 4, 5), (12, 5), "model.layers.0.mlp.experts.gate_up_proj"),
        ((5, 1), (5, 1), "column"),
        ((1, 5), (1, 5), "row"),
    ],
)
@pytest.mark.parametrize("scratch", [1, 1 << 28])
def test_tensors_are_merged_by_their_neurons(
    shape: tuple[int, ...], flattened: tuple[int, int], name: str, scratch: int
) -> None:
    tensors = randoms(shape, 4)
    with merge_context(MergeContext(scratch_bytes=scratch)):
        merged = merge(*tensors, name=name, density=0.6, lambda_parallel=0.5)
    flat = [tensor.reshape(flattened) for tensor in tensors]
    expected = oracle.merge_model({"": flat[0]}, [{"": t} for t in flat[1:]], density=0.6, lambda_parallel=0.5)[""]
    assert torch.allclose(merged.double(), expected.reshape(shape), atol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (0, 3, 2), (1, 0, 3), (2, 0, 3, 3)])
@pytest.mark.parametrize("name", ["weight", "layer.experts.up"])
@pytest.mark.parametrize("parallel", [0.0, 1.0])
def test_tensors_without_entries(shape: tuple[int, ...], name: str, parallel: float) -> None:
    empty = torch.empty(shape)
    base = {name: empty, "points": torch.zeros(2)}
    expert = {name: empty.clone(), "points": torch.tensor([1.0, 2.0])}
    merged = merge_models(base, [expert, expert], density=1.0, lambda_parallel=parallel)
    assert merged[name].shape == shape
    assert merged["points"].tolist() == [1.0, 2.0]


def test_strided_tensors_are_merged_like_contiguous_ones() -> None:
    tensors = randoms((6, 4, 3, 3), 3)
    expected = merge(*tensors, density=0.5)
    assert torch.equal(merge(*(t.to(memory_format=torch.channels_last) for t in tensors), density=0.5), expected)
    mixed = [tensors[0].to(memory_format=torch.channels_last), *tensors[1:]]
    assert torch.equal(merge(*mixed, density=0.5), expected)
    matrices = [t.reshape(24, 9) for t in tensors]
    transposed = [t.T.contiguous().T for t in matrices]
    assert torch.equal(merge(*transposed, density=0.5), merge(*matrices, density=0.5))
    points = [t.flatten() for t in tensors]
    spaced = [torch.stack([t, t], dim=1)[:, 0] for t in points]
    assert torch.equal(merge(*spaced, density=0.5), merge(*points, density=0.5))


def test_inputs_are_left_as_they_were() -> None:
    base = make_model(5)
    others = make_experts(base, 2)
    before = [{name: tensor.clone() for name, tensor in model.items()} for model in (base, *others)]
    merge_models(base, others, lambda_parallel=1.0)
    for model, copy in zip((base, *others), before, strict=True):
        assert all(torch.equal(model[name], copy[name]) for name in model)


def test_task_vectors_stand_in_for_weights() -> None:
    base, first, second = randoms((8, 6), 3)
    base, first, second = 100 * base, 1e-5 * first, 1e-5 * second
    update = torch.zeros_like(base)
    energies = merge_neurons(
        base,
        [first.as_subclass(TaskVector), second.as_subclass(TaskVector)],
        update,
        thresholds=[0.0, 0.0],
        weights=[1.0, 1.0],
        lambda_orthogonal=1e5,
    )
    expected = oracle.merge_orthogonal(oracle.orthogonal_parts(torch.stack([first, second], 1).double(), base.double()))
    assert torch.allclose(update.double() - base.double(), 1e5 * expected, atol=1e-4)
    assert sum(energies) == pytest.approx(float(first.square().sum() + second.square().sum()))


# Scratch memory


class Allocations(TorchDispatchMode):
    """Follows the bytes that operations allocate beyond what exists when it starts."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        inputs = {t.untyped_storage()._cdata for t in self._tensors((arguments, keywords or {}))}
        result = function(*arguments, **(keywords or {}))
        for tensor in self._tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in inputs:
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: value for key, value in self._live.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result

    def _tensors(self, value: object) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from self._tensors(list(value.values()))
        elif isinstance(value, list | tuple):
            for item in value:
                yield from self._tensors(item)


def scratch_of(tensors: Sequence[Tensor], scratch_bytes: int, **options: float) -> tuple[int, Tensor]:
    base, *experts = tensors
    merged = torch.empty_like(base)
    with Allocations() as allocations:
        merge_neurons(
            base,
            experts,
            merged,
            thresholds=[0.5] * len(experts),
            weights=[1.0] * len(experts),
            lambda_orthogonal=1.0,
            scratch_bytes=scratch_bytes,
            **options,
        )
    return allocations.peak, merged


@pytest.mark.parametrize("parallel", [0.0, 0.7])
@pytest.mark.parametrize(("width", "experts"), [(200, 2), (200, 8), (3, 8), (1, 3), (2000, 3)])
def test_scratch_memory_is_bounded_whatever_the_tensor(width: int, experts: int, parallel: float) -> None:
    bound = 1 << 18
    peaks = []
    for blocks in (5, 20):
        neurons = blocks * bound // (4 * width * experts + 64 * experts**2)
        tensors = randoms((neurons, width), experts + 1, scale=0.5)
        peak, _ = scratch_of(tensors, bound, lambda_parallel=parallel)
        # All neurons' parallel coefficients are held at once, for their ties.
        coefficients = neurons * experts * 8 * 6 if parallel else 0
        assert peak <= bound + coefficients, (peak, neurons)
        peaks.append(peak)
    assert max(peaks) > bound // 8  # the measure does see what is allocated


@pytest.mark.parametrize("scratch", [1, 1000, 5000, 1 << 20])
def test_small_blocks_give_the_same_merge(scratch: int) -> None:
    tensors = randoms((50, 40), 4, scale=0.5)
    _, expected = scratch_of(tensors, 1 << 28, lambda_parallel=0.7)
    _, found = scratch_of(tensors, scratch, lambda_parallel=0.7)
    assert torch.allclose(found, expected, atol=1e-6)


# NaN and Inf


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (80, 70)])
@pytest.mark.parametrize("trim", ["model", "tensor"])
@pytest.mark.parametrize("density", [0.15, 1.0])
def test_nonfinite_inputs_are_refused_by_tensor_and_expert(
    value: float, shape: tuple[int, ...], trim: str, density: float
) -> None:
    base, first, second = (
        dict(zip(("sound", "broken.weight"), randoms(shape, 2, seed), strict=True)) for seed in range(3)
    )
    for culprit, message in ((second, "expert-1"), (base, "base")):
        healthy = culprit["broken.weight"]
        culprit["broken.weight"] = healthy.clone()
        culprit["broken.weight"].view(-1)[-1] = value
        with pytest.raises(UserError, match=rf"^broken\.weight: .*{message}.* holds NaN or Inf") as error:
            merge_models(base, [first, second], trim=trim, density=density)
        assert "\n" not in str(error.value)
        culprit["broken.weight"] = healthy


@pytest.mark.parametrize("experts", [1, 2, 4])
@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_nonfinite_inputs_can_be_allowed(experts: int, trim: str) -> None:
    base = make_model(6)
    others = make_experts(base, experts)
    broken = [{name: tensor.clone() for name, tensor in model.items()} for model in (base, *others)]
    for name, place in (("proj", 5), ("bias", 3)):
        broken[0][name].view(-1)[place] = math.nan
        others[-1][name].view(-1)[place + 1] = base[name].view(-1)[place + 1]
        broken[-1][name].view(-1)[place + 1] = math.inf
        for expert in others:
            expert[name].view(-1)[place] = base[name].view(-1)[place]
    with merge_context(MergeContext(allow_nonfinite=True)):
        merged = merge_models(broken[0], broken[1:], density=0.5, trim=trim, lambda_parallel=0.3)
    for name in ("embed", "norm", "scale", "bias"):
        expected = merge_models(base, others, density=0.5, trim=trim, lambda_parallel=0.3)[name]
        same = broken[0][name].isfinite()
        assert torch.allclose(merged[name][same], expected[same], atol=1e-5), name
        assert merged[name][~same].isnan().all()
    assert int((~merged["proj"].isfinite()).sum()) == 1


# mergekit's in-memory API


def test_parameters_come_as_scalars_sequences_and_mappings() -> None:
    base = make_model(7)
    others = make_experts(base, 2)
    models = {"base": base, "a": others[0], "b": others[1]}

    def run(**parameters: object) -> StateDict:
        return merge_state_dicts(models, "neuro_merging", base="base", parameters=parameters)

    expected = run(weight=[1.0, 0.5], density=[0.3, 0.3])
    assert_agree(run(weight={"b": 0.5, "a": 1.0}, density=0.3), expected, 1e-9)
    swapped = {"b": others[1], "base": base, "a": others[0]}
    again = merge_state_dicts(
        swapped, "neuro_merging", base="base", parameters={"weight": {"a": 1.0, "b": 0.5}, "density": 0.3}
    )
    assert_agree(again, expected)
    with pytest.raises(ValueError, match="weight"):
        run(weight=[1.0, 2.0, 3.0])
    with pytest.raises(TypeError, match="Unknown parameter"):
        run(densty=0.5)


def test_equal_integer_buffers_are_copied_and_different_ones_refused() -> None:
    base = {**make_model(8), "position_ids": torch.arange(5)}
    others = [{**expert, "position_ids": torch.arange(5)} for expert in make_experts(make_model(8), 2)]
    merged = merge_models(base, others)
    assert merged["position_ids"].dtype == torch.int64
    assert merged["position_ids"].tolist() == [0, 1, 2, 3, 4]
    assert list(merged) == list(base)
    others[1]["position_ids"] = torch.arange(1, 6)
    with pytest.raises(ValueError, match="position_ids"):
        merge_models(base, others)


def test_modules_can_be_merged() -> None:
    torch.manual_seed(0)
    modules = [torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)) for _ in range(3)]
    merged = merge_state_dicts(modules, "neuro_merging", base=0)
    plain = [{name: t.detach() for name, t in module.state_dict().items()} for module in modules]
    assert_agree(merged, merge_state_dicts(plain, "neuro_merging", base=0), 1e-12)
    assert not any(tensor.requires_grad for tensor in merged.values())


def test_tied_weights_count_once() -> None:
    base = make_model(9)
    others = make_experts(base, 2)
    tied = [{**model, "head": model["embed"]} for model in (base, *others)]
    merged = merge_models(tied[0], tied[1:])
    assert_agree({name: merged[name] for name in base}, merge_models(base, others), 1e-12)
    assert torch.equal(merged["head"], merged["embed"])
    copied = [{**model, "head": model["embed"].clone()} for model in (base, *others)]
    assert not torch.equal(merge_models(copied[0], copied[1:])["embed"], merged["embed"])


def test_the_base_need_not_come_first() -> None:
    base, first, second = randoms((6, 5), 3)
    expected = merge(base, first, second, density=0.5)
    found = merge_tensors([first, base, second], "neuro_merging", base_index=1, parameters={"density": 0.5})
    assert torch.equal(found, expected)


def test_a_base_is_required() -> None:
    with pytest.raises(ValueError, match="base"):
        merge_tensors(randoms((3, 3), 2), "neuro_merging")
    with pytest.raises(ValueError, match="non-base"):
        merge_tensors(randoms((3, 3), 1), "neuro_merging", base_index=0)


def test_thresholds_per_tensor_do_not_need_names() -> None:
    from mergekit.merge_methods import TensorGroup, get

    small, large = randoms((6, 5), 3), randoms((6, 5), 3, seed=1, scale=100.0)
    groups = [TensorGroup.from_tensors(tensors, base_index=0) for tensors in (small, large)]
    merged = get("neuro_merging")(groups, parameters={"trim": "tensor", "density": 0.5})
    alone = get("neuro_merging")(groups, parameters={"trim": "tensor", "density": 0.5, "lambda_orthogonal": 1.0})
    for tensors, found in ((small, alone[0]), (large, alone[1])):
        assert torch.allclose(found, merge(*tensors, density=0.5, lambda_orthogonal=1.0), atol=1e-4)
    assert not torch.equal(merged[0], alone[0])


# Parameters


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("density", 0.0, r"density must be a number in \(0, 1\]; got 0\.0"),
        ("density", -0.1, r"density must be a number in \(0, 1\]; got -0\.1"),
        ("density", 1.5, r"density must be a number in \(0, 1\]; got 1\.5"),
        ("density", math.nan, r"density must be a number in \(0, 1\]; got nan"),
        ("density", "most", r"density must be a number in \(0, 1\]; got 'most'"),
        ("density", True, r"density must be a number in \(0, 1\]; got True"),
        ("density", [0.5, 2.0], r"density must be a number in \(0, 1\]; got 2\.0"),
        ("weight", math.inf, r"weight must be a finite number; got inf"),
        ("weight", [1.0, math.nan], r"weight must be a finite number; got nan"),
        ("rank_energy", 0.0, r"rank_energy must be a number in \(0, 1\]; got 0\.0"),
        ("rank_energy", 1.01, r"rank_energy must be a number in \(0, 1\]; got 1\.01"),
        ("lambda_parallel", -math.inf, r"lambda_parallel must be a finite number; got -inf"),
        ("lambda_parallel", "auto", r"lambda_parallel must be a finite number; got 'auto'"),
        ("lambda_orthogonal", "automatic", r"lambda_orthogonal must be a finite number or 'auto'; got 'automatic'"),
        ("lambda_orthogonal", math.nan, r"lambda_orthogonal must be a finite number or 'auto'; got nan"),
        ("trim", "layer", r"trim must be one of model, tensor; got 'layer'"),
        ("consensus", "median", r"consensus must be one of mean, sum; got 'median'"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name_and_range(name: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        merge(*randoms((3, 3), 3), **{name: value})


def test_density_that_varies_over_tensors_needs_thresholds_per_tensor() -> None:
    from mergekit.merge_methods import PerGroupValues

    base = {"a": torch.zeros(1, 4), "b": torch.zeros(1, 4)}
    expert = {"a": rows([1.0, 2.0, 3.0, 4.0]), "b": rows([1.0, 2.0, 3.0, 4.0])}
    density = PerGroupValues([0.25, 0.75])
    with pytest.raises(UserError, match=r"density of expert-0 varies .*0\.25, 0\.75.* trim: tensor$"):
        merge_models(base, [expert], density=density)
    merged = merge_models(base, [expert], density=density, trim="tensor", lambda_orthogonal=1.0)
    assert merged["a"].tolist() == [[0.0, 0.0, 3.0, 4.0]]
    assert merged["b"].tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_trim_that_varies_over_tensors_is_refused() -> None:
    from mergekit.merge_methods import PerGroupValues

    base = make_model(10)
    with pytest.raises(UserError, match=r"trim varies over the tensors \(model, tensor\)"):
        merge_models(base, make_experts(base, 1), trim=PerGroupValues(["model"] * 4 + ["tensor"]))
