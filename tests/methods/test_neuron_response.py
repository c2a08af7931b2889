"""neuron_response step by step against closed forms in float64, on tensors of every role, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import PerGroupValues, TensorGroup, get, merge_state_dicts
from torch import Tensor

import neuron_methods
from neuron_methods.kernels.task_vectors import LowRankTaskVector, TaskVector
from neuron_methods.methods.contract import MergeSettings, planned_in_memory
from neuron_methods.methods.inputs_file import InputsFile
from neuron_methods.methods.min_merging import MinMerging
from neuron_methods.methods.neuron_merge import NeuronMerge
from neuron_methods.methods.neuron_response import NeuronResponse
from neuron_methods.neurons import neuron_map
from neuron_methods.plugin.tensor_places import TensorPlaces
from neuron_methods.support.errors import UserError
from tests.support.checkpoints import StateDict
from tests.support.kinds import build_kind
from tests.support.plans import copied, merge, merge_and_tell, models, plan, write_groups
from tests.support.responses import PLAIN, near, profiles, response
from tests.support.tensors import named, randoms

neuron_methods.register()

METHOD = NeuronResponse()


def merge_plain(base: StateDict, experts: Sequence[StateDict], out_dtype: Any = None, **parameters: Any) -> StateDict:
    """Merge in memory by mergekit's own interface; what no parameter names is as in PLAIN."""
    return merge_state_dicts(
        named(base, experts),
        "neuron_response",
        base="base",
        parameters={**PLAIN, **parameters},
        out_dtype=out_dtype,
    )


def one(base: Tensor, *experts: Tensor, name: str = "proj.weight", **parameters: Any) -> Tensor:
    return merge_plain({name: base}, [{name: expert} for expert in experts], **parameters)[name]


def update_of(base: Tensor, *updates: Tensor, **parameters: Any) -> Tensor:
    return (one(base, *(base + u for u in updates), **parameters) - base).double()


W, A, B = (t for t in randoms((9, 7), 3, seed=3))


# ------------------------------------------------------------------------------------------------------ steps


def test_step_1_split_drops_what_is_parallel_to_each_neuron() -> None:
    w = W.double()
    orthogonal = [u.double() - (u.double() * w).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True) * w for u in (A, B)]
    near(update_of(W, A, B, subspace="orthogonal"), response(orthogonal))
    near(update_of(W, A, B, subspace="all"), response([A, B]))
    assert not torch.allclose(response(orthogonal), response([A, B]), atol=1e-2)


def test_step_2_inputs_are_the_rows_of_the_update_measured_ones_or_both(tmp_path: Path) -> None:
    config, base, experts = models("llama-untied")
    files = profiles(tmp_path, config, base, experts)
    name, module = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj"
    updates = [experts[e][name] - base[name] for e in experts]
    measured = [InputsFile.open(path).read(InputsFile.open(path).factor_of(module)) for path in files.values()]
    for inputs, factors in (
        ("update", [[u] for u in updates]),
        ("profile", [[f] for f in measured]),
        ("both", [[f, u] for f, u in zip(measured, updates, strict=True)]),
    ):
        own = {e: {"inputs": inputs, "profile": files[e] if inputs != "update" else ""} for e in experts}
        merged = merge(METHOD, config, base, experts, PLAIN, own)
        near(merged[name] - base[name], response(updates, factors=factors), 5e-5)


@pytest.mark.parametrize("toward", ["zero", "mean", "sum"])
def test_step_3_merge_is_the_least_squares_answer(toward: str) -> None:
    for ridge in (0.01, 0.3):
        near(update_of(W, A, 3 * B, ridge=ridge, toward=toward), response([A, 3 * B], ridge, toward=toward))
    weights = [0.5, 2.0]
    near(update_of(W, A, B, weight=weights, toward=toward), response([A, B], weights=weights, toward=toward))


def test_step_4_scale_undoes_what_the_ridge_shrinks_and_lambda_multiplies() -> None:
    found, unscaled = update_of(W, A, B, ridge=0.5), response([A, B], 0.5, scaled=False)
    scale = float((found * unscaled).sum() / unscaled.square().sum())
    assert scale > 1.1
    near(found, scale * unscaled)
    near(update_of(W, A, B, **{"lambda": 1.7}), 1.7 * response([A, B]))
    assert torch.equal(one(W, W + A, **{"lambda": 0.0}), W)


@pytest.mark.parametrize("shape", [(), (6,)])
def test_step_5_points_take_the_mean_or_the_sum(shape: tuple[int, ...]) -> None:
    base, a, b = randoms(shape, 3)
    for weights, mean in (((1.0, 1.0), (a + b) / 2), ((1.0, 3.0), (a + 3 * b) / 4)):
        for points, expected in (("mean", mean), ("sum", 2 * mean)):
            found = one(base, base + a, base + b, weight=list(weights), points=points, **{"lambda": 0.5})
            assert torch.allclose(found, base + 0.5 * expected, atol=1e-6)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "shared.weight", "transformer.wte.weight"])
def test_step_6_tokens_take_the_mean_or_are_merged_as_rows(name: str) -> None:
    near(update_of(W, A, B, name=name, weight=[1.0, 3.0]), (A + 3 * B) / 4)
    near(update_of(W, A, B, name=name, embeddings="rows"), response([A, B]))


# ------------------------------------------------------------------------------------------------------ roles


def expected_model(config: Any, base: StateDict, experts: Sequence[StateDict]) -> StateDict:
    """Every tensor by the part it plays, told apart by name here."""
    found = {}
    for name, w in base.items():
        updates = [(e[name].double() - w.double()) for e in experts]
        mean = sum(updates) / len(updates)
        if w.ndim < 2 or any(part in name for part in ("embed_tokens", "wte.", "shared.", "token_embedding.")):
            found[name] = mean
        elif w.ndim == 3 and "experts" in name:
            transposed = config.model_type == "gpt_oss"
            found[name] = torch.stack(
                [
                    response([u[i].T for u in updates]).T if transposed else response([u[i] for u in updates])
                    for i in range(len(w))
                ]
            )
        elif config.model_type == "gpt2" and "wpe" not in name:  # Conv1D: neurons are columns
            found[name] = response([u.T for u in updates]).T
        elif w.ndim == 3 and len(w) == 1:  # positions, class tokens
            found[name] = response([u[0] for u in updates]).reshape(w.shape)
        else:  # of a convolution the patches are inputs
            found[name] = response([u.flatten(1) for u in updates]).reshape(w.shape)
    return {name: base[name].double() + update for name, update in found.items()}


def kind_of(name: str, tmp_path: Path) -> tuple[Any, StateDict, dict[str, StateDict]]:
    from tests.support.checkpoints import read

    made = []
    for seed in range(3):
        build_kind(name, seed).save_pretrained(tmp_path / str(seed))
        made.append(read(tmp_path / str(seed)))
    return config_of(name), made[0], {"a": made[1], "b": made[2]}


def config_of(kind: str) -> Any:
    """As it is saved, with the class's name."""
    model = build_kind(kind, 0)
    model.config.architectures = [type(model).__name__]
    return model.config


FAMILY = ["llama-tied", "llama-untied", "t5-gated", "t5-ungated", "vit", "clip", "clip-vision"]


@pytest.mark.parametrize("family", FAMILY)
def test_every_tensor_of_a_family_is_merged_by_its_role(family: str) -> None:
    config, base, experts = models(family)
    merged = merge(METHOD, config, base, experts, PLAIN)
    for name, tensor in expected_model(config, base, list(experts.values())).items():
        near(merged[name] - base[name], tensor - base[name], 2e-4)
        assert not torch.equal(merged[name], base[name])


@pytest.mark.parametrize("kind", ["gpt2", "whisper", "mixtral", "deberta"])
def test_every_tensor_of_other_kinds_is_merged_by_its_role(kind: str, tmp_path: Path) -> None:
    config, base, experts = kind_of(kind, tmp_path)
    merged = merge(METHOD, config, base, experts, PLAIN)
    for name, tensor in expected_model(config, base, list(experts.values())).items():
        if "word_embeddings" not in name:
            near(merged[name] - base[name], tensor - base[name], 2e-4)


def test_packed_experts_are_merged_one_by_one(tmp_path: Path) -> None:
    """GPT-OSS stacks matrices whose columns are neurons; without a class the name says that they are stacked."""
    from tests.adapters.cases import gpt_oss

    model = gpt_oss()
    model.config.architectures = [type(model).__name__]
    base = {name: t.detach().clone() for name, t in model.state_dict().items() if "experts" in name and t.ndim == 3}
    experts = {
        e: {name: t + u for (name, t), u in zip(base.items(), spread(base, s), strict=True)} for s, e in enumerate("ab")
    }
    merged = merge(METHOD, model.config, base, experts, PLAIN)
    for name, tensor in expected_model(model.config, base, list(experts.values())).items():
        near(merged[name] - base[name], tensor - base[name], 2e-4)
    stack, a, b = randoms((3, 5, 4), 3)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    found = one(stack, stack + a, stack + b, name=name)
    for i in range(3):
        near(found[i] - stack[i], response([a[i], b[i]]))


def test_biases_of_packed_experts_are_points(tmp_path: Path) -> None:
    """Stacked, a bias for each expert of a mixture, they look like a matrix."""
    from neuron_methods.methods.neuro_merging import NeuroMerging
    from tests.adapters.cases import gpt_oss

    model = gpt_oss()
    model.config.architectures = [type(model).__name__]
    base = {name: t.detach().clone() for name, t in model.state_dict().items() if "experts" in name and t.ndim == 2}
    assert any(name.endswith("gate_up_proj_bias") for name in base)
    a, b = ({name: t + u for (name, t), u in zip(base.items(), spread(base, s), strict=True)} for s in range(2))
    merged = merge(METHOD, model.config, base, {"a": a, "b": b}, PLAIN)
    every = {"density": 1.0, "trim": "tensor", "lambda_orthogonal": 1.0, "consensus": "sum"}
    one_expert = merge(NeuroMerging(), model.config, base, {"a": a}, every)
    for name in base:
        near(merged[name], (a[name] + b[name]) / 2, 1e-6)
        near(one_expert[name], a[name], 1e-6)


def spread(base: StateDict, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator) * 0.1 for t in base.values()]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama-tied", {"model.embed_tokens.weight": ("tokens", None)}),
        ("llama-untied", {"lm_head.weight": ("matrix", 16), "model.embed_tokens.weight": ("tokens", None)}),
        ("t5-gated", {"shared.weight": ("tokens", None), "lm_head.weight": ("matrix", 16)}),
        ("clip", {"text_model.embeddings.token_embedding.weight": ("tokens", None)}),
        ("clip", {"vision_model.embeddings.patch_embedding.weight": ("matrix", 48)}),
        ("clip", {"text_model.embeddings.position_embedding.weight": ("matrix", None)}),
        ("vit", {"vit.embeddings.patch_embeddings.projection.weight": ("matrix", 48)}),
        ("vit", {"vit.embeddings.position_embeddings": ("matrix", None)}),
        ("vit", {"vit.encoder.layer.0.output.dense.weight": ("matrix", 24)}),
    ],
)
def test_the_models_class_tells_what_a_tensor_is(family: str, expected: dict[str, tuple[str, Any]]) -> None:
    config, base, _ = models(family, 0)
    places = TensorPlaces(config, list(base))
    for name, told in expected.items():
        if name in base:
            place = places.of(name)
            assert place is not None and (place.role, place.width) == told


def test_tied_heads_that_are_stored_are_tokens_too() -> None:
    config, base, experts = models("llama-tied")
    doubled = [{**m, "lm_head.weight": m["model.embed_tokens.weight"].clone()} for m in (base, *experts.values())]
    merged = merge(METHOD, config, doubled[0], dict(zip(experts, doubled[1:], strict=True)), PLAIN)
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


# ------------------------------------------------------------------------------------------------- task vectors


def low(base: Tensor, b: Tensor, a: Tensor, transposed: bool = False) -> tuple[LowRankTaskVector, TaskVector]:
    direct = LowRankTaskVector.of(b, a, tuple(base.shape), transposed)
    return direct, direct.dense().contiguous().as_subclass(TaskVector)


@pytest.mark.parametrize("subspace", ["all", "orthogonal"])
@pytest.mark.parametrize("layout", ["linear", "transposed", "convolution", "table", "stack"])
@pytest.mark.parametrize("others", ["low rank", "dense", "left alone"])
def test_factors_give_what_the_formed_update_gives(layout: str, subspace: str, others: str) -> None:
    shape = {
        "linear": (9, 8),
        "transposed": (8, 9),
        "convolution": (9, 2, 2, 2),
        "table": (1, 9, 8),
        "stack": (2, 9, 8),
    }
    (base,) = randoms(shape[layout], 1, seed=1)
    name = {"stack": "m.experts.up", "transposed": "transformer.h.0.mlp.c_fc.weight"}.get(layout, "m.weight")
    config = config_of("gpt2")
    if layout in ("table", "stack"):  # no adapter has factors for them, but one may leave them alone
        first = second = (
            LowRankTaskVector.of(torch.zeros(base.shape[0], 0), torch.zeros(0, base[0].numel()), base.shape),
        )
        first, second = first * 2, second * 2
        others = "dense"
    else:
        (b, c), (a, d) = randoms((9, 2), 2, seed=2), randoms((2, 8), 2, seed=4)
        first, second = low(base, b, a, layout == "transposed"), low(base, c, d, layout == "transposed")
    if others == "dense":
        update = randoms(shape[layout], 1, seed=9)[0].as_subclass(TaskVector)
        second = (update, update)
    if others == "left alone":
        none = LowRankTaskVector.of(torch.zeros(base.shape[0], 0), torch.zeros(0, base[0].numel()), base.shape)
        second = (none, torch.zeros(base.shape).as_subclass(TaskVector))
    if layout == "transposed":
        found, expected = (
            merge(METHOD, config, {name: base}, {"a": {name: x}, "b": {name: y}}, {**PLAIN, "subspace": subspace})[name]
            for x, y in zip(first, second, strict=True)
        )
    else:
        found, expected = (
            prepared_merge({name: base}, {"a": {name: x}, "b": {name: y}}, subspace=subspace)[name]
            for x, y in zip(first, second, strict=True)
        )
    near(found - base, expected - base, 1e-5)
    assert not torch.equal(found, base)


def prepared_merge(
    base: StateDict,
    experts: dict[str, StateDict],
    settings: MergeSettings | None = None,
    out_dtype: torch.dtype = torch.float32,
    **parameters: Any,
) -> StateDict:
    """Merge with settings that mergekit's interface has no words for."""
    every = {"base": base, **experts}
    groups = [
        TensorGroup.from_tensors([m[name] for m in every.values()], ids=list(every), base_index=0, name=name)
        for name in base
    ]
    bound = get("neuron_response")._bind_parameters(groups, {**PLAIN, **parameters})
    prepared = METHOD.prepare(planned_in_memory(groups, bound))
    prepared.measure(settings or MergeSettings())
    pairs = zip(groups, bound, strict=True)
    return {str(g.metadata.name): prepared.merge(g, b, out_dtype) for g, b in pairs}


# ---------------------------------------------------------------------------------------------- tensors, dtypes

MODEL = {
    "m.embed_tokens.weight": (11, 6),
    "m.proj.weight": (8, 6),
    "m.conv.weight": (4, 3, 2, 2),
    "m.norm.weight": (6,),
}


def small(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> StateDict:
    return {
        name: (randoms(shape, 1, seed=seed + i, scale=scale)[0]).to(dtype)
        for i, (name, shape) in enumerate(MODEL.items())
    }


def tuned(base: StateDict, seed: int) -> StateDict:
    return {name: (t.float() + small(seed, 0.05)[name]).to(t.dtype) for name, t in base.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_merged_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    base = small(0, dtype=dtype)
    experts = [tuned(base, s) for s in (10, 20)]
    full = merge_plain(
        {name: t.float() for name, t in base.items()}, [{name: t.float() for name, t in e.items()} for e in experts]
    )
    found = merge_plain(base, experts)
    for name, tensor in full.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype)), name
    assert {t.dtype for t in merge_plain(base, experts, out_dtype=torch.float32).values()} == {torch.float32}


@pytest.mark.parametrize("scratch", [1, 500])
def test_scratch_memory_has_no_say_in_the_result(scratch: int) -> None:
    base = small(0)
    experts = {"a": tuned(base, 10), "b": tuned(base, 20)}
    for subspace in ("all", "orthogonal"):
        expected = prepared_merge(base, experts, subspace=subspace)
        found = prepared_merge(base, experts, MergeSettings(scratch_bytes=scratch), subspace=subspace)
        for name in base:
            assert torch.allclose(found[name], expected[name], atol=1e-6), name


def test_inputs_are_left_as_they_are_and_the_result_is_repeatable() -> None:
    base = small(0)
    experts = [tuned(base, 10), tuned(base, 20)]
    before = copied([base, *experts])
    first = merge_plain(base, experts, subspace="orthogonal", toward="sum")
    again = merge_plain(base, experts, subspace="orthogonal", toward="sum")
    for held, model in zip(before, [base, *experts], strict=True):
        assert all(torch.equal(held[name], model[name]) for name in held)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, tensor in first.items():
        assert all(tensor.data_ptr() != model[name].data_ptr() for model in (base, *experts))


def test_strides_do_not_matter() -> None:
    turned = [t.T.contiguous().T for t in (W, W + A, W + B)]
    assert torch.allclose(one(*turned), one(W, W + A, W + B), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.integers(0, 5), st.integers(1, 3), st.integers(0, 99))
def test_any_shape_of_matrix(n: int, d: int, count: int, seed: int) -> None:
    base, *updates = randoms((n, d), count + 1, seed=seed)
    merged = one(base, *(base + u for u in updates))
    assert merged.shape == (n, d)
    assert bool(torch.isfinite(merged).all())


def test_an_expert_of_weight_0_takes_no_part() -> None:
    base = small(0)
    a, b = tuned(base, 10), tuned(base, 20)
    b["m.norm.weight"][0] = b["m.proj.weight"][0, 0] = float("nan")
    expected = merge_plain(base, [a], toward="sum", points="sum")
    found = merge_plain(base, [a, b], weight=[1.0, 0.0], toward="sum", points="sum")
    assert all(torch.equal(found[name], expected[name]) for name in base)


def test_a_tensor_that_nobody_has_a_weight_for_stays_the_bases() -> None:
    base = small(0)
    weights = PerGroupValues([1.0, 0.0, 1.0, 0.0])
    merged = merge_plain(base, [tuned(base, 10), tuned(base, 20)], weight=weights)
    assert [torch.equal(merged[name], base[name]) for name in base] == [False, True, False, True]


def test_experts_that_change_nothing() -> None:
    base = small(0)
    for toward in ("zero", "sum"):
        merged = merge_plain(base, [base, base], toward=toward, subspace="orthogonal")
        assert all(torch.equal(merged[name], base[name]) for name in base)
    expert = tuned(base, 10)
    alone, beside = merge_plain(base, [expert]), merge_plain(base, [expert, base])
    assert torch.allclose(alone["m.proj.weight"], beside["m.proj.weight"], atol=1e-6)
    assert torch.allclose(
        beside["m.norm.weight"] - base["m.norm.weight"],
        (expert["m.norm.weight"] - base["m.norm.weight"]) / 2,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", list(MODEL))
@pytest.mark.parametrize("subspace", ["all", "orthogonal"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name_or_left_out(name: str, subspace: str, value: float) -> None:
    base = small(0)
    experts = {"a": tuned(base, 10), "b": tuned(base, 20)}
    spoilt = copied(experts)
    spoilt["b"][name].view(-1)[3] = value
    with pytest.raises(UserError, match=f"^{name}: b holds NaN or Inf; use a sound checkpoint; .* --allow-nonfinite"):
        prepared_merge(base, spoilt, subspace=subspace)
    experts["b"][name].view(-1)[3] = base[name].view(-1)[3]
    found = prepared_merge(base, spoilt, MergeSettings(allow_nonfinite=True), subspace=subspace)
    expected = prepared_merge(base, experts, subspace=subspace)
    assert torch.allclose(found[name], expected[name], atol=1e-6)


@pytest.mark.parametrize("where", ["a", "b"])
def test_factors_that_are_not_finite_are_refused_by_name_or_left_out(where: str) -> None:
    factors = {"b": randoms((9, 2), 1)[0], "a": randoms((2, 7), 1)[0]}
    factors[where][0, 0] = float("nan")
    spoilt = LowRankTaskVector.of(factors["b"], factors["a"], (9, 7))
    experts = {"one": {"w": spoilt}, "two": {"w": W + A}}
    with pytest.raises(UserError, match=r"^w: one holds NaN or Inf"):
        prepared_merge({"w": W}, experts)
    merged = prepared_merge({"w": W}, experts, MergeSettings(allow_nonfinite=True))["w"]
    assert bool(torch.isfinite(merged).all())


def test_a_base_that_is_not_finite_is_to_blame() -> None:
    base = small(0)
    experts = {"a": tuned(base, 10)}
    base["m.proj.weight"][1, 1] = float("inf")
    with pytest.raises(UserError, match=r"^m\.proj\.weight: the base model holds NaN or Inf"):
        prepared_merge(base, experts)


# ---------------------------------------------------------------------------------------- as part of other methods


@pytest.mark.parametrize(("embeddings", "effort"), [("mean", 0.2), ("rows", 1.0)])
def test_a_mean_of_embeddings_is_little_effort(embeddings: str, effort: float) -> None:
    method, tensors = plan(METHOD, *models("llama-untied"), {"embeddings": embeddings})
    prepared = method.prepare(tensors)
    assert prepared.effort("model.embed_tokens.weight") == effort
    assert prepared.effort("lm_head.weight") == prepared.effort("model.layers.0.mlp.up_proj.weight") == 1.0


@pytest.mark.parametrize("family", ["llama-untied", "t5-gated", "vit"])
def test_as_rest_of_min_merging(family: str) -> None:
    config, base, experts = models(family)
    shared = {"rest": "neuron_response", "rest_toward": "zero"}
    merged, told = merge_and_tell(MinMerging(), config, base, experts, shared)
    expected = merge(METHOD, config, base, experts, PLAIN)
    assert told[-1].startswith("rest: response kept: ")
    owned = {part.tensor for layer in neuron_map(config).layers for part in layer.parts}
    rest = [n for n in base if n not in owned and "ttention" not in n and "attn" not in n]
    assert len(rest) > 3
    for name in rest:
        assert torch.allclose(merged[name], expected[name], atol=1e-5), name


def test_as_rest_it_takes_measured_inputs_by_a_name_of_its_own(tmp_path: Path) -> None:
    config, base, experts = models("llama-untied")
    files = profiles(tmp_path, config, base, experts)
    shared = {"rest": "neuron_response", "rest_toward": "zero"}
    own = {expert: {"rest_inputs": "profile", "rest_profile": files[expert]} for expert in experts}
    merged, _ = merge_and_tell(MinMerging(), config, base, experts, shared, own)
    alone = {expert: {"inputs": "profile", "profile": files[expert]} for expert in experts}
    expected, without = (merge(METHOD, config, base, experts, {"toward": "zero"}, given) for given in (alone, {}))
    assert torch.equal(merged["lm_head.weight"], expected["lm_head.weight"])
    assert not torch.allclose(merged["lm_head.weight"], without["lm_head.weight"], atol=1e-2)


def test_as_rest_and_within_of_neuron_merge(tmp_path: Path) -> None:
    config, base, experts = models("llama-untied")
    groups = write_groups(tmp_path / "groups.json", config, ["general", "math", "code"])
    own = {"expert-a": {"group": "math"}, "expert-b": {"group": "code"}}
    shared = {"groups": groups, "rest": "neuron_response", "within": "neuron_response", "general": 1.0}
    shared |= {"rest_toward": "zero", "within_toward": "zero"}
    merged, told = merge_and_tell(NeuronMerge(), config, base, experts, shared, own)
    expected = merge(METHOD, config, base, experts, PLAIN)
    assert told[0].startswith("MLP neurons by group: ")
    assert {line.partition(": response kept: ")[0] for line in told[1:]} == {
        "within general",
        "within math",
        "within code",
        "rest",
    }
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert torch.allclose(merged[name], expected[name], atol=1e-5), name
    layer = neuron_map(config).layers[0]
    up = next(p.tensor for p in layer.parts if "up_proj" in p.tensor)
    # A group's rows are merged as if they were all there is: the general ones by all, each other by its own expert.
    labels = [i % 3 for i in range(layer.neurons)]
    general = [i for i, label in enumerate(labels) if label == 0]
    updates = [(experts[e][up] - base[up])[general] for e in experts]
    near((merged[up] - base[up])[general], response(updates), 2e-4)


# ------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", -1.0, r"weight must be a number in \[0, inf\]; got -1\.0"),
        ("ridge", -0.1, r"ridge must be a number in \[0, inf\] or 'auto'; got -0\.1"),
        ("toward", "base", "toward must be one of mean, sum, zero; got 'base'"),
        ("subspace", "parallel", "subspace must be one of all, orthogonal; got 'parallel'"),
        ("inputs", "data", "inputs must be one of auto, update, profile, both; got 'data'"),
        ("loudness", 3, "loudness must be one of equal, own; got 3"),
        ("points", "rows", "points must be one of mean, sum; got 'rows'"),
        ("embeddings", "sum", "embeddings must be one of mean, rows; got 'sum'"),
        ("lambda", float("nan"), "lambda must be a finite number; got nan"),
    ],
)
def test_parameters_out_of_range_are_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        one(W, W + A, **{name: value})


def test_weights_that_are_all_0_are_refused() -> None:
    with pytest.raises(UserError, match=r"^neuron_response: weight is 0 for every expert and tensor"):
        one(W, W + A, W + B, weight=0.0)


def test_parameters_may_differ_between_tensors() -> None:
    base = {"a.weight": W, "b.weight": W}
    experts = [{"a.weight": W + A, "b.weight": W + A}, {"a.weight": W + B, "b.weight": W + B}]
    merged = merge_plain(base, experts, ridge=PerGroupValues([0.01, 1.0]))
    near(merged["a.weight"] - W, response([A, B], 0.01))
    near(merged["b.weight"] - W, response([A, B], 1.0))
