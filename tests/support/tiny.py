"""Tiny models with tokenizers and data, saved as users have them."""

from __future__ import annotations

import json
import random
import shutil
from copy import deepcopy
from pathlib import Path

import torch
import transformers

from tests.support import tokenizers
from tests.support.checkpoints import LAYERS, VISION, fine_tune

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS = [*NUMBERS, "red", "green", "blue", "cat", "dog", "house", "tree", "and", "or"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]

VOCABULARY = {word: i for i, word in enumerate(SPECIAL + WORDS)}

TOKENS = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**LAYERS, **TOKENS, "num_key_value_heads": 1, "head_dim": 8}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2, **TOKENS, "decoder_start_token_id": 0}
CLIP_TEXT = {**LAYERS, **TOKENS, "max_position_embeddings": 12, "projection_dim": 8}
LABELS = {"cat": 0, "dog": 1, "tree": 2}


def config_of(kind: str) -> tuple[str, transformers.PretrainedConfig]:
    """(architecture, config) of a kind of model."""
    if kind == "clip":
        both = transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config={**VISION, "projection_dim": 8})
        return "CLIPModel", both
    if kind == "vit":
        config = transformers.ViTConfig(**VISION, label2id=LABELS, id2label={i: name for name, i in LABELS.items()})
        return "ViTForImageClassification", config
    if kind.startswith("t5"):
        form = "gated-gelu" if kind == "t5-gated" else "relu"
        return "T5ForConditionalGeneration", transformers.T5Config(**T5, feed_forward_proj=form)
    name = {"llama": "Llama", "mistral": "Mistral", "phi3": "Phi3", "starcoder2": "Starcoder2"}[kind]
    return name + "ForCausalLM", getattr(transformers, name + "Config")(**DECODER)


def build_model(kind: str) -> transformers.PreTrainedModel:
    """A model with random weights, biases and norms too, in float32."""
    architecture, config = config_of(kind)
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


def build_tokenizer(*, bos: bool = False) -> transformers.PreTrainedTokenizerFast:
    """One token per word; with `bos` every text begins with <s>."""
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tokenizers.build_tokenizer(SPECIAL + WORDS, "<s>" if bos else None, **names)


def save_model(kind: str, folder: Path, *, bos: bool = False) -> Path:
    """A directory with config, weights, tokenizer and, for models that see, image processor."""
    build_model(kind).save_pretrained(folder)
    if kind != "vit":
        build_tokenizer(bos=bos).save_pretrained(folder)
    if kind == "vit":
        transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    if kind == "clip":
        size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
        transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


def save_experts(folder: Path, kind: str = "llama", scale: float = 0.1) -> Path:
    """Save base, expert-a and expert-b of a kind of model, each with its tokenizer or image processor."""
    save_model(kind, folder / "base")
    for seed, name in enumerate(("expert-a", "expert-b")):
        shutil.copytree(folder / "base", folder / name)
        fine_tune(build_model(kind), seed, scale).save_pretrained(folder / name)
    return folder


def sentences(count: int, seed: int = 0) -> list[str]:
    """Texts of 3 to 9 words."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(3, 9))) for _ in range(count)]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_texts(path: Path, count: int, seed: int = 0) -> Path:
    """A jsonl file with the columns `text`, `input` and `target`."""
    texts, targets = sentences(count, seed), sentences(count, seed + 1)
    rows = [{"text": text, "input": text, "target": target} for text, target in zip(texts, targets, strict=True)]
    return write_jsonl(path, rows)


def write_images(folder: Path, count: int) -> Path:
    """An image folder with `count` pictures in a sub-folder for each label."""
    from PIL import Image

    generator = random.Random(0)
    for label in LABELS:
        (folder / label).mkdir(parents=True)
        for i in range(count):
            image = Image.new("RGB", (8, 8))
            image.putdata([tuple(generator.choices(range(256), k=3)) for _ in range(64)])
            image.save(folder / label / f"{i}.png")
    return folder
