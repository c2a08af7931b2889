"""What the adapters' tests share: quiet libraries, clean loaders, and cases made once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests.adapters.cases import CASES, Made, make


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("mergekit").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _fresh_loaders() -> Iterator[None]:
    import mergekit.merge  # noqa: F401 - so that the patches find what they patch
    from mergekit.io.tasks import LoaderCache

    from neuron_methods import register

    register()
    LoaderCache.loaders.clear()
    yield
    LoaderCache.loaders.clear()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Base, adapter and peft's merge of a case by its name; to be left as they are."""
    known: dict[str, Made] = {}
    root: Path = tmp_path_factory.mktemp("cases")

    def get(name: str) -> Made:
        if name not in known:
            known[name] = make(CASES[name], root / name)
        return known[name]

    return get
