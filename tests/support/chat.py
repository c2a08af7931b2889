"""A tiny decoder that can be asked in a chat, and a profile of it to ask about."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from neuron_methods.profiling import Settings, measure_profile
from tests.support import tiny

TEMPLATE = (
    "{% for turn in messages %}<s> {{ turn['role'] }} {{ turn['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant{% endif %}"
)


def save_chat_model(folder: Path, kind: str = "llama") -> Path:
    """A decoder with random weights, a tokenizer of words and a chat template; `gpt2` has absolute positions."""
    if kind == "gpt2":
        torch.manual_seed(0)
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.5}
        ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = transformers.GPT2Config(vocab_size=len(tiny.VOCABULARY), n_positions=512, **sizes, **ends)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    else:
        tiny.save_model(kind, folder)
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def save_profile(folder: Path, model: Path) -> Path:
    """A profile of a tiny decoder on two sources, `cat` and `dog`."""
    data = [
        f"{name}={tiny.write_texts(folder / f'{name}.jsonl', 12, seed)}" for seed, name in enumerate(("cat", "dog"))
    ]
    profile = folder / "profile.safetensors"
    measure_profile(str(model), data, profile, Settings(top=4))
    return profile
