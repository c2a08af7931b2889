"""What a plan tells before it is carried out, and what is refused with the mend."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from neuron_methods.plugin.describe import describe_plan
from neuron_methods.plugin.merging import plan_merge
from neuron_methods.support.errors import UserError
from tests.adapters.cases import lora, train
from tests.support.checkpoints import build, configuration, edit, read, save
from tests.support.merges import UP, close, merge, merged

FAMILY = "llama-untied"


def text(*models: Any, method: str = "task_arithmetic", base: str | None = "base", **keys: Any) -> str:
    entries = [m if isinstance(m, dict) or m is None else {"model": m, "parameters": {"weight": 0.5}} for m in models]
    return yaml.safe_dump({"merge_method": method, "models": entries, **({"base_model": base} if base else {}), **keys})


def set_config(model: str, **values: Any) -> None:
    file = Path(model) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# ------------------------------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "neuro_merging"])
def test_the_dtype_that_nobody_has_chosen_is_told_and_written(workspace, method: str) -> None:
    folder = workspace(FAMILY)
    save(build(FAMILY), folder / "base", torch.bfloat16)
    models = ["expert-a", "expert-b", *(["base"] if method == "linear" else [])]
    source = text(*models, method=method, base=None if method == "linear" else "base")
    said = describe_plan(plan_merge(source))
    assert re.search(r"written in float32.*base: bfloat16.*dtype: bfloat16", said), said
    summary = merge(source)
    assert any("written in float32" in note for note in summary.notes)
    stored = {tensor.dtype for tensor in read(Path("out")).values()}
    assert stored == {torch.float32}
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "float32"


def test_a_chosen_dtype_needs_no_word(workspace) -> None:
    folder = workspace(FAMILY)
    save(build(FAMILY), folder / "base", torch.bfloat16)
    summary = merge(text("expert-a", "expert-b", dtype="bfloat16"))
    assert not any("written in" in note for note in summary.notes)
    assert {tensor.dtype for tensor in read(Path("out")).values()} == {torch.bfloat16}
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"


def test_a_config_names_the_dtype_of_most_of_a_mixture(workspace) -> None:
    folder = workspace(FAMILY)
    save(build(FAMILY), folder / "base", torch.bfloat16)
    norm = "model.norm.weight"
    for name in ("expert-a", "expert-b"):
        edit(folder / name, lambda tensors: tensors.update({norm: tensors[norm].bfloat16()}))
    merge(text("expert-a", "expert-b"))
    stored = read(Path("out"))
    assert stored[norm].dtype == torch.bfloat16 and stored[UP].dtype == torch.float32
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(("key", "method"), [("dtype", "task_arithmetic"), ("out_dtype", "task_arithmetic")])
def test_an_overflow_is_the_fault_of_the_dtype(workspace, key: str, method: str) -> None:
    folder = workspace(FAMILY)
    edit(folder / "expert-a", lambda tensors: tensors[UP].mul_(1e7))
    with pytest.raises(UserError, match=rf"{UP}: its values go up to .*, and float16.* ends at 65504; write bfloat16"):
        merge(text("expert-a", method=method, **{key: "float16"}))
    assert not Path("out").exists()
    merge(text("expert-a", method=method, **{key: "bfloat16"}))


def test_an_overflow_of_a_method_of_ours(workspace) -> None:
    folder = workspace(FAMILY)
    edit(folder / "expert-a", lambda tensors: tensors[UP].mul_(1e7))
    with pytest.raises(UserError, match=rf"{UP}: the merge is too large for float16, in which it is written"):
        merge(configuration(out_dtype="float16"))


# ----------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_parameters.rope_theta 500000.0 and not 10000.0",
        ),
        ({"hidden_act": "gelu"}, "hidden_act gelu and not silu"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05 and not 1e-06"),
        ({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}, "num_attention_heads 4 and not 2"),
    ],
)
def test_models_that_compute_otherwise_are_named_with_both_values(workspace, values: dict, said: str) -> None:
    workspace(FAMILY)
    set_config("expert-b", **values)
    plan = plan_merge(configuration())
    (note,) = [note for note in plan.notes if note.startswith("warning: ")]
    assert note.startswith("warning: expert-b computes otherwise than base") and said in note


def test_models_that_compute_alike_are_not(workspace) -> None:
    workspace(FAMILY)
    assert plan_merge(configuration()).notes == []


# ------------------------------------------------------------------------------------------------------------- YAMLs


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (text({"model": "expert-a", "weight": 0.5}), r"models\[0\]: weight stands beside model; .* under parameters:"),
        (
            "merge_method: linear\nmodels: [expert-a, expert-b]\n",
            r"models\[0\]: expert-a alone; write - model: expert-a",
        ),
        (text("expert-a", "expert-a"), "expert-a is listed twice; list it once, with the sum of the two weights"),
        (
            text({"model": "expert-a", "parameters": {"weight": 0}}, method="linear", base=None),
            "weight: 0 for every model, so nothing is left; give one model another weight",
        ),
    ],
)
def test_a_mistake_and_its_mend(workspace, source: str, said: str) -> None:
    workspace(FAMILY)
    with pytest.raises(UserError, match=said) as caught:
        merge(source)
    assert "\n" not in str(caught.value)


def test_weights_of_nothing_leave_the_base(workspace) -> None:
    folder = workspace(FAMILY)
    summary = merge(text({"model": "expert-a", "parameters": {"weight": 0}}))
    assert any("weight is 0 for every model, so the output is base again" in note for note in summary.notes)
    close(read(Path("out")), read(folder / "base"))


def test_one_adapter_by_two_names_is_listed_twice(workspace) -> None:
    folder = workspace(FAMILY)
    train(folder / "base", lora(target_modules=["q_proj"])(), folder / "adapter")
    with pytest.raises(UserError, match=r"model base\+adapter is listed twice"):
        merge(text("adapter", "base+adapter"))


@pytest.mark.parametrize("name", ["ex+pert", "ex@pert", "a+b@c"])
def test_directories_with_signs_in_their_names(workspace, name: str) -> None:
    folder = workspace(FAMILY)
    expected = merged(text("expert-a"), out="expected")
    shutil.copytree(folder / "expert-a", folder / name)
    shutil.copytree(folder / "base", folder / f"base{name}")
    close(merged(text(name, base=f"base{name}")), expected)


def test_an_adapter_on_a_directory_with_a_sign_in_its_name(workspace) -> None:
    folder = workspace(FAMILY)
    train(folder / "base", lora(target_modules=["q_proj"])(), folder / "adapter")
    expected = merged(text("base+adapter", method="linear", base=None), out="expected")
    (folder / "base").rename(folder / "ba+se")
    (folder / "adapter").rename(folder / "adap@ter")
    close(merged(text("ba+se+adap@ter", method="linear", base=None)), expected)


# ----------------------------------------------------------------------------------------------------- other formats


@pytest.mark.parametrize(
    ("quantised", "how"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ, 4 bit"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "AWQ, 4 bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bit"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    ],
)
def test_quantised_models(workspace, quantised: dict, how: str) -> None:
    folder = workspace(FAMILY)
    train(folder / "base", lora(target_modules=["q_proj"])(), folder / "adapter")
    expected = merged(text("base+adapter"), out="expected")
    shutil.copytree(folder / "base", folder / "quantised")
    set_config("quantised", quantization_config=quantised)
    for source in (text("quantised"), text("expert-a", base="quantised")):
        with pytest.raises(UserError, match=rf"model quantised: its weights are quantised \({how}\).*name the model"):
            merge(source)
    with pytest.raises(UserError, match=rf"quantised \({how}\).* unquantised, .*: UNQUANTISED\+adapter"):
        merge(text("quantised+adapter", method="linear", base=None))
    adapter = folder / "adapter" / "adapter_config.json"
    content = json.loads(adapter.read_text())
    adapter.write_text(json.dumps({**content, "base_model_name_or_path": str(folder / "quantised")}))
    with pytest.raises(UserError, match=rf"which is quantised \({how}\); .*unquantised, write base\+adapter"):
        edit(folder / "base", lambda tensors: tensors[UP].add_(1))
        merge(text("adapter"))
    edit(folder / "base", lambda tensors: tensors[UP].sub_(1))
    close(merged(text("base+adapter"), out="cured"), expected)


@pytest.mark.parametrize(
    ("file", "config", "said"),
    [
        ("m.Q4_K_M.gguf", True, r"weights quantised as GGUF \(m.Q4_K_M.gguf\); name the model"),
        ("open_clip_model.safetensors", False, r"a checkpoint of open_clip"),
        ("last.ckpt", False, r"a training checkpoint, .*\(last.ckpt\); load it into its class .*save_pretrained"),
        ("consolidated.00.pth", False, r"a model in its maker's own layout"),
    ],
)
def test_weights_of_other_libraries(workspace, file: str, config: bool, said: str) -> None:
    expert = workspace(FAMILY) / "expert-a"
    (expert / "model.safetensors").rename(expert / file)
    if not config:
        (expert / "config.json").unlink()
    with pytest.raises(UserError, match=f"model expert-a: {said}"):
        merge(text("expert-a"))
    with pytest.raises(UserError, match="GGUF" if file.endswith("gguf") else "a file, not a directory"):
        merge(text(f"expert-a/{file}"))


def test_a_checkpoint_of_timm(workspace) -> None:
    expert = workspace(FAMILY) / "expert-a"
    (expert / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_224", "num_classes": 10}))
    with pytest.raises(UserError, match=r"model expert-a: a checkpoint of timm \(vit_base_patch16_224\).*transformers"):
        merge(text("expert-a"))


@pytest.mark.parametrize("said", [True, False])
def test_a_t5_with_a_head_of_its_own(workspace, said: bool) -> None:
    """Its config class calls it tied whatever its config.json says; what counts is the file."""
    folder = workspace("t5-gated")
    for seed, name in enumerate(("base", "expert-a", "expert-b")):
        head = torch.randn(40, 16, generator=torch.Generator().manual_seed(seed))
        edit(folder / name, lambda tensors, head=head: tensors.update({"lm_head.weight": head}))
        set_config(name, tie_word_embeddings=said)
    out = merged(configuration("linear"))
    one, other = (read(folder / name)["lm_head.weight"] for name in ("expert-a", "expert-b"))
    torch.testing.assert_close(out["lm_head.weight"], 0.75 * one + 0.25 * other)
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is False
    loaded = build("t5-gated").from_pretrained("out")
    assert torch.equal(loaded.lm_head.weight, out["lm_head.weight"])
