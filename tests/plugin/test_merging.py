"""Whole merges in this process, from YAML to a directory that transformers loads."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers

from neuron_methods.support.errors import UserError
from tests import oracle
from tests.support.checkpoints import (
    FAMILIES,
    build,
    configuration,
    fine_tune,
    read,
    save,
)
from tests.support.merges import EMBEDDING, EXPERTS, close, merge, merged, same

# --- families, complete and loadable


@pytest.mark.parametrize("method", ["neuro_merging", "linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_merges_whole_and_loads(workspace, family, method):
    folder = workspace(family)
    tensors = merged(configuration(method))
    base = read(folder / "base")
    assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in base.items()}
    kind = FAMILIES[family]
    model, loading = kind.model_class.from_pretrained("out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    with torch.no_grad():
        outputs = model.eval()(**kind.inputs)
        before = kind.model_class.from_pretrained("base").eval()(**kind.inputs)
    assert bool(torch.isfinite(outputs[0]).all())
    assert not torch.equal(outputs[0], before[0])
    changed = [name for name in base if not torch.equal(tensors[name], base[name])]
    assert len(changed) > 0.8 * len(base)
    if family == "llama-tied" or family.startswith("t5"):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if family == "llama-untied":
        assert not torch.equal(tensors["lm_head.weight"], tensors[EMBEDDING])


@pytest.mark.parametrize("family", ["llama-untied", "t5-ungated"])
def test_the_merge_is_the_oracles(workspace, family):
    folder = workspace(family)
    summary = merge(configuration(parameters={"lambda_parallel": 0.3}))
    base, experts = read(folder / "base"), [read(folder / name) for name in EXPERTS]
    updates = [[oracle.task_vector(expert[name], base[name]) for name in base] for expert in experts]
    thresholds = [oracle.threshold(update, 0.15) for update in updates]
    assert [e.threshold for e in summary.profile.experts.values()] == pytest.approx(thresholds, rel=1e-7)
    sigmas = [oracle.sigma(update, at) for update, at in zip(updates, thresholds, strict=True)]
    assert [e.sigma for e in summary.profile.experts.values()] == pytest.approx(sigmas, rel=1e-5)
    close(read(Path("out")), oracle.merge_model(base, experts, lambda_parallel=0.3), atol=2e-6)


def test_linear_is_the_weighted_mean(workspace):
    folder = workspace("llama-tied")
    a, b = (read(folder / name) for name in EXPERTS)
    close(merged(configuration("linear")), {name: 0.75 * a[name].double() + 0.25 * b[name].double() for name in a})


def test_without_a_base_model_the_first_model_of_the_yaml_gives_the_config(workspace):
    folder = workspace("llama-tied")
    for name, value in (("expert-a", 17), ("expert-b", 18)):
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({**config, "max_position_embeddings": value}))
    merge(configuration("linear"))
    assert json.loads(Path("out/config.json").read_text())["max_position_embeddings"] == 17


# --- dtypes


def test_inputs_are_not_rounded_before_their_difference(workspace):
    workspace("llama-tied")
    exact = merged(out="exact")
    once = {name: tensor.bfloat16() for name, tensor in exact.items()}
    assert same(merged(configuration(dtype="bfloat16"), "dtype"), once)
    assert same(merged(configuration(out_dtype="bfloat16"), "out_dtype"), once)
    assert same(merged(configuration(dtype="float32", out_dtype="bfloat16"), "both"), once)
    assert json.loads(Path("dtype/config.json").read_text())["dtype"] == "bfloat16"


def test_mixed_dtypes(workspace):
    folder = workspace("llama-tied")
    save(build("llama-tied"), folder / "base", torch.bfloat16)
    save(fine_tune(build("llama-tied"), 0), folder / "expert-a", torch.float16)
    base, experts = read(folder / "base"), [read(folder / name) for name in EXPERTS]
    result = merged(configuration(out_dtype="float32"))
    close(result, oracle.merge_model(base, experts), atol=2e-6)


# --- parameters that vary


def test_density_may_vary_only_with_a_threshold_per_tensor(workspace):
    workspace("llama-tied")
    gradient = {"density": [0.1, 0.9]}
    with pytest.raises(UserError, match=r"density of expert-a varies over the tensors .*set trim: tensor"):
        merge(configuration(parameters=gradient))
    assert not os.path.exists("out")
    merge(configuration(parameters={**gradient, "trim": "tensor"}))


def test_gradients_and_filters_reach_their_tensors(workspace):
    folder = workspace("llama-tied")
    base = read(folder / "base")
    weight = [{"filter": "mlp", "value": 0}, {"filter": "self_attn", "value": [0, 1]}, {"value": 1}]
    tensors = merged(configuration(parameters={"weight": weight, "trim": "tensor", "lambda_orthogonal": 1.0}))
    plain = merged(configuration(parameters={"trim": "tensor", "lambda_orthogonal": 1.0}), "plain")
    for name, tensor in tensors.items():
        untouched = "mlp" in name or ("self_attn" in name and ".0." in name)
        assert torch.equal(tensor, base[name] if untouched else plain[name]), name


def test_trim_per_tensor_keeps_the_same_share_everywhere(workspace):
    folder = workspace("llama-tied")
    base = read(folder / "base")
    parameters = {"trim": "tensor", "density": 0.25, "lambda_parallel": 1.0, "lambda_orthogonal": 1.0}
    tensors = merged(configuration(models=[{"model": "expert-a"}], parameters=parameters))
    for name, tensor in tensors.items():
        # All entries from the (n - n/4)-th smallest on.
        changed = (tensor - base[name]).abs() > 1e-6
        assert abs(int(changed.sum()) - (tensor.numel() // 4 + 1)) <= 1, name


# --- slices and modules


def slice_of(*sources):
    return {"sources": [{"model": model, "layer_range": list(layers)} for model, *layers in sources]}


def test_a_slice_of_all_layers_is_the_whole(workspace):
    workspace("llama-tied")
    sources = [(model, 0, 2) for model in ("base", *EXPERTS)]
    sliced = merged(configuration(models=None, slices=[slice_of(*sources)]), "sliced")
    assert same(sliced, merged())


def test_layers_come_from_the_experts_named_for_them(workspace):
    folder = workspace("llama-tied")
    slices = [slice_of(("base", 0, 1), ("expert-a", 0, 1)), slice_of(("base", 1, 2), ("expert-b", 1, 2))]
    parameters = {"density": 1.0, "consensus": "sum", "lambda_parallel": 1.0}
    tensors = merged(configuration(models=None, slices=slices, parameters=parameters))
    a, b = (read(folder / name) for name in EXPERTS)
    for name in tensors:
        expert = a if ".0." in name or name == EMBEDDING else b
        torch.testing.assert_close(tensors[name], expert[name], atol=1e-6, rtol=0, msg=name)


def test_fewer_layers_make_a_smaller_model(workspace):
    workspace("llama-tied")
    merge(configuration(models=None, slices=[slice_of(("base", 1, 2), ("expert-a", 1, 2))]))
    model, loading = transformers.LlamaForCausalLM.from_pretrained("out", output_loading_info=True)
    assert model.config.num_hidden_layers == 1
    assert not loading["missing_keys"] and not loading["unexpected_keys"]


def test_modules_of_t5_with_experts_of_their_own(workspace):
    folder = workspace("t5-gated")
    modules = {
        "encoder": {"models": [{"model": "expert-a"}]},
        "decoder": {"slices": [slice_of(("base", 0, 2), ("expert-b", 0, 2))]},
        "shared": {"models": [{"model": "expert-a"}, {"model": "expert-b"}], "parameters": {"weight": 0.0}},
    }
    parameters = {"density": 1.0, "consensus": "sum", "lambda_parallel": 1.0}
    tensors = merged(configuration(models=None, modules=modules, parameters=parameters))
    base, a, b = (read(folder / name) for name in ("base", *EXPERTS))
    for name in tensors:
        expected = {"encoder": a, "decoder": b, "shared": base}[name.split(".")[0]]
        torch.testing.assert_close(tensors[name], expected[name], atol=1e-6, rtol=0, msg=name)


def test_a_base_that_is_merged_without_a_weight_is_told_the_cure(workspace):
    workspace("llama-tied")
    with pytest.raises(UserError, match=r"linear merges base_model base .* no weight; list it .* or leave"):
        merge("merge_method: linear\nbase_model: base\nmodels:\n- model: expert-a\n  parameters: {weight: 1.0}\n")
