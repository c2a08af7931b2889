"""What tensors neuro_merging takes: dtypes, shapes, strides; NaN and Inf."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts, merge_tensors

from neuron_methods.kernels.neuro import NeuroOptions, merge_neurons
from neuron_methods.kernels.task_vectors import TaskVector
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
    merge_models_with,
    merge_with,
    randoms,
)

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
    full = merge_models(base, others)
    rounded = merge_models_with(MergeSettings(scratch_bytes=scratch), base, others, out_dtype=dtype)
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
    settings = MergeSettings(scratch_bytes=scratch)
    merged = merge_with(settings, *tensors, name=name, density=0.6, lambda_parallel=0.5)
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
        NeuroOptions(thresholds=[0.0, 0.0], weights=[1.0, 1.0], lambda_orthogonal=1e5),
    )
    expected = oracle.merge_orthogonal(oracle.orthogonal_parts(torch.stack([first, second], 1).double(), base.double()))
    assert torch.allclose(update.double() - base.double(), 1e5 * expected, atol=1e-4)
    assert sum(energies) == pytest.approx(float(first.square().sum() + second.square().sum()))


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
    settings = MergeSettings(allow_nonfinite=True)
    merged = merge_models_with(settings, broken[0], broken[1:], density=0.5, trim=trim, lambda_parallel=0.3)
    for name in ("embed", "norm", "scale", "bias"):
        expected = merge_models(base, others, density=0.5, trim=trim, lambda_parallel=0.3)[name]
        same = broken[0][name].isfinite()
        assert torch.allclose(merged[name][same], expected[same], atol=1e-5), name
        assert merged[name][~same].isnan().all()
    assert int((~merged["proj"].isfinite()).sum()) == 1
