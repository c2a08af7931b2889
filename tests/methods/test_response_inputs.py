"""Files of inputs in a merge by response: what they decide, and those that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import TensorGroup, merge_state_dicts
from safetensors.torch import save_file

import neuron_methods
from neuron_methods.kernels.task_vectors import LowRankTaskVector
from neuron_methods.methods.inputs_file import InputsFile, InputsInfo, save_inputs
from neuron_methods.methods.neuron_response import NeuronResponse, PreparedNeuronResponse
from neuron_methods.plugin.tensor_places import TensorPlaces
from neuron_methods.support.errors import UserError
from tests.support.checkpoints import StateDict
from tests.support.plans import merge, models, plan
from tests.support.responses import PLAIN, near, profiles, response

neuron_methods.register()

METHOD = NeuronResponse()


def asking(files: dict[str, str], inputs: str = "profile") -> dict[str, dict[str, str]]:
    return {expert: {"inputs": inputs, "profile": path} for expert, path in files.items()}


def refusal(config: Any, base: StateDict, experts: Any, own: Any, shared: Any = None) -> str:
    """The line that `prepare` says."""
    method, tensors = plan(METHOD, config, base, experts, {**PLAIN, **(shared or {})}, own)
    with pytest.raises(UserError) as error:
        method.prepare(tensors)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, StateDict, dict[str, StateDict]]:
    return models("llama-untied")


@pytest.mark.parametrize("inputs", ["profile", "both"])
@pytest.mark.parametrize("family", ["llama-untied", "t5-gated", "vit", "clip"])
def test_all_matrices_are_merged_by_measured_inputs_but_tables(family: str, inputs: str, tmp_path: Path) -> None:
    config, base, experts = models(family)
    files = profiles(tmp_path, config, base, experts)
    method, tensors = plan(METHOD, config, base, experts, PLAIN, asking(files, inputs))
    prepared = method.prepare(tensors)
    assert isinstance(prepared, PreparedNeuronResponse)
    merged = merge(METHOD, config, base, experts, PLAIN, asking(files, inputs))
    places, opened = TensorPlaces(config, list(base)), [InputsFile.open(path) for path in files.values()]
    for name, w in base.items():
        place = places.of(name)
        assert place is not None
        if w.ndim < 2 or place.role == "tokens":
            continue
        updates = [
            (e[name] - w).flatten(1) if len(w) > 1 else (e[name] - w)[0].reshape(-1, w.shape[-1])
            for e in experts.values()
        ]
        factors = [[u] for u in updates]
        if place.width is not None:
            measured = [f.read(f.factor_of(place.module)) for f in opened]
            extra = [[u] if inputs == "both" else [] for u in updates]
            factors = [[m, *e] for m, e in zip(measured, extra, strict=True)]
        near((merged[name] - w).reshape(updates[0].shape), response(updates, factors=factors), 2e-4)


def test_tables_without_inputs_are_told_of(tmp_path: Path) -> None:
    config, base, experts = models("t5-gated")
    method, tensors = plan(METHOD, config, base, experts, PLAIN, asking(profiles(tmp_path, config, base, experts)))
    prepared = method.prepare(tensors)
    run(prepared, tensors, base, experts)
    kept, told = prepared.findings()
    assert kept.startswith("response kept: ")
    bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert told == f"merged by their updates, as they are no linear layers: 2, such as {bias}"


def run(prepared: Any, tensors: Any, base: StateDict, experts: Any) -> None:
    for tensor in tensors:
        every = {"base": base, **experts}
        group = TensorGroup.from_tensors(
            [m[tensor.name] for m in every.values()], ids=list(every), base_index=0, name=tensor.name
        )
        prepared.merge(group, {**tensor.parameters, **tensor.expert_parameters}, torch.float32)


def test_response_kept_is_what_the_merge_answers_of_what_the_experts_do(llama: Any) -> None:
    config, base, experts = llama
    method, tensors = plan(METHOD, config, base, experts, PLAIN)
    prepared = method.prepare(tensors)
    run(prepared, tensors, base, experts)
    merged = merge(METHOD, config, base, experts, PLAIN)
    energy = missed = 0.0
    matrices = [name for name, t in base.items() if t.ndim == 2 and "embed_tokens" not in name]
    for name in matrices:
        for expert in experts.values():
            update = expert[name].double() - base[name].double()
            inputs = update / update.norm()
            energy += float((update @ inputs.T).square().sum()) / 2
            missed += float(((merged[name].double() - base[name].double() - update) @ inputs.T).square().sum()) / 2
    (told,) = prepared.findings()
    kept = 1 - (missed / energy) ** 0.5
    assert told == f"response kept: {kept:.1%} of what the experts' {len(matrices)} matrices answer to their inputs"


def test_a_module_that_an_expert_changes_has_to_be_in_its_profile(llama: Any, tmp_path: Path) -> None:
    config, base, experts = llama
    names = list(base)
    name = "model.layers.1.mlp.down_proj.weight"
    files = profiles(tmp_path, config, base, experts, lambda factors: factors.pop(str(names.index(name))))
    with pytest.raises(UserError) as error:
        merge(METHOD, config, base, experts, PLAIN, asking(files))
    assert str(error.value) == (
        f"{name}: expert-a changes it, and profile {files['expert-a']} has no inputs of model.layers.1.mlp.down_proj; "
        "measure all modules with mergekit-neuron profile --inputs, or set inputs: update for it"
    )
    # Those that it leaves alone need not be.
    same = {e: {**experts[e], name: base[name]} for e in experts}
    merged = merge(METHOD, config, base, same, PLAIN, asking(files))
    assert torch.equal(merged[name], base[name])
    none = LowRankTaskVector.of(torch.zeros(16, 0), torch.zeros(0, 24), tuple(base[name].shape))
    merged = merge(METHOD, config, base, {e: {**experts[e], name: none} for e in experts}, PLAIN, asking(files))
    assert torch.equal(merged[name], base[name])


def test_inputs_without_a_profile_and_a_profile_that_is_not_read(llama: Any, tmp_path: Path) -> None:
    config, base, experts = llama
    files = profiles(tmp_path, config, base, experts)
    own = {"expert-a": {"inputs": "both"}}
    assert refusal(config, base, experts, own) == (
        "neuron_response: inputs: both of expert-a needs profile: FILE; mergekit-neuron profile --inputs makes one"
    )
    own = {"expert-a": {"inputs": "update", "profile": files["expert-a"]}}
    assert refusal(config, base, experts, own) == (
        "neuron_response: expert-a has profile, which inputs: update does not read; set inputs: profile or both, or "
        "leave profile out"
    )


def test_profiles_of_other_models_are_refused_before_anything_is_read(llama: Any, tmp_path: Path) -> None:
    config, base, experts = llama
    (tmp_path / "t5").mkdir()
    other, weights, tuned_t5 = models("t5-gated")
    foreign = profiles(tmp_path / "t5", other, weights, tuned_t5)
    line = refusal(config, base, experts, asking(foreign))
    path = foreign["expert-a"]
    assert line == f"profile {path} of expert-a: measured on a model of type t5, the merge is of llama"
    files = profiles(
        tmp_path, config, base, experts, lambda f: f.update({k: t[:, :-1].contiguous() for k, t in f.items()})
    )
    assert refusal(config, base, experts, asking(files)).startswith(
        f"profile {files['expert-a']} of expert-a: lm_head has 15 inputs there, 16 in the merge (lm_head.weight); "
    )
    info = InputsInfo(model="x", model_type="llama", modules={"visual.proj": "0"}, tokens={"0": 3})
    save_inputs(tmp_path / "elsewhere.safetensors", info, {"0": torch.ones(3, 16)})
    own = {e: {"inputs": "profile", "profile": str(tmp_path / "elsewhere.safetensors")} for e in experts}
    line = refusal(config, base, experts, own)
    assert "has inputs of none of the merge's modules (it has visual.proj, the merge lm_head)" in line


def test_profiles_that_cannot_be_read(llama: Any, tmp_path: Path) -> None:
    config, base, experts = llama
    path = tmp_path / "p.safetensors"
    own = {"expert-a": {"inputs": "profile", "profile": str(path)}}
    assert refusal(config, base, experts, own) == (
        f"profile {path}: no such file; make it with mergekit-neuron profile --inputs"
    )
    good = profiles(tmp_path, config, base, experts)["expert-a"]
    path.write_bytes(Path(good).read_bytes()[:-100])
    assert f"profile {path}: no complete safetensors file" in refusal(config, base, experts, own)
    save_file({"x": torch.ones(2)}, path)
    assert f"profile {path}: holds no inputs of modules (it says no format)" in refusal(config, base, experts, own)
    save_file({"x": torch.ones(2)}, path, metadata={"format": "mergekit-neuron profile"})
    assert "(a file of the format 'mergekit-neuron profile')" in refusal(config, base, experts, own)
    metadata = {"format": "mergekit-neuron inputs", "version": "1", "inputs": "{"}
    save_file({"x": torch.ones(2)}, path, metadata=metadata)
    assert refusal(config, base, experts, own).startswith(f"profile {path}")
    save_file({"x": torch.ones(2)}, path, metadata={**metadata, "version": "7"})
    assert f"profile {path}: version '7', expected 1" in refusal(config, base, experts, own)
    info = InputsInfo(model="x", model_type="llama", modules={"lm_head": "0"}, tokens={"0": 3})
    for wrong in (torch.ones(3), torch.ones(3, 16, dtype=torch.int32)):
        save_inputs(path, info, {"0": wrong})
        assert "factor 0 is no matrix of floating-point numbers" in refusal(config, base, experts, own)
    save_inputs(path, info, {"1": torch.ones(3, 16)})
    assert "factor 0 is missing" in refusal(config, base, experts, own)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(llama: Any, tmp_path: Path, value: float) -> None:
    config, base, experts = llama
    index = str(list(base).index("lm_head.weight"))
    files = profiles(tmp_path, config, base, experts, lambda factors: factors[index].view(-1)[3:4].fill_(value))
    with pytest.raises(UserError, match=f"^profile {files['expert-a']}: the inputs of lm_head hold NaN or Inf"):
        merge(METHOD, config, base, experts, PLAIN, asking(files))


def test_profiles_need_a_model(llama: Any, tmp_path: Path) -> None:
    config, base, experts = llama
    files = profiles(tmp_path, config, base, experts)
    parameters = {"inputs": "profile", "profile": files}
    with pytest.raises(UserError, match="this merge is of tensors alone; use inputs: update, or merge model"):
        merge_state_dicts({"base": base, **experts}, "neuron_response", base="base", parameters=parameters)
    config.architectures, known = ["NoSuchModel"], config.architectures
    try:
        assert "NoSuchModel is not to be had from transformers" in refusal(config, base, experts, asking(files))
    finally:
        config.architectures = known


def test_the_first_part_of_a_modules_path_may_differ(tmp_path: Path) -> None:
    """A classifier's expert may be measured as its backbone, and the other way round."""
    info = InputsInfo(model="x", model_type="vit", modules={"layers.0.fc1": "0", "vit.layers.0.fc2": "1"}, tokens={})
    save_inputs(tmp_path / "f.safetensors", info, {"0": torch.ones(3, 16), "1": torch.ones(2, 24)})
    file = InputsFile.open(str(tmp_path / "f.safetensors"))
    assert (file.factor_of("vit.layers.0.fc1"), file.factor_of("layers.0.fc2")) == ("0", "1")
    assert file.factor_of("layers.0.fc3") is None
