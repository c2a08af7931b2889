"""Stand-ins for the models that recipes name: same architecture and number of layers, at a width of next to nothing.

The few numbers of each config are those of the model on the Hub; directories are called like its id, so that a recipe
runs as it stands and no network is asked.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from neuron_methods.methods.groups_file import groups_from_labels
from neuron_methods.methods.inputs_file import InputsInfo, save_inputs
from neuron_methods.neurons import neuron_map
from neuron_methods.profiling.module_inputs import input_width, linear_modules
from tests.support.tokenizers import save_tokenizer

_NARROW = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 20, "bos_token_id": None, "eos_token_id": 1}


def _llama(layers: int, kv_heads: int, tied: bool, **more: Any) -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(
        **_NARROW,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        pad_token_id=0,
        **more,
    )


def _qwen2(layers: int, tied: bool) -> transformers.PretrainedConfig:
    return transformers.Qwen2Config(
        **_NARROW,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )


def _t5(layers: int, feed_forward: str, tied: bool) -> transformers.PretrainedConfig:
    return transformers.T5Config(
        vocab_size=20,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_heads=2,
        num_layers=layers,
        num_decoder_layers=layers,
        feed_forward_proj=feed_forward,
        tie_word_embeddings=tied,
        decoder_start_token_id=0,
    )


_VISION = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}

#: What each base is: the class of its checkpoint, and its config.
BASES: dict[str, tuple[str, Callable[[], transformers.PretrainedConfig]]] = {
    "meta-llama/Llama-2-7b-hf": ("LlamaForCausalLM", lambda: _llama(32, 2, tied=False)),
    "meta-llama/Llama-3.1-8B": (
        "LlamaForCausalLM",
        lambda: _llama(
            32,
            1,
            tied=False,
            max_position_embeddings=131072,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ),
    "Qwen/Qwen2.5-0.5B": ("Qwen2ForCausalLM", lambda: _qwen2(24, tied=True)),
    "Qwen/Qwen2.5-7B": ("Qwen2ForCausalLM", lambda: _qwen2(28, tied=False)),
    "mergekit-neuron-demo/base": ("LlamaForCausalLM", lambda: _llama(30, 1, tied=True)),
    "google-t5/t5-base": ("T5ForConditionalGeneration", lambda: _t5(12, "relu", tied=True)),
    "google-t5/t5-large": ("T5ForConditionalGeneration", lambda: _t5(24, "relu", tied=True)),
    "google/flan-t5-base": ("T5ForConditionalGeneration", lambda: _t5(12, "gated-gelu", tied=False)),
    "zoo-t5/base": ("T5ForConditionalGeneration", lambda: _t5(3, "gated-gelu", tied=False)),
    "./clip-vit-base-patch32-vision": (
        "CLIPVisionModel",
        lambda: transformers.CLIPVisionConfig(**_VISION, num_hidden_layers=12),
    ),
    "./clip-vit-large-patch14-vision": (
        "CLIPVisionModel",
        lambda: transformers.CLIPVisionConfig(**_VISION, num_hidden_layers=24),
    ),
    "google/vit-base-patch16-224": (
        "ViTForImageClassification",
        lambda: transformers.ViTConfig(**_VISION, num_hidden_layers=12, num_labels=5),
    ),
    "zoo-vit/base": (
        "ViTForImageClassification",
        lambda: transformers.ViTConfig(**_VISION, num_hidden_layers=4, num_labels=5),
    ),
}
_ADAPTED = {"Qwen2ForCausalLM": ["q_proj", "v_proj", "up_proj", "down_proj"], "T5ForConditionalGeneration": ["q", "v"]}
_TOKENS = torch.tensor([[3, 4, 5, 1]])


def prepare(stages: list[dict[str, Any]], folder: Path) -> None:
    """Write stand-ins for all models of a recipe into `folder`, under the names that it gives them."""
    named = {str(stage["name"]) for stage in stages if "name" in stage}
    base = str(stages[0]["base_model"])
    make_base(base, folder)
    for number, entry in enumerate(entries(stages)):
        model = str(entry["model"])
        if model in named or (folder / model).exists():
            continue
        if "+" in model:
            make_adapter(base, folder, folder / model.rpartition("+")[2], number)
        else:
            make_expert(folder / base, folder / model, number)
    groups = [str((entry.get("parameters") or {}).get("group", "")) for entry in entries(stages)]
    for entry in entries(stages):
        if profile := (entry.get("parameters") or {}).get("profile"):
            make_inputs(base, folder, folder / str(profile))
    if any(groups):
        make_groups(folder / base, folder / "groups.json", groups)


def entries(stages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The models of all stages."""
    for stage in stages:
        yield from stage["models"]


def make_base(name: str, folder: Path) -> None:
    """A model with random weights, and a tokenizer where it reads text."""
    architecture, config = BASES[name]
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder / name)
    if architecture.endswith(("ForCausalLM", "ForConditionalGeneration")):
        save_tokenizer(folder / name, [f"w{i}" for i in range(20)])


def make_expert(base: Path, place: Path, seed: int) -> None:
    """The base after updates of many sizes, as training leaves them."""
    shutil.copytree(base, place)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator).pow(3)
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})


def make_adapter(base: str, folder: Path, place: Path, seed: int) -> None:
    """A LoRA adapter that changes something."""
    architecture, _ = BASES[base]
    torch.manual_seed(seed)
    model = getattr(transformers, architecture).from_pretrained(folder / base)
    targets = _ADAPTED.get(architecture, ["q_proj", "v_proj", "fc1", "fc2"])
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    adapted.save_pretrained(place)


def make_groups(base: Path, place: Path, groups: list[str]) -> None:
    """A functional group for every MLP neuron."""
    layers = neuron_map(transformers.AutoConfig.from_pretrained(base)).layers
    names = ["general", *groups]
    labels = {layer.key: [names[i % len(names)] for i in range(layer.neurons)] for layer in layers}
    groups_from_labels("stand-in", json.loads((base / "config.json").read_text())["model_type"], labels, {}).write(
        place
    )


def make_inputs(base: str, folder: Path, place: Path) -> None:
    """Inputs of every linear module, as `mergekit-neuron profile --inputs` measures them."""
    architecture, _ = BASES[base]
    model = getattr(transformers, architecture).from_pretrained(folder / base)
    modules = linear_modules(model)
    factors = {str(number): torch.randn(4, input_width(module)) for number, module in enumerate(modules.values())}
    names = dict(zip(modules, factors, strict=True))
    info = InputsInfo(
        model="stand-in", model_type=model.config.model_type, modules=names, tokens=dict.fromkeys(factors, 4)
    )
    save_inputs(place, info, factors)


def run_model(place: Path, base: str) -> torch.Tensor:
    """Load a model with plain transformers and run it; what comes out last."""
    architecture, _ = BASES[base]
    model, loading = getattr(transformers, architecture).from_pretrained(place, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    if architecture.startswith(("CLIP", "ViT")):
        inputs = {"pixel_values": torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)}
    elif architecture.startswith("T5"):
        inputs = {"input_ids": _TOKENS, "decoder_input_ids": _TOKENS}
    else:
        inputs = {"input_ids": _TOKENS}
    with torch.no_grad():
        found = model.eval().float()(**inputs)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state
