"""A tiny decoder that can be asked in a chat, and a profile of it to ask about."""

from __future__ import annotations

from pathlib import Path

from neuron_methods.profiling import Settings, measure_profile
from tests.support import tiny

TEMPLATE = (
    "{% for turn in messages %}<s> {{ turn['role'] }} {{ turn['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant{% endif %}"
)


def save_chat_model(folder: Path) -> Path:
    """A decoder with random weights, a tokenizer of words and a chat template."""
    tiny.save_model("llama", folder)
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
