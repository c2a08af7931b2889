"""A tiny stand-in for the demo's model."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.support.byte_llama import byte_llama, byte_tokenizer, save_byte_llama


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def make_tiny_model() -> Callable[[], LlamaForCausalLM]:
    return byte_llama


@pytest.fixture
def tiny_model(make_tiny_model) -> LlamaForCausalLM:
    return make_tiny_model()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A saved tiny base, as bf16 safetensors with its tokenizer."""
    return save_byte_llama(tmp_path_factory.mktemp("tiny") / "base")
