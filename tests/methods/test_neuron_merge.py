"""neuron_merge against a reference that takes neurons one by one, other methods within groups, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_state_dicts

import neuron_methods
from neuron_methods.methods.groups_file import NeuronGroups, groups_from_labels
from neuron_methods.methods.neuron_merge import NeuronMerge
from neuron_methods.neurons import neuron_map
from neuron_methods.support.errors import UserError
from tests.support.checkpoints import FAMILIES, StateDict, build
from tests.support.plans import copied, merge, models, neuron, permuted, write_groups

neuron_methods.register()

METHOD = NeuronMerge()
NAMES = ["general", "math", "code"]
GROUP_OF = {"expert-a": "math", "expert-b": "code"}
OWN = {
    "expert-a": {"group": "math", "in_group": 0.9, "out_group": 0.2, "weight": 1.1},
    "expert-b": {"group": "code", "in_group": 0.7, "out_group": 0.1, "weight": 0.8},
}


@pytest.fixture(scope="module", params=["llama-untied", "t5-gated", "t5-ungated", "vit"])
def case(request: pytest.FixtureRequest) -> Any:
    return models(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return models("llama-untied")


def group_of(layer: Any, position: int, i: int) -> str:
    del layer
    return NAMES[(i + position) % 3]


def factor(group: str, expert: str, general: float) -> float:
    own = OWN[expert]
    by_group = own["in_group"] if group == own["group"] else general if group == "general" else own["out_group"]
    return own["weight"] * by_group


# ------------------------------------------------------------------------------------------------------ steps


def test_step_2_reads_the_groups_it_was_given(llama: Any, tmp_path: Path) -> None:
    path = write_groups(tmp_path / "g.json", llama[0], NAMES)
    groups = NeuronGroups.read(path)
    assert groups.groups == ("general", "code", "math")
    assert groups.neurons_of("math", "layers.0").tolist() == list(range(1, 24, 3))
    assert groups.counts()["layers.1"] == {"general": 8, "code": 8, "math": 8}
    assert groups.made_from == {"test": True}


def test_step_3_every_neuron_takes_its_groups_share_of_each_expert(case: Any, tmp_path: Path) -> None:
    config, base, experts = case
    path = write_groups(tmp_path / "g.json", config, NAMES)
    merged = merge(METHOD, config, base, experts, {"groups": path, "general": 0.4, "lambda": 0.9}, OWN)
    for position, layer in enumerate(neuron_map(config).layers):
        for i in range(layer.neurons):
            origin = neuron(base, layer, i)
            expected = origin.clone()
            for e, tensors in experts.items():
                expected += 0.9 * factor(group_of(layer, position, i), e, 0.4) * (neuron(tensors, layer, i) - origin)
            assert torch.allclose(neuron(merged, layer, i), expected, atol=2e-6), (layer.key, i)


def test_step_3_an_expert_trained_for_no_domain_takes_general_neurons_for_its_own(llama: Any, tmp_path: Path) -> None:
    config, base, experts = llama
    path = write_groups(tmp_path / "g.json", config, ["general", "math"])
    own = {"expert-a": {"group": "general"}, "expert-b": {"group": "math"}}
    merged = merge(METHOD, config, base, experts, {"groups": path, "general": 0.0}, own)
    layer = neuron_map(config).layers[0]
    for i in range(4):
        source = experts["expert-b" if i % 2 else "expert-a"]
        assert torch.equal(neuron(merged, layer, i), neuron(source, layer, i)), i


def test_step_4_everything_else_is_merged_by_the_rest(case: Any, tmp_path: Path) -> None:
    config, base, experts = case
    path = write_groups(tmp_path / "g.json", config, NAMES)
    merged = merge(METHOD, config, base, experts, {"groups": path, "rest": "ties", "density": 0.4}, OWN)
    stock = merge_state_dicts(
        {"base": base, **experts},
        "ties",
        base="base",
        parameters={"density": 0.4, "weight": {e: OWN[e]["weight"] for e in experts}},
    )
    owned = neuron_map(config)
    rest = [name for name in base if owned.owner_of(name) is None]
    assert any("ttention" in name or "attn" in name for name in rest)
    for name in rest:
        assert torch.allclose(merged[name], stock[name], atol=1e-7), name


# ------------------------------------------------------------------------------------------------ properties


def test_all_factors_1_is_task_arithmetic(case: Any, tmp_path: Path) -> None:
    config, base, experts = case
    path = write_groups(tmp_path / "g.json", config, NAMES)
    own = {e: {"group": g, "out_group": 1.0} for e, g in GROUP_OF.items()}
    merged = merge(METHOD, config, base, experts, {"groups": path, "general": 1.0}, own)
    stock = merge_state_dicts({"base": base, **experts}, "task_arithmetic", base="base", parameters={"weight": 1.0})
    for name in base:
        assert torch.allclose(merged[name], stock[name], atol=1e-6), name


def test_disjoint_groups_give_back_each_experts_neurons_exactly(case: Any, tmp_path: Path) -> None:
    config, base, experts = case
    path = write_groups(tmp_path / "g.json", config, NAMES)
    own = {e: {"group": g} for e, g in GROUP_OF.items()}
    merged = merge(METHOD, config, base, experts, {"groups": path, "general": 0.0}, own)
    sources = {"general": base, "math": experts["expert-a"], "code": experts["expert-b"]}
    for position, layer in enumerate(neuron_map(config).layers):
        for i in range(layer.neurons):
            source = sources[group_of(layer, position, i)]
            assert torch.equal(neuron(merged, layer, i), neuron(source, layer, i)), (layer.key, i)


def test_one_expert_in_full_is_given_back(case: Any, tmp_path: Path) -> None:
    config, base, experts = case
    path = write_groups(tmp_path / "g.json", config, ["general", "math"])
    one = {"expert-a": experts["expert-a"]}
    shared = {"groups": path, "general": 1.0, "rest": "linear"}
    merged = merge(METHOD, config, base, one, shared, {"expert-a": {"group": "math"}})
    for name, tensor in one["expert-a"].items():
        assert torch.equal(merged[name], tensor), name


@given(seed=st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_permuting_neurons_permutes_the_result(llama: Any, tmp_path_factory: Any, seed: int) -> None:
    config, base, experts = llama
    folder = tmp_path_factory.mktemp("groups")
    path = write_groups(folder / "g.json", config, NAMES)
    groups = NeuronGroups.read(path)
    labels = {}
    for layer in neuron_map(config).layers:
        order = torch.randperm(layer.neurons, generator=torch.Generator().manual_seed(seed + layer.index))
        labels[layer.key] = [groups.groups[i] for i in groups.labels[layer.key][order]]
    groups_from_labels("base", config.model_type, labels, {}).write(folder / "permuted.json")
    merged = merge(METHOD, config, base, experts, {"groups": path}, OWN)
    shuffled = {e: permuted(t, config, seed) for e, t in experts.items()}
    shared = {"groups": str(folder / "permuted.json")}
    again = merge(METHOD, config, permuted(base, config, seed), shuffled, shared, OWN)
    for name, tensor in permuted(merged, config, seed).items():
        assert torch.allclose(again[name], tensor, atol=1e-6), name


# -------------------------------------------------------------------------------------------- within a group


def parts_of_group(config: Any, tensors: StateDict, path: str, group: str) -> StateDict:
    """The rows and columns of a group's neurons, of every tensor."""
    groups = NeuronGroups.read(path)
    found = {}
    for layer in neuron_map(config).layers:
        for part in layer.parts:
            index = groups.neurons_of(group, layer.key) + part.offset
            found[part.tensor] = tensors[part.tensor].index_select(part.axis, index)
    return found


WITHIN: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.4},
    "linear": {},
    "sce": {"select_topk": 0.5},
    "neuro_merging": {"density": 0.3},
    "breadcrumbs": {"density": 0.6, "gamma": 0.05},
    "multislerp": {},
}


@pytest.mark.parametrize("within", WITHIN)
def test_within_merges_each_group_as_a_model_of_its_own(llama: Any, within: str, tmp_path: Path) -> None:
    config, base, experts = llama
    path = write_groups(tmp_path / "g.json", config, NAMES)
    shared = {"groups": path, "within": within, "rest": "base", "general": 0.4, **WITHIN[within]}
    merged = merge(METHOD, config, base, experts, shared, OWN)
    from mergekit.merge_methods import get

    method = get(within)
    takes = {p.name for p in method.spec.parameters}
    parameters = {**WITHIN[within], **({"weight": 1.0} if "weight" in takes else {})}
    for group in NAMES:
        origin = parts_of_group(config, base, path, group)
        scaled = {}
        for e, tensors in experts.items():
            part = parts_of_group(config, tensors, path, group)
            scaled[e] = {n: origin[n] + factor(group, e, 0.4) * (part[n] - origin[n]) for n in origin}
        inputs = scaled if within == "linear" else {"base": origin, **scaled}
        expected = merge_state_dicts(inputs, within, base=None if within == "linear" else "base", parameters=parameters)
        for name, tensor in parts_of_group(config, merged, path, group).items():
            # Trimming by a threshold, rounding may decide about single entries.
            close = torch.isclose(tensor, expected[name], atol=5e-6)
            assert (~close).sum() <= 2, (within, group, name)


def test_within_task_arithmetic_spelled_out_is_the_formula(llama: Any, tmp_path: Path) -> None:
    config, base, experts = llama
    path = write_groups(tmp_path / "g.json", config, NAMES)
    plain = merge(METHOD, config, base, experts, {"groups": path}, OWN)
    detour = merge(METHOD, config, base, experts, {"groups": path, "within_lambda": 1.0}, OWN)
    halved = merge(METHOD, config, base, experts, {"groups": path, "within_lambda": 0.5, "rest": "base"}, OWN)
    name = "model.layers.0.mlp.down_proj.weight"
    for key in base:
        assert torch.allclose(plain[key], detour[key], atol=1e-6), key
    assert torch.allclose(halved[name] - base[name], (plain[name] - base[name]) / 2, atol=1e-6)


def test_lambda_scales_whatever_is_within(llama: Any, tmp_path: Path) -> None:
    config, base, experts = llama
    path = write_groups(tmp_path / "g.json", config, NAMES)
    shared = {"groups": path, "within": "ties", "density": 0.5}
    whole = merge(METHOD, config, base, experts, shared, OWN)
    half = merge(METHOD, config, base, experts, {**shared, "lambda": 0.5}, OWN)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(half[name] - base[name], (whole[name] - base[name]) / 2, atol=1e-6)


# -------------------------------------------------------------------------------------------------- refusals


def refusal(case: Any, shared: dict[str, Any], own: Any = None) -> str:
    with pytest.raises(UserError) as caught:
        merge(METHOD, *case, shared, OWN if own is None else own)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_groups_that_cannot_be_read_are_refused(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    assert "needs groups: FILE" in refusal(llama, {})
    assert "cannot be read" in refusal(llama, {"groups": str(path)})
    write_groups(path, llama[0], NAMES)
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    assert "truncated" in refusal(llama, {"groups": str(path)})
    path.write_text('{"format": "something else"}')
    assert "not a file of the format 'mergekit-neuron groups'" in refusal(llama, {"groups": str(path)})

    def changed(**keys: Any) -> str:
        path.write_text(json.dumps({**json.loads(text), **keys}))
        return refusal(llama, {"groups": str(path)})

    assert "version 99" in changed(version=99)
    assert "labels: Input should be a valid dictionary, found a list" in changed(labels=[1, 2])
    assert "groups must begin with 'general', each once" in changed(groups=["math", "code"])
    assert "labels.layers.1: 7 is no group" in changed(labels={**json.loads(text)["labels"], "layers.1": [7] * 24})


def test_groups_of_another_model_are_refused(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    write_groups(path, FAMILIES["vit"].config(), NAMES)
    assert "model_type 'vit'" in refusal(llama, {"groups": str(path)})
    write_groups(path, build("llama-untied", intermediate_size=20).config, NAMES)
    assert "20 neurons in layers.0; the model at hand has 24" in refusal(llama, {"groups": str(path)})
    write_groups(path, llama[0], NAMES)
    content = json.loads(path.read_text())
    del content["labels"]["layers.1"]
    path.write_text(json.dumps(content))
    message = refusal(llama, {"groups": str(path)})
    assert "no neurons in layers.1" in message
    assert "a layer is missing" in message


def test_groups_and_experts_have_to_match(llama: Any, tmp_path: Path) -> None:
    path = write_groups(tmp_path / "g.json", llama[0], NAMES)
    both_math = {e: {"group": "math"} for e in GROUP_OF}
    assert "no expert names the group 'code'" in refusal(llama, {"groups": path}, both_math)
    unknown = {**OWN, "expert-b": {"group": "poetry"}}
    assert "expert-b: group 'poetry' is not in" in refusal(llama, {"groups": path}, unknown)
    assert "expert-a has no group" in refusal(llama, {"groups": path}, {"expert-b": {"group": "code"}})


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"within": "base"}, "within: 'base' is no merge method"),
        ({"within": "neuron_merge"}, "cannot itself be one"),
        ({"rest": "slurp"}, "did you mean 'slerp'"),
        ({"rest": "slerp"}, "slerp needs the parameter 't'"),
        ({"rest": "slerp", "t": 0.5}, "exactly 2 inputs"),
        ({"rest": "ties", "rest_density": "much"}, "ties cannot take 'much' for its parameter 'density'"),
        ({"within": "neuro_merging", "within_density": 7}, "within: neuro_merging: density must be a number in"),
    ],
)
def test_inner_methods_that_cannot_work_are_refused(
    llama: Any, parameters: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path = write_groups(tmp_path / "g.json", llama[0], NAMES)
    assert problem in refusal(llama, {"groups": path, **parameters})


def test_labels_survive_the_file(llama: Any, tmp_path: Path) -> None:
    path = write_groups(tmp_path / "g.json", llama[0], NAMES)
    groups = NeuronGroups.read(path)
    groups.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == Path(path).read_text()
    assert copied(groups.labels).keys() == groups.labels.keys()
