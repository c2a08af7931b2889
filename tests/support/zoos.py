"""Zoos of every family, built by the scripts of examples/zoo at a tiny scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import glyphs
import llama
import pytest
import t5
import vit

from tests.support.byte_llama import save_byte_llama

_SIZES = {"width": 16, "layers": 1, "pretraining_steps": 3, "steps": 2, "batch": 4, "train": 12}
_SCORED = {"validation": 6, "test": 10}

SETTINGS: dict[str, Any] = {
    "vit": vit.Settings(
        tasks=("digits-latin", "shapes", "counts"),
        scripts=(glyphs.PILLOW,),
        latin_faces=(glyphs.PILLOW,),
        pretraining_batch=8,
        **_SIZES,
        **_SCORED,
    ),
    "t5": t5.Settings(tasks=("sort", "plural", "sum"), pretraining_batch=4, **_SIZES, **_SCORED),
    "llama": llama.Settings(steps=2, **_SCORED),
}
TASKS = {"vit": SETTINGS["vit"].tasks, "t5": SETTINGS["t5"].tasks, "llama": ("arithmetic", "german", "python")}
_SCRIPTS = {"vit": vit, "t5": t5, "llama": llama}


#: Stands for the file of SmolLM2.
GGUF = Path(__file__)


def build_zoo(
    family: str, out: Path, seed: int = 0, *, lora: bool = False, checks: bool = True, **options: Any
) -> list[str]:
    """Run a family's script, with a tiny model in SmolLM2's place; returns what it said."""

    def save_tiny(gguf: Path, folder: Path) -> None:
        save_byte_llama(folder)

    said: list[str] = []
    if family != "llama":  # the Llama zoo always has adapters
        options["lora"] = lora
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "find_gguf", lambda: GGUF)
        patch.setattr(llama, "save_base", save_tiny)
        _SCRIPTS[family].build_zoo(
            out, SETTINGS[family], seed, checks=checks, say=said.append, progress=False, **options
        )
    return said


def adapter_config(out: Path, task: str) -> dict[str, Any]:
    """What the adapter of a zoo's task says of itself."""
    return json.loads((out / "adapters" / task / "adapter_config.json").read_text())
