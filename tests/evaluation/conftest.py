"""Tiny models, saved once for the room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import tiny


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model("llama")`: a saved model of `tests.support.tiny`, shared and not to be changed."""
    made: dict[str, Path] = {}

    def save(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny.save_model(kind, tmp_path_factory.mktemp("model") / kind)
        return made[kind]

    return save


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`experts("llama")`: a folder with base, expert-a and expert-b, shared and not to be changed."""
    made: dict[str, Path] = {}

    def save(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny.save_experts(tmp_path_factory.mktemp(f"experts-{kind}"), kind)
        return made[kind]

    return save
