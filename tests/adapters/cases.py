"""Tiny bases, adapters trained on them (by noise) and the same adapters merged by peft."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

_LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {**_LAYERS, "vocab_size": 40, "num_key_value_heads": 1, "head_dim": 8}


def llama(**config: Any) -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_TEXT, **config}))


def t5(**config: Any) -> transformers.PreTrainedModel:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=40, **sizes, **config))


def vit(**config: Any) -> transformers.PreTrainedModel:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**_LAYERS, image_size=8, patch_size=4, num_labels=3, **config)
    )


def clip_vision() -> transformers.PreTrainedModel:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**_LAYERS, image_size=8, patch_size=4))


def clip() -> transformers.PreTrainedModel:
    text = {**_LAYERS, "vocab_size": 40, "max_position_embeddings": 8}
    vision = {**_LAYERS, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def gpt2() -> transformers.PreTrainedModel:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, **sizes))


def gpt_oss() -> transformers.PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**_TEXT, **experts))


def mixtral() -> transformers.PreTrainedModel:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_TEXT, num_local_experts=4))


@dataclass(frozen=True)
class Case:
    """A base model and an adapter's configuration.

    Attributes:
        model: builds the base.
        config: builds the adapter's configuration.
        lazy: whether the adapter can be formed tensor by tensor.
    """

    model: Callable[[], transformers.PreTrainedModel]
    config: Callable[[], peft.PeftConfig]
    lazy: bool = True


def lora(**options: Any) -> Callable[[], peft.LoraConfig]:
    return lambda: peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options})


ATTENTION = ["q_proj", "v_proj"]
PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
    "alpha_pattern": {"v_proj": 5, "layers.0.mlp.down_proj": 1},
}
tied = partial(llama, tie_word_embeddings=True)
biased = partial(llama, attention_bias=True, mlp_bias=True)
gated_t5 = partial(t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)

CASES: dict[str, Case] = {
    "llama": Case(llama, lora(target_modules="all-linear")),
    "llama-patterns": Case(llama, lora(target_modules="all-linear", **PATTERNS)),
    "llama-rslora": Case(llama, lora(target_modules=ATTENTION, use_rslora=True, **PATTERNS)),
    "llama-dora": Case(llama, lora(target_modules=[*ATTENTION, "down_proj", "embed_tokens"], use_dora=True)),
    "llama-embeddings": Case(llama, lora(target_modules=["embed_tokens", "lm_head"])),
    "llama-tied-embedding": Case(tied, lora(target_modules=["q_proj", "embed_tokens"])),
    "llama-tied-head": Case(tied, lora(target_modules=["q_proj", "lm_head"])),
    "llama-tied-head-saved": Case(tied, lora(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "llama-tied-embedding-saved": Case(tied, lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    "llama-ties-kept": Case(
        tied, lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    ),
    "llama-norms-saved": Case(llama, lora(target_modules=["q_proj"], modules_to_save=["norm", "input_layernorm"])),
    "llama-lora-bias": Case(biased, lora(target_modules=["q_proj", "up_proj"], lora_bias=True)),
    "llama-bias-all": Case(biased, lora(target_modules=["q_proj"], bias="all")),
    "llama-bias-lora": Case(biased, lora(target_modules=["q_proj"], bias="lora_only")),
    "llama-tokens": Case(tied, lora(target_modules=["q_proj"], trainable_token_indices=[1, 3])),
    "llama-tokens-named": Case(
        llama, lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 3], "lm_head": [2]})
    ),
    "t5": Case(t5, lora(target_modules=["q", "wi", "wo"])),
    "t5-head-saved": Case(t5, lora(target_modules=["q"], modules_to_save=["lm_head"])),
    "t5-gated": Case(gated_t5, lora(target_modules=["v", "wi_0", "wi_1", "wo"], use_dora=True)),
    "vit": Case(vit, lora(target_modules=["q_proj", "fc1", "projection"], modules_to_save=["classifier"])),
    "vit-dora": Case(vit, lora(target_modules=["k_proj", "fc2", "projection"], use_dora=True, bias="all")),
    "clip-vision": Case(clip_vision, lora(target_modules=["q_proj", "patch_embedding", "fc1"])),
    "clip": Case(clip, lora(target_modules=["q_proj", "fc2", "visual_projection", "token_embedding"])),
    "gpt2": Case(gpt2, lora(target_modules=["c_attn", "c_proj", "wte"])),
    "gpt2-dora": Case(gpt2, lora(target_modules=["c_attn", "c_proj", "c_fc"], use_dora=True)),
    "experts": Case(
        gpt_oss,
        lora(
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            rank_pattern={"experts.down_proj": 2},
        ),
    ),
    "experts-stored-apart": Case(
        mixtral,
        lora(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        lazy=False,
    ),
    "experts-all-linear": Case(mixtral, lora(target_modules="all-linear"), lazy=False),
    "pissa": Case(llama, lora(target_modules=["q_proj"], init_lora_weights="pissa"), lazy=False),
    "ia3": Case(
        llama,
        lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        lazy=False,
    ),
    "loha": Case(llama, lambda: peft.LoHaConfig(r=4, target_modules=["q_proj", "down_proj"]), lazy=False),
    "lokr": Case(llama, lambda: peft.LoKrConfig(r=4, target_modules=["q_proj", "down_proj"]), lazy=False),
}


@dataclass(frozen=True)
class Made:
    """Directories of a base, of an adapter and of the two merged by peft."""

    base: Path
    adapter: Path
    merged: Path

    def __str__(self) -> str:
        return f"{self.base}+{self.adapter}"


def save_base(model: transformers.PreTrainedModel, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a base whose weights are of order 0.3, as real ones are beside an adapter's update."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.to(dtype).save_pretrained(path)
    return path


def train(base: Path, config: peft.PeftConfig, path: Path, seed: int = 0, scale: float = 0.1) -> Path:
    """Save an adapter for `base` whose trainable parameters have moved by noise of this scale."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(load(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * scale)
        model.save_pretrained(path)
    return path


def merge(base: Path, adapter: Path, path: Path) -> Path:
    """Save what peft makes of base and adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge_in_memory(peft.PeftModel.from_pretrained(load(base), adapter)).save_pretrained(path)
    return path


def merge_in_memory(adapted: peft.PeftModel, adapter: str = "default") -> transformers.PreTrainedModel:
    """Let peft merge what it computes; into a tied weight it would merge the factors of every module that shares it."""
    ties = adapted.base_model.model.all_tied_weights_keys
    for tied in ties:
        module = adapted.base_model.model.get_submodule(tied.rpartition(".")[0])
        module = getattr(module, "base_layer", getattr(module, "original_module", module))
        module.weight = torch.nn.Parameter(module.weight.detach().clone())
    merged = adapted.merge_and_unload(adapter_names=[adapter])
    for tied, source in ties.items():
        if torch.equal(merged.get_parameter(tied), merged.get_parameter(source)):
            merged.get_submodule(tied.rpartition(".")[0]).weight = merged.get_parameter(source)
        else:
            merged.config.tie_word_embeddings = False
    return merged


def make(case: Case, root: Path) -> Made:
    torch.manual_seed(len(root.name))
    base = save_base(case.model(), root / "base")
    adapter = train(base, case.config(), root / "adapter")
    return Made(base, adapter, merge(base, adapter, root / "merged"))


def load(path: Path) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(path)
    return getattr(transformers, config.architectures[0]).from_pretrained(path)


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a saved model, of one file or several."""
    loaded: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        loaded.update(load_file(file))
    return loaded


def rewrite(adapter: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Save an adapter's tensors again, changed."""
    file = adapter / "adapter_model.safetensors"
    save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, file)
