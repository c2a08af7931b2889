"""Tiny checkpoints of every family: a base and experts that differ from it a little, saved by transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

StateDict = dict[str, Tensor]

LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VISION = {**LAYERS, "image_size": 8, "patch_size": 4}
_TEXT = {**LAYERS, "vocab_size": 40, "max_position_embeddings": 8, "projection_dim": 8}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2}
_LLAMA = {**LAYERS, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 40, "pad_token_id": 0, "eos_token_id": 1}

_TOKENS = torch.tensor([[3, 4, 5, 1], [6, 7, 8, 1]])
_PIXELS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


@dataclass(frozen=True)
class Family:
    """A kind of model: its class, how its config is made, and what its forward takes."""

    architecture: str
    config: Callable[[], transformers.PretrainedConfig]
    inputs: dict[str, Tensor]

    @property
    def model_class(self) -> type[transformers.PreTrainedModel]:
        return getattr(transformers, self.architecture)


def _clip() -> transformers.CLIPConfig:
    return transformers.CLIPConfig(text_config=_TEXT, vision_config={**VISION, "projection_dim": 8}, projection_dim=8)


def _t5(feed_forward: str) -> Family:
    return Family(
        "T5ForConditionalGeneration",
        lambda: transformers.T5Config(vocab_size=40, feed_forward_proj=feed_forward, **_T5),
        {"input_ids": _TOKENS, "decoder_input_ids": _TOKENS},
    )


def _llama(**config: object) -> Family:
    return Family("LlamaForCausalLM", lambda: transformers.LlamaConfig(**{**_LLAMA, **config}), {"input_ids": _TOKENS})


FAMILIES: dict[str, Family] = {
    "llama-tied": _llama(tie_word_embeddings=True),
    "llama-untied": _llama(tie_word_embeddings=False),
    "t5-gated": _t5("gated-gelu"),
    "t5-ungated": _t5("relu"),
    "vit": Family(
        "ViTForImageClassification",
        lambda: transformers.ViTConfig(**VISION, num_labels=3),
        {"pixel_values": _PIXELS},
    ),
    "clip-vision": Family("CLIPVisionModel", lambda: _clip().vision_config, {"pixel_values": _PIXELS}),
    "clip": Family("CLIPModel", _clip, {"pixel_values": _PIXELS, "input_ids": _TOKENS}),
}


def build(family: str | Family, seed: int = 0, **changes: object) -> transformers.PreTrainedModel:
    """A model whose every parameter is random and depends on `seed`; `changes` go into its config."""
    family = FAMILIES[family] if isinstance(family, str) else family
    config = family.config()
    for key, value in changes.items():
        setattr(config, key, value)
    model = family.model_class(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def fine_tune(model: transformers.PreTrainedModel, seed: int, scale: float = 0.02) -> transformers.PreTrainedModel:
    """The same model after updates of many sizes, as training leaves them; in place."""
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).pow(3), alpha=scale)
    return model


def save(model: transformers.PreTrainedModel, path: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    """Save in `dtype`; `options` are those of `save_pretrained`."""
    model.to(dtype).save_pretrained(path, **options)
    return path


def save_family(folder: Path, family: str, experts: int = 2, dtype: torch.dtype = torch.float32) -> Path:
    """Write base, expert-a, expert-b, … of a family into `folder`, and return it."""
    save(build(family), folder / "base", dtype)
    for index in range(experts):
        save(fine_tune(build(family), index), folder / f"expert-{'abcd'[index]}", dtype)
    return folder


def read(path: Path) -> StateDict:
    """All tensors of a saved model, whole or in shards."""
    tensors: StateDict = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def edit(path: Path, change: Callable[[StateDict], object]) -> None:
    """Rewrite model.safetensors after `change` has altered its tensors in place."""
    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def configuration(method: str = "neuro_merging", folder: str | Path = "", **keys: object) -> str:
    """YAML of a merge of expert-a and expert-b on base, all in `folder`; `keys` are added to it."""
    import yaml

    def path(name: str) -> str:
        return str(Path(folder) / name) if folder else name

    content: dict[str, object] = {
        "merge_method": method,
        "base_model": path("base"),
        "models": [{"model": path("expert-a")}, {"model": path("expert-b")}],
    }
    if method == "linear":
        content["models"] = [
            {"model": path("expert-a"), "parameters": {"weight": 0.75}},
            {"model": path("expert-b"), "parameters": {"weight": 0.25}},
        ]
        del content["base_model"]
    return yaml.safe_dump({**content, **keys}, sort_keys=False)
