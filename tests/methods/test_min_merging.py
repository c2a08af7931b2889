"""min_merging against a reference that takes neurons one by one, its steps, properties and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_state_dicts
from torch import Tensor
from transformers import PretrainedConfig

import neuron_methods
from neuron_methods.methods.contract import MergeSettings
from neuron_methods.methods.min_merging import MinMerging, PreparedMinMerging
from neuron_methods.neurons import neuron_map
from neuron_methods.support.errors import UserError
from tests.support.checkpoints import FAMILIES, StateDict, build
from tests.support.plans import copied, merge, models, neuron, permuted, plan, write_profile

neuron_methods.register()

KINDS = ["llama-untied", "t5-gated", "t5-ungated", "vit"]
METHOD = MinMerging()


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest) -> tuple[PretrainedConfig, StateDict, dict[str, StateDict]]:
    return models(request.param)


@pytest.fixture(scope="module")
def llama() -> tuple[PretrainedConfig, StateDict, dict[str, StateDict]]:
    return models("llama-untied")


def selection(config: Any, base: Any, experts: Any, shared: Any = None, own: Any = None) -> PreparedMinMerging:
    method, tensors = plan(METHOD, config, base, experts, shared, own)
    prepared = method.prepare(tensors)
    prepared.measure(MergeSettings())
    return prepared


# -------------------------------------------------------------------------- a reference, one neuron at a time


def importance(layer: Any, i: int, base: StateDict, expert: StateDict) -> float:
    update, weights = neuron(expert, layer, i) - neuron(base, layer, i), neuron(base, layer, i)
    return float(update.norm() / weights.norm())


def top(values: dict[Any, float], density: float) -> set[Any]:
    ranked = sorted(values, key=values.get)
    rank = int(len(ranked) * (1 - density))
    return set(ranked[max(0, rank - 1) :])  # the rank-th smallest is the threshold, and is kept itself


def shares(claims: dict[str, float], weights: dict[str, float], conflict: str) -> dict[str, float]:
    if conflict == "sum":
        return {e: weights[e] for e in claims}
    votes = {e: weights[e] * claims[e] for e in claims}
    if conflict == "winner":
        return {e: 1.0 for e in [max(votes, key=votes.get)]} if votes else {}
    return {e: vote / sum(votes.values()) for e, vote in votes.items()}


def reference_mlp(
    config: PretrainedConfig,
    base: StateDict,
    experts: dict[str, StateDict],
    densities: dict[str, float],
    weights: dict[str, float],
    *,
    scope: str,
    conflict: str,
    scale: float,
    importances: dict[str, dict[tuple[str, int], float]] | None = None,
) -> StateDict:
    layers = neuron_map(config).layers
    kept: dict[str, set[tuple[str, int]]] = {}
    found = importances or {
        e: {(la.key, i): importance(la, i, base, t) for la in layers for i in range(la.neurons)}
        for e, t in experts.items()
    }
    for e in experts:
        if scope == "model":
            kept[e] = top(found[e], densities[e])
        else:
            by_layer = [{k: v for k, v in found[e].items() if k[0] == layer.key} for layer in layers]
            kept[e] = set().union(*(top(values, densities[e]) for values in by_layer))
    merged = copied(base)
    for layer in layers:
        for i in range(layer.neurons):
            claims = {e: found[e][layer.key, i] for e in experts if (layer.key, i) in kept[e]}
            for e, share in shares(claims, weights, conflict).items():
                for part in layer.parts:
                    at = [slice(None)] * base[part.tensor].ndim
                    at[part.axis] = part.offset + i
                    update = experts[e][part.tensor][tuple(at)] - base[part.tensor][tuple(at)]
                    merged[part.tensor][tuple(at)] += scale * share * update
    return {part.tensor: merged[part.tensor] for layer in layers for part in layer.parts}


@pytest.mark.parametrize("conflict", ["weighted", "winner", "sum"])
@pytest.mark.parametrize("scope", ["model", "layer"])
def test_mlp_neurons_come_out_as_the_reference_has_them(case: Any, scope: str, conflict: str) -> None:
    config, base, experts = case
    densities, weights = {"expert-a": 0.3, "expert-b": 0.6}, {"expert-a": 1.5, "expert-b": 0.7}
    own = {e: {"density": densities[e], "weight": weights[e]} for e in experts}
    merged = merge(METHOD, config, base, experts, {"scope": scope, "conflict": conflict, "lambda": 0.8}, own)
    expected = reference_mlp(config, base, experts, densities, weights, scope=scope, conflict=conflict, scale=0.8)
    for name, tensor in expected.items():
        assert torch.allclose(merged[name], tensor, atol=2e-6), name
        assert not torch.allclose(merged[name], base[name], atol=1e-4), name


# ------------------------------------------------------------------------------------------------------ steps


def test_step_1_importance_by_magnitude_is_relative_to_the_base(case: Any) -> None:
    config, base, experts = case
    found = selection(config, base, experts, {"density": 1.0})
    for layer in neuron_map(config).layers:
        for i in (0, 7, layer.neurons - 1):
            a, b = (importance(layer, i, base, experts[e]) for e in experts)
            assert found.coefficients[layer.key][0, i] == pytest.approx(a / (a + b), rel=1e-4)


@pytest.mark.parametrize("kind", ["activation", "taylor"])
def test_step_1_importance_from_a_profile(llama: Any, kind: str, tmp_path: Path) -> None:
    config, base, experts = llama
    tokens = {"easy": 30, "hard": 10}
    own, found = {}, {}
    for seed, e in enumerate(experts):
        profile = write_profile(tmp_path / f"{e}.safetensors", config, tokens, seed)
        own[e] = {"profile": str(profile.path), "importance": kind, "density": 0.4}
        found[e] = {}
        for layer in neuron_map(config).layers:
            name = "mean_abs" if kind == "activation" else "taylor"
            easy, hard = (profile.statistic(name, s, layer.key).double() for s in tokens)
            values = 0.75 * easy + 0.25 * hard
            if kind == "activation":
                values = values * experts[e][layer.parts[-1].tensor].double().norm(dim=0)
            found[e] |= {(layer.key, i): float(v) for i, v in enumerate(values)}
    merged = merge(METHOD, config, base, experts, {}, own)
    expected = reference_mlp(
        config,
        base,
        experts,
        dict.fromkeys(experts, 0.4),
        dict.fromkeys(experts, 1.0),
        scope="model",
        conflict="weighted",
        scale=1.0,
        importances=found,
    )
    for name, tensor in expected.items():
        assert torch.allclose(merged[name], tensor, atol=2e-6), name


def test_step_1_a_profile_of_several_sources_can_be_narrowed_to_one(llama: Any, tmp_path: Path) -> None:
    config, base, experts = llama
    profile = write_profile(tmp_path / "p.safetensors", config, {"easy": 30, "hard": 10})
    own = {"profile": str(profile.path), "importance": "taylor", "data": "hard", "density": 0.25}
    found = selection(config, base, experts, {"conflict": "sum", "scope": "layer"}, {"expert-a": own})
    for layer in neuron_map(config).layers:
        best = profile.statistic("taylor", "hard", layer.key).topk(7).indices
        assert set(found.coefficients[layer.key][0].nonzero().flatten().tolist()) == set(best.tolist())


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_step_2_keeps_the_top_share(llama: Any, scope: str) -> None:
    config, base, experts = llama
    found = selection(config, base, experts, {"density": 0.25, "scope": scope, "conflict": "sum"})
    assert found.kept == dict.fromkeys(experts, (13, 48) if scope == "model" else (14, 48))
    both = sum(int((found.coefficients[layer.key] > 0).all(dim=0).sum()) for layer in neuron_map(config).layers)
    lines = [f"{e}: keeps {found.kept[e][0]} of 48 MLP neurons ({found.kept[e][0] / 48:.1%})" for e in experts]
    assert found.findings() == [*lines, f"MLP neurons that several experts keep: {both}"]
    per_layer = [int(found.coefficients[layer.key][0].sum()) for layer in neuron_map(config).layers]
    assert per_layer == [7, 7] if scope == "layer" else sum(per_layer) == 13


def test_step_2_density_may_vary_by_layer_under_scope_layer(llama: Any) -> None:
    config, base, experts = llama
    method, tensors = plan(METHOD, config, base, experts, {"scope": "layer", "conflict": "sum"})
    for tensor in tensors:
        if ".layers.0." in tensor.name:
            tensor.expert_parameters["density"].update(dict.fromkeys(experts, 1.0))
    # Parameters of a plan are shared between its tensors in this test; give layer 0 its own.
    layered = []
    for tensor in tensors:
        density = 1.0 if ".layers.0." in tensor.name else 0.5
        own = {**tensor.expert_parameters, "density": dict.fromkeys(experts, density)}
        layered.append(type(tensor)(**{**vars(tensor), "expert_parameters": own}))
    found = method.prepare(layered)
    found.measure(MergeSettings())
    assert [int(found.coefficients[f"layers.{i}"][0].sum()) for i in range(2)] == [24, 13]


def test_step_2_attention_rows_are_ranked_apart_by_magnitude(llama: Any) -> None:
    config, base, experts = llama
    one = {"expert-a": experts["expert-a"]}
    merged = merge(METHOD, config, base, one, {"density": 0.25})
    rows = {}
    for name in base:
        if "self_attn" in name:
            update = (one["expert-a"][name] - base[name]).double()
            for i, row in enumerate(update):
                rows[name, i] = float(row.norm() / base[name][i].double().norm())
    kept = top(rows, 0.25)
    assert 0 < len(kept) < len(rows)
    for name, i in rows:
        source = one["expert-a"] if (name, i) in kept else base
        assert torch.equal(merged[name][i], source[name][i]), (name, i)


def test_step_2_attention_biases_go_with_their_rows() -> None:
    config, base, experts = models("vit", 1)
    merged = merge(METHOD, config, base, experts, {"density": 0.5})
    (expert,) = experts.values()
    for name in base:
        if "attention" in name and name.endswith("weight"):
            bias = name.removesuffix("weight") + "bias"
            row_kept = (merged[name] == expert[name]).all(dim=1)
            assert torch.equal(merged[bias] == expert[bias], row_kept), name
            assert torch.equal(merged[bias] == base[bias], ~row_kept), name


@pytest.mark.parametrize("attention", ["keep", "drop"])
def test_step_2_attention_kept_or_dropped_whole(llama: Any, attention: str) -> None:
    config, base, experts = llama
    one = {"expert-a": experts["expert-a"]}
    merged = merge(METHOD, config, base, one, {"density": 0.1, "attention": attention})
    source = one["expert-a"] if attention == "keep" else base
    for name in base:
        if "self_attn" in name:
            assert torch.equal(merged[name], source[name]), name


def test_step_4_lambda_scales_the_update(llama: Any) -> None:
    config, base, experts = llama
    whole = merge(METHOD, config, base, experts)
    half = merge(METHOD, config, base, experts, {"lambda": 0.5})
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.allclose(half[name] - base[name], (whole[name] - base[name]) / 2, atol=1e-6)


# ------------------------------------------------------------------------------------------------- properties


def test_one_expert_with_density_1_is_given_back(case: Any) -> None:
    config, base, experts = case
    one = {"expert-b": experts["expert-b"]}
    merged = merge(METHOD, config, base, one, {"density": 1.0})
    for name, tensor in one["expert-b"].items():
        assert torch.equal(merged[name], tensor), name


@pytest.mark.parametrize("conflict", ["weighted", "winner", "sum"])
def test_disjoint_neurons_are_given_back_exactly(case: Any, conflict: str) -> None:
    config, base, experts = case
    half = {e: copied(base) for e in experts}
    for layer in neuron_map(config).layers:
        for part in layer.parts:
            at = torch.arange(part.offset, part.offset + layer.neurons)
            for chosen, e in ((at[: layer.neurons // 2], "expert-a"), (at[layer.neurons // 2 :], "expert-b")):
                half[e][part.tensor].index_copy_(
                    part.axis, chosen, experts[e][part.tensor].index_select(part.axis, chosen)
                )
    merged = merge(METHOD, config, base, half, {"density": 0.5, "scope": "layer", "conflict": conflict})
    for layer in neuron_map(config).layers:
        for i in range(layer.neurons):
            source = half["expert-a"] if i < layer.neurons // 2 else half["expert-b"]
            assert torch.equal(neuron(merged, layer, i), neuron(source, layer, i)), (layer.key, i)


@given(seed=st.integers(0, 1000), density=st.floats(0.1, 1.0))
@settings(max_examples=10, deadline=None)
def test_permuting_neurons_permutes_the_result(llama: Any, seed: int, density: float) -> None:
    config, base, experts = llama
    merged = merge(METHOD, config, base, experts, {"density": density})
    shuffled = {e: permuted(t, config, seed) for e, t in experts.items()}
    again = merge(METHOD, config, permuted(base, config, seed), shuffled, {"density": density})
    for name, tensor in permuted(merged, config, seed).items():
        assert torch.allclose(again[name], tensor, atol=1e-6), name


def test_the_order_of_the_experts_does_not_matter(llama: Any) -> None:
    config, base, experts = llama
    own = {"expert-a": {"density": 0.3}, "expert-b": {"density": 0.5}}
    merged = merge(METHOD, config, base, experts, {}, own)
    again = merge(METHOD, config, base, dict(reversed(experts.items())), {}, own)
    for name, tensor in merged.items():
        assert torch.allclose(again[name], tensor, atol=1e-6), name


def test_density_1_and_equal_weights_sum_up_to_task_arithmetic(llama: Any) -> None:
    config, base, experts = llama
    merged = merge(METHOD, config, base, experts, {"density": 1.0, "conflict": "sum", "rest": "task_arithmetic"})
    for name in base:
        expected = base[name] + sum(t[name] - base[name] for t in experts.values())
        assert torch.allclose(merged[name], expected, atol=1e-6), name


def test_rest_base_leaves_everything_else(llama: Any) -> None:
    config, base, experts = llama
    merged = merge(METHOD, config, base, experts, {"rest": "base"})
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(merged[name], base[name])


def test_half_precision_inputs_are_merged_from_float32_task_vectors() -> None:
    config, base, experts = models("llama-untied", 1)
    low = {n: t.bfloat16() for n, t in base.items()}
    expert = {n: t.bfloat16() for n, t in experts["expert-a"].items()}
    merged = merge(METHOD, config, low, {"e": expert}, {"density": 1.0})
    assert all(torch.equal(merged[name], expert[name]) for name in low)


# --------------------------------------------------------------------------------------------------- refusals


def refusal(case: Any, shared: Any = None, own: Any = None) -> str:
    with pytest.raises(UserError) as caught:
        merge(METHOD, *case, shared, own)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_importance_without_a_profile_is_refused(llama: Any) -> None:
    message = refusal(llama, own={"expert-b": {"importance": "taylor"}, "expert-a": {"importance": "taylor"}})
    assert "expert-a needs profile: FILE" in message


def test_a_profile_that_nothing_reads_is_refused(llama: Any, tmp_path: Path) -> None:
    profile = write_profile(tmp_path / "p.safetensors", llama[0], {"x": 3})
    assert "magnitude does not read" in refusal(llama, own={"expert-a": {"profile": str(profile.path)}})


def test_importances_that_cannot_be_compared_are_refused(llama: Any, tmp_path: Path) -> None:
    profile = write_profile(tmp_path / "p.safetensors", llama[0], {"x": 3})
    own = {"expert-a": {"profile": str(profile.path), "importance": "taylor"}}
    assert "importance differs" in refusal(llama, own=own)
    merge(METHOD, *llama, {"conflict": "sum"}, own)


def test_profiles_that_do_not_fit_are_refused(llama: Any, tmp_path: Path) -> None:
    def own(path: Path | str, **more: str) -> dict[str, Any]:
        return {e: {"profile": str(path), "importance": "taylor", **more} for e in llama[2]}

    assert "no such profile" in refusal(llama, own=own(tmp_path / "absent"))
    path = tmp_path / "vit.safetensors"
    write_profile(path, FAMILIES["vit"].config(), {"x": 3})
    assert "model_type 'vit'" in refusal(llama, own=own(path))
    larger = build("llama-untied", num_hidden_layers=3).config
    write_profile(path, larger, {"x": 3})
    assert "layers.2" in refusal(llama, own=own(path))
    write_profile(path, llama[0], {"x": 3}, taylor=False)
    assert "--gradients" in refusal(llama, own=own(path))
    write_profile(path, llama[0], {"x": 3})
    assert "no data source 'y'" in refusal(llama, own=own(path, data="y"))
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in refusal(llama, own=own(path))


@pytest.mark.parametrize("name", ["density", "weight"])
def test_a_parameter_that_splits_a_neuron_is_refused(llama: Any, name: str) -> None:
    method, tensors = plan(METHOD, *llama, {"scope": "layer"})
    split = []
    for tensor in tensors:
        value = 0.9 if "down_proj" in tensor.name else 0.4
        own = {**tensor.expert_parameters, name: dict.fromkeys(llama[2], value)}
        split.append(type(tensor)(**{**vars(tensor), "expert_parameters": own}))
    with pytest.raises(UserError, match=f"{name} of expert-a varies .* merged whole"):
        method.prepare(split)


def test_nonfinite_weights_are_refused(llama: Any) -> None:
    config, base, experts = llama
    broken = copied(experts)
    broken["expert-b"]["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    assert "layers.1.mlp.up_proj.weight: expert-b holds NaN or Inf" in refusal((config, base, broken))


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"density": 0.0}, "density must be a number in"),
        ({"weight": -1}, "weight must be a number in"),
        ({"conflict": "loser"}, "conflict must be one of weighted, winner, sum"),
        ({"scope": "tensor"}, "scope must be one of"),
        ({"attention": "cols"}, "attention must be one of rows, keep, drop"),
        ({"importance": "size"}, "importance must be one of"),
        ({"rest": "tie"}, "unknown merge method 'tie'; did you mean 'ties'"),
        ({"rest": "min_merging"}, "cannot itself be one"),
    ],
)
def test_values_out_of_range_are_refused(llama: Any, parameters: dict[str, Any], problem: str) -> None:
    assert problem in refusal(llama, parameters)


def test_tensors_of_no_family_are_refused() -> None:
    tensors: dict[str, Tensor] = {"w": torch.ones(2, 2)}
    with pytest.raises(UserError, match="fit no family"):
        merge_state_dicts({"a": tensors, "b": tensors}, "min_merging", base="a")


def test_state_dicts_without_a_config_are_merged_alike(case: Any) -> None:
    config, base, experts = case
    merged = merge_state_dicts({"base": base, **experts}, "min_merging", base="base", parameters={"density": 0.3})
    expected = merge(METHOD, config, base, experts, {"density": 0.3})
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name


def test_a_profile_without_a_config_is_refused(llama: Any) -> None:
    _, base, experts = llama
    with pytest.raises(UserError, match="merge is of tensors alone"):
        merge_state_dicts(
            {"base": base, **experts},
            "min_merging",
            base="base",
            parameters={"importance": "taylor", "profile": "p.safetensors"},
        )
