"""neuro_merging through mergekit's in-memory API: parameters, buffers, modules, tied weights."""

from __future__ import annotations

import math

import pytest
import torch
from mergekit.merge_methods import PerGroupValues, TensorGroup, get, merge_state_dicts, merge_tensors

from neuron_methods.support.errors import UserError
from tests.support.tensors import StateDict, assert_agree, make_experts, make_model, merge, merge_models, randoms, rows


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
        (
            "lambda_orthogonal",
            "automatic",
            r"lambda_orthogonal must be a finite number or 'auto' or 'norm'; got 'automatic'",
        ),
        ("lambda_orthogonal", math.nan, r"lambda_orthogonal must be a finite number or 'auto' or 'norm'; got nan"),
        ("trim", "layer", r"trim must be one of model, tensor, differing; got 'layer'"),
        ("consensus", "median", r"consensus must be one of mean, sum; got 'median'"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name_and_range(name: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        merge(*randoms((3, 3), 3), **{name: value})


def test_density_that_varies_over_tensors_needs_thresholds_per_tensor() -> None:
    base = {"a": torch.zeros(1, 4), "b": torch.zeros(1, 4)}
    expert = {"a": rows([1.0, 2.0, 3.0, 4.0]), "b": rows([1.0, 2.0, 3.0, 4.0])}
    density = PerGroupValues([0.25, 0.75])
    with pytest.raises(UserError, match=r"density of expert-0 varies .*0\.25, 0\.75.* trim: tensor$"):
        merge_models(base, [expert], density=density)
    merged = merge_models(base, [expert], density=density, trim="tensor", lambda_orthogonal=1.0)
    assert merged["a"].tolist() == [[0.0, 0.0, 3.0, 4.0]]
    assert merged["b"].tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_trim_that_varies_over_tensors_is_refused() -> None:
    base = make_model(10)
    with pytest.raises(UserError, match=r"trim varies over the tensors \(model, tensor\)"):
        merge_models(base, make_experts(base, 1), trim=PerGroupValues(["model"] * 4 + ["tensor"]))
