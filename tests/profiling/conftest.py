"""One tiny decoder and its data for the tests that only need any model."""

from __future__ import annotations

import pytest

from tests.support import tiny


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A saved decoder whose texts begin with <s>."""
    return tiny.save_model("llama", tmp_path_factory.mktemp("llama"), bos=True)


@pytest.fixture
def texts(tmp_path):
    return tiny.write_texts(tmp_path / "texts.jsonl", 20)
