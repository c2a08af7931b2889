"""`mergekit-neuron verify`: what transformers or peft would load of a directory, against what it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from neuron_methods.cli import main
from tests.support.checkpoints import build, edit
from tests.support.kinds import KINDS, save_kind


def verify(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def refused(*arguments: object) -> str:
    done = verify(*arguments)
    assert done.exit_code == 1, done.output
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_has_saved_is_complete(kind: str, tmp_path: Path) -> None:
    save_kind(tmp_path, kind, ("base",))
    done = verify(tmp_path / "base")
    assert done.exit_code == 0, done.output
    assert KINDS[kind][0] in done.stdout


@pytest.mark.parametrize("kind", ["deepseek-v3", "bert", "whisper", "resnet"])
def test_each_tensor_is_missed_by_the_name_it_has_in_memory_or_of_its_packed_whole(kind: str, tmp_path: Path) -> None:
    save_kind(tmp_path, kind, ("base",))
    file = tmp_path / "base" / "model.safetensors"
    whole = load_file(file)
    for name in list(whole)[:: max(len(whole) // 6, 1)]:
        save_file({key: value for key, value in whole.items() if key != name}, file, metadata={"format": "pt"})
        message = refused(tmp_path / "base")
        assert "missing" in message or "needs" in message, (name, message)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    build("llama-tied").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_what_no_part_of_the_class_reads_is_named(base: Path) -> None:
    edit(base, lambda tensors: tensors.update({"model.layers.0.mlp.gate.weight": torch.ones(2)}))
    assert "model.layers.0.mlp.gate.weight" in refused(base)


def test_a_shape_that_the_config_does_not_give_is_named(base: Path) -> None:
    edit(base, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    assert "model.norm.weight is stored as [3], but by config.json LlamaForCausalLM needs [16]" in refused(base)


def test_a_dtype_that_the_config_does_not_name_is_told(base: Path) -> None:
    edit(base, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    assert "config.json says dtype float32, but its tensors are stored as bfloat16" in refused(base)


def test_a_head_of_its_own_under_a_config_that_ties_it_is_refused(base: Path) -> None:
    edit(base, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    assert '"tie_word_embeddings": false' in refused(base)


def test_weights_in_fp8_are_whole_by_their_index_and_headers(base: Path) -> None:
    edit(base, lambda tensors: tensors.update({name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()}))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    done = verify(base)
    assert done.exit_code == 0, done.output
    assert "complete by its index and headers" in done.stdout
    assert "quantised (fp8), so it was not built" in done.stdout
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-10])
    assert "not a complete safetensors file" in refused(base)


def test_a_config_that_names_no_class_is_told(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    del config["architectures"]
    (base / "config.json").write_text(json.dumps(config))
    done = verify(base)
    assert done.exit_code == 0, done.output
    assert "config.json names no class (architectures), so it was not built" in done.stdout


def test_custom_code_is_not_run_unasked_and_that_is_said(base: Path) -> None:
    (base / "modeling_own.py").write_text("raise SystemExit('run')")
    config = json.loads((base / "config.json").read_text())
    config |= {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    (base / "config.json").write_text(json.dumps(config))
    done = verify(base)
    assert done.exit_code == 0
    assert "OwnForCausalLM is custom code, which --trust-remote-code would run, so it was not built" in done.stdout


@pytest.fixture
def adapter(base: Path) -> Path:
    model = get_peft_model(build("llama-tied"), LoraConfig(target_modules=["q_proj", "up_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(base.parent / "adapter")
    return base.parent / "adapter"


def edit_adapter(place: Path, change) -> None:
    file = place / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_an_adapter_is_held_against_its_base(adapter: Path) -> None:
    done = verify(adapter)
    assert done.exit_code == 0 and "adapter, 8 tensors, complete by peft" in done.stdout
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_adapter(adapter, lambda tensors: tensors.pop(key))
    assert "lora_A" in refused(adapter)


def test_a_factor_of_another_shape_is_named(adapter: Path) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_adapter(adapter, lambda tensors: tensors.update({key: torch.ones(8, 5)}))
    assert key in refused(adapter)


def train(base: Path, model, **options) -> Path:
    model = get_peft_model(model, LoraConfig(**options))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(base.parent / "trained")
    return base.parent / "trained"


def test_a_module_to_save_that_is_not_in_the_file_is_missed(base: Path) -> None:
    place = train(base, build("llama-tied"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    edit_adapter(place, lambda tensors: tensors.pop("base_model.model.lm_head.weight"))
    assert "peft would miss base_model.model.lm_head.weight" in refused(place)


def test_a_module_to_save_within_another_is_refused_as_peft_cannot_load_it(base: Path) -> None:
    place = train(base, build("llama-tied"), target_modules=["q_proj"], modules_to_save=["mlp"])
    assert verify(place).exit_code == 0
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["mlp", "up_proj"]}))
    assert "peft" in refused(place)


def test_embeddings_that_peft_has_saved_with_their_factors_have_a_place(tmp_path: Path) -> None:
    build("llama-untied").save_pretrained(tmp_path / "base")
    place = train(tmp_path / "base", build("llama-untied"), target_modules=["embed_tokens", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(place / "adapter_model.safetensors")
    done = verify(place)
    assert done.exit_code == 0, done.output


def test_a_classifier_on_a_base_of_another_class_has_a_place(base: Path) -> None:
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=5)
    done = verify(train(base, model, target_modules=["q_proj"], task_type="SEQ_CLS"))
    assert done.exit_code == 0, done.output
    assert "on LlamaForSequenceClassification" in done.stdout


def test_a_type_that_peft_does_not_know_is_named(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "NEWEST"}))
    assert "adapters of type NEWEST are unknown to this version of peft; update peft" in refused(adapter)


def test_an_adapter_whose_base_is_elsewhere_is_checked_by_itself_and_that_is_said(adapter: Path) -> None:
    (adapter.parent / "base").rename(adapter.parent / "moved")
    done = verify(adapter)
    assert done.exit_code == 0 and "was not held against its base" in done.stdout


def test_several_directories_and_none(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert len(verify(base, adapter).stdout.splitlines()) == 2
    (tmp_path / "empty").mkdir()
    assert "holds no model" in refused(tmp_path / "empty")
    assert "no such directory" in refused(tmp_path / "nothing")
    done = verify(tmp_path / "nothing", base, tmp_path / "empty", adapter)
    assert (done.exit_code, len(done.stdout.splitlines()), len(done.stderr.splitlines())) == (1, 2, 2)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_prompts_that_were_trained_are_held_against_their_base(kind: type, base: Path, tmp_path: Path) -> None:
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = LlamaForCausalLM.from_pretrained(base)
    get_peft_model(model, config).save_pretrained(tmp_path / "prompts")
    done = verify(tmp_path / "prompts")
    assert done.exit_code == 0, done.output
    assert "adapter, 1 tensors, complete by peft" in done.stdout
    file = tmp_path / "prompts" / "adapter_model.safetensors"
    prompts = load_file(file)["prompt_embeddings"]
    for stored, said in (
        ({"prompt_embeddings": prompts[:, 1:].contiguous()}, "peft would take prompt_embeddings of shape"),
        ({"prompts": prompts}, "peft would not find a place for prompts"),
        ({"prompt_embeddings": prompts, "more": prompts.clone()}, "peft would not find a place for more"),
    ):
        save_file(stored, file, metadata={"format": "pt"})
        assert said in refused(tmp_path / "prompts")
