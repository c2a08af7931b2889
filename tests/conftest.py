"""What many tests stand on: tiny checkpoints of every family, saved once per session."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

# Tests that run side by side (pytest -n) share the cores: one thread each, here and in the commands they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")


# Files that take minutes come first, so that no process is left alone with one at the end.
LONGEST = ("test_demo.py", "test_recipes.py", "test_readme.py", "test_kinds_of_model.py")


def pytest_configure(config: pytest.Config) -> None:
    """Keep pytest-xdist 3.8 to this order: it would begin with the files of the most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; everything else stays in its order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoints("llama-tied")`: a folder with base, expert-a and expert-b, shared and not to be changed."""
    from tests.support.checkpoints import save_family

    made: dict[str, Path] = {}

    def family(name: str) -> Path:
        if name not in made:
            made[name] = save_family(tmp_path_factory.mktemp(name), name)
        return made[name]

    return family


@pytest.fixture
def working_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """`working_copy(folder)`: a copy of it to work in, and the current directory from then on."""

    def copy(source: Path) -> Path:
        folder = tmp_path / "work"
        shutil.copytree(source, folder)
        monkeypatch.chdir(folder)
        return folder

    return copy


@pytest.fixture
def workspace(checkpoints: Callable[[str], Path], working_copy: Callable[[Path], Path]) -> Callable[[str], Path]:
    """`workspace("llama-tied")`: a working copy of the family's folder."""
    return lambda name: working_copy(checkpoints(name))
