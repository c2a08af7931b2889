"""Tiny models to merge on the page."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.support.byte_llama import byte_llama, save_byte_llama
from tests.support.checkpoints import fine_tune


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with `base`, `expert-a` and `expert-b`."""
    folder = tmp_path_factory.mktemp("page")
    save_byte_llama(folder / "base")
    for seed, name in enumerate(("expert-a", "expert-b")):
        shutil.copytree(folder / "base", folder / name)
        expert: LlamaForCausalLM = fine_tune(byte_llama(), seed, 0.1)
        expert.to(torch.bfloat16).save_pretrained(folder / name)
    return folder
