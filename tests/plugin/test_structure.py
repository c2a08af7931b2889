"""Models that do not fit each other are refused; what no definition knows is found."""

import pytest
import torch
import yaml
from mergekit.options import MergeOptions

from neuron_methods.plugin.configuration import read_configuration
from neuron_methods.plugin.inputs import opened_models
from neuron_methods.plugin.patches import register
from neuron_methods.plugin.structure import check_structure, unknown_tensors
from neuron_methods.support.errors import UserError
from tests.support.checkpoints import build, configuration, edit, fine_tune, save
from tests.support.kinds import save_kind

register()


def check(source=None, **options):
    read, options = read_configuration(source or configuration(), "merge.yaml"), MergeOptions(**options)
    with opened_models(read, options):
        architecture = check_structure(read, options, "merge.yaml")
        return unknown_tensors(read, architecture, options)


def refused(match, source=None, **options):
    with pytest.raises(UserError, match=match) as caught:
        check(source, **options)
    assert "\n" not in str(caught.value)


def sliced(*outputs, **keys):
    """YAML of output slices, each a list of (model, first layer, layer after the last)."""
    slices = [{"sources": [{"model": m, "layer_range": [a, b]} for m, a, b in output]} for output in outputs]
    return yaml.safe_dump({"merge_method": "neuro_merging", "base_model": "base", "slices": slices, **keys})


@pytest.mark.parametrize(
    "family", ["llama-tied", "llama-untied", "t5-gated", "t5-ungated", "vit", "clip-vision", "clip"]
)
def test_models_of_a_family_fit_and_are_known_whole(checkpoints, family):
    unknown = check(configuration(folder=checkpoints(family)))
    assert unknown.of_base == []
    assert unknown.of_experts == {}


def test_different_architectures(workspace, checkpoints):
    workspace("llama-tied")
    other = checkpoints("vit") / "base"
    refused(
        f"base is a LlamaForCausalLM, {other} is a ViTForImageClassification; merge models of one architecture",
        configuration(models=[{"model": str(other)}]),
    )


@pytest.mark.parametrize(
    ("biased", "message"),
    [
        ("expert-b", r"expert-b: its layers have model.layers.\{i\}.self_attn.\w_proj.bias, which those of base lack"),
        ("base", r"expert-a: its layers lack model.layers.\{i\}.self_attn.\w_proj.bias, which those of base have"),
    ],
)
def test_a_bias_that_only_some_models_have(workspace, biased, message):
    folder = workspace("llama-tied")
    save(build("llama-tied", attention_bias=True), folder / biased)
    refused(message)


@pytest.mark.parametrize(
    ("base", "expert", "lacking"), [("t5-gated", "t5-ungated", r"wi_\{i\}"), ("t5-ungated", "t5-gated", "wi")]
)
def test_gated_and_ungated_t5(checkpoints, base, expert, lacking):
    models = [{"model": str(checkpoints(expert) / "expert-a")}]
    refused(
        rf"its layers have .*DenseReluDense.wi.* and lack .*DenseReluDense.{lacking}.weight, which those of",
        configuration(base_model=str(checkpoints(base) / "base"), models=models),
    )


def test_different_numbers_of_layers(workspace):
    save(fine_tune(build("llama-tied", num_hidden_layers=3), 1), workspace("llama-tied") / "expert-b")
    refused(r"merge.yaml: the models contribute different numbers of layers \(.*expert-b 3")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (sliced([("base", 0, 2), ("expert-a", 0, 1)]), r"different numbers of layers \(base 2, expert-a 1\)"),
        (sliced([("base", 0, 3), ("expert-a", 0, 3)]), r"layer_range \[0, 3\] of base, which has 2 layers"),
        (sliced([("base", 1, 0), ("expert-a", 1, 0)]), r"layer_range \[1, 0\] of base"),
        (sliced([("base", -1, 1), ("expert-a", 0, 2)]), r"layer_range \[-1, 1\] of base"),
        (
            configuration(models=None, modules={"body": {"models": [{"model": "expert-a"}]}}),
            r"modules: a LlamaForCausalLM has no module 'body' \(it has: default\)",
        ),
    ],
)
def test_layers_and_modules_that_there_are_not(workspace, source, message):
    workspace("llama-tied")
    refused(f"merge.yaml: .*{message}", source)


def test_slices_that_put_a_layer_in_the_place_of_another_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(save_kind(tmp_path, "qwen3-moe"))
    refused(
        "expert-a: slices put its layer 1 where the output has layer 0, and by the config of base that is another kind",
        sliced([("expert-a", 1, 3)], [("expert-a", 0, 1)], merge_method="passthrough"),
    )


def test_slices_of_a_model_of_several_modules(workspace):
    workspace("t5-gated")
    refused(
        "slices: a T5ForConditionalGeneration has the modules decoder, encoder, shared, .* under modules:",
        sliced([("base", 0, 2), ("expert-a", 0, 2)]),
    )


def test_modules_left_out(workspace):
    workspace("t5-gated")
    models = [{"model": "expert-a"}]
    refused(
        "modules: decoder, shared of T5ForConditionalGeneration left out",
        configuration(models=None, modules={"encoder": {"models": models}}),
    )
    check(configuration(models=None, modules={key: {"models": models} for key in ("encoder", "decoder", "shared")}))


def test_dropped_layers_are_not_unknown(workspace):
    workspace("llama-tied")
    assert check(sliced([("base", 0, 1), ("expert-a", 0, 1)])).of_base == []


def test_unknown_tensors_of_base_and_experts(workspace):
    folder = workspace("llama-tied")
    odd = {"rotary.inv_freq": torch.rand(4), "mask": torch.ones(2, dtype=torch.bool)}
    edit(folder / "base", lambda tensors: tensors.update(odd))
    edit(folder / "expert-a", lambda tensors: tensors.update(odd))
    edit(folder / "expert-b", lambda tensors: tensors.update({"value_head": torch.ones(2)}))
    unknown = check()
    assert unknown.of_base == ["mask", "rotary.inv_freq"]
    assert {str(model): names for model, names in unknown.of_experts.items()} == {"expert-b": ["value_head"]}


def test_unknown_tensors_that_differ_only_by_rounding(workspace):
    folder = workspace("llama-tied")
    odd = torch.rand(40)
    edit(folder / "base", lambda tensors: tensors.update(odd=odd))
    edit(folder / "expert-a", lambda tensors: tensors.update(odd=odd.half()))
    assert check().of_base == ["odd"]


def test_unknown_tensors_that_hold_nan_agree_with_themselves(workspace):
    folder = workspace("llama-tied")
    for name in ("base", "expert-a"):
        edit(folder / name, lambda tensors: tensors.update(odd=torch.full((3,), float("nan"))))
    assert check().of_base == ["odd"]


@pytest.mark.parametrize("other", [torch.ones(3), torch.zeros(4), torch.zeros(3) + 1e-3])
def test_unknown_tensors_that_differ(workspace, other):
    folder = workspace("llama-tied")
    edit(folder / "base", lambda tensors: tensors.update(odd=torch.zeros(3)))
    edit(folder / "expert-b", lambda tensors: tensors.update(odd=other))
    refused("expert-b: tensor odd differs from that of base")
