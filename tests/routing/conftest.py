"""Tiny routed models, built once per kind; and a cheap router for tests that are not about routers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from tests.support.routed import make_workspace, settings


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`made("llama")`: a folder with base, adapters, data and a routed model of them; to be left as it is."""
    from neuron_methods.routing.build import build_routed_model

    known: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in known:
            folder = make_workspace(kind, tmp_path_factory.mktemp(kind))
            (folder / "routed.yaml").write_text(yaml.safe_dump(settings(kind)))
            build_routed_model(folder / "routed.yaml", folder / "routed")
            known[kind] = folder
        return known[kind]

    return get


@pytest.fixture
def workspace(made: Callable[[str], Path], working_copy: Callable[[Path], Path]) -> Callable[[str], Path]:
    """A working copy of such a folder."""
    return lambda kind: working_copy(made(kind))
