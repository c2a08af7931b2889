"""Tiny models of many kinds, far beyond the families that have a table: class, config, and three random checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

_TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
}
_VISION = {**_TEXT, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
del _VISION["vocab_size"]
_GROUPED = {**_TEXT, "num_key_value_heads": 1}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}
_LATENT = {
    **_TEXT,
    **_ROUTED,
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "topk_group": 1,
}
_SPEECH = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
_SECTIONS = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}

#: kind -> (class, its config class, what the config is made with).
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Mixtures of experts, stored one by one and packed in memory; the first layer is dense but in the last two.
    "deepseek-v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", {**_LATENT, "head_dim": 8, "n_group": 1}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**_LATENT, "n_group": 2}),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 8, "mlp_only_layers": [0]},
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_GROUPED, **_EXPERTS, "head_dim": 8, "mlp_only_layers": [0]},
    ),
    "glm4-moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", {**_GROUPED, **_ROUTED, "head_dim": 8}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**_TEXT, "num_experts": 4, "num_experts_per_tok": 2}),
    # Decoders.
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT),
    "cohere": (
        "CohereForCausalLM",
        "CohereConfig",
        {**_GROUPED, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
    ),
    "cohere-qk-norm": (
        "CohereForCausalLM",
        "CohereConfig",
        {**_GROUPED, "use_qk_norm": True, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "head_dim": 8}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_GROUPED, "pad_token_id": 0}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16},
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "state_size": 4},
    ),
    # Encoders.
    "bert": ("BertModel", "BertConfig", _TEXT),
    "bert-masked": ("BertForMaskedLM", "BertConfig", _TEXT),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", _TEXT),
    "roberta": ("RobertaModel", "RobertaConfig", _TEXT),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    ),
    "distilbert-classifier": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    ),
    "llama-classifier": ("LlamaForSequenceClassification", "LlamaConfig", {**_GROUPED, "pad_token_id": 0}),
    "mpnet": ("MPNetModel", "MPNetConfig", _TEXT),
    "deberta": ("DebertaV2Model", "DebertaV2Config", _TEXT),
    # Encoder-decoders, speech.
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {**_SPEECH, "vocab_size": 40, "max_position_embeddings": 16},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_SPEECH,
            "vocab_size": 60,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 3,
        },
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **_TEXT,
            "conv_dim": (8, 8),
            "conv_kernel": (3, 3),
            "conv_stride": (2, 2),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
    ),
    # Vision, with convolutions and batch norms too; vision and text.
    "dinov2": ("Dinov2Model", "Dinov2Config", _VISION),
    "dinov2-classifier": ("Dinov2ForImageClassification", "Dinov2Config", _VISION),
    "vit-classifier": ("ViTForImageClassification", "ViTConfig", _VISION),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2},
    ),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {"text_config": {**_TEXT, "max_position_embeddings": 8}, "vision_config": _VISION},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**_GROUPED, "model_type": "llama"},
            "vision_config": {**_VISION, "model_type": "clip_vision_model"},
            "image_token_id": 39,
        },
    ),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": {**_GROUPED, "rope_parameters": _SECTIONS},
            "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4},
        },
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {**_GROUPED, "rope_parameters": _SECTIONS},
            "vision_config": {
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "out_hidden_size": 16,
                "num_heads": 2,
                "patch_size": 4,
            },
        },
    ),
}


def model_class(kind: str) -> type[transformers.PreTrainedModel]:
    """The class of a kind."""
    return getattr(transformers, KINDS[kind][0])


def build_kind(kind: str, seed: int, **changes: Any) -> transformers.PreTrainedModel:
    """A model whose every floating-point tensor, buffers included, is random and positive; `changes` to its config."""
    _, config_class, options = KINDS[kind]
    config: Callable[..., Any] = getattr(transformers, config_class)
    model = model_class(kind)(config(**{**options, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return model.eval()


def save_kind(folder: Path, kind: str, names: tuple[str, ...] = ("base", "expert-a", "expert-b")) -> Path:
    """Write checkpoints of one kind into `folder`, and return it."""
    for seed, name in enumerate(names):
        build_kind(kind, seed).save_pretrained(folder / name)
    return folder
