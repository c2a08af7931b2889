"""Where hostile tests work: among files of every format, or in a copy of a file's own models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support import formats


@pytest.fixture(scope="session")
def files_of_every_format(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `formats.build` makes; a test that changes a file puts it back."""
    made = tmp_path_factory.mktemp("formats")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        formats.build(made)
    return made


@pytest.fixture
def among_formats(files_of_every_format: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make them the current directory, without a network."""
    monkeypatch.chdir(files_of_every_format)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.set_num_threads(1)


@pytest.fixture
def place(models: Path, working_copy: Callable[[Path], Path]) -> Path:
    """A working copy of `models`, a fixture of the test's file."""
    return working_copy(models)
