"""Any file of a model, an adapter, a profile or a merge, changed at random: success, or one line with its name.

The examples are bounded here; `MERGEKIT_NEURON_HOSTILE=5000` tries as many as that.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.formats import READERS, instead, run
from tests.support.mutations import mutated

_EXAMPLES = int(os.environ.get("MERGEKIT_NEURON_HOSTILE", "60"))


@pytest.fixture(scope="module", autouse=True)
def _among_formats(files_of_every_format: Path) -> Iterator[None]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(files_of_every_format)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


def test_all_read_what_nobody_has_changed() -> None:
    for arguments, _ in READERS:
        assert run(*arguments).exit_code == 0, arguments


@settings(
    max_examples=_EXAMPLES,
    deadline=None,
    derandomize=_EXAMPLES == 60,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(st.sampled_from(READERS), st.integers(0, 10**6), st.integers(0, 2**32))
def test_whatever_a_file_says_it_is_read_or_refused_in_one_line(
    reader: tuple[tuple[str, ...], tuple[str, ...]], which: int, seed: int
) -> None:
    arguments, files = reader
    name = files[which % len(files)]
    with instead(name, mutated(name, Path(name).read_bytes(), random.Random(seed))):
        result = run(*arguments)
    if result.exit_code == 0:
        return
    assert isinstance(result.exception, SystemExit), result.exception
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "run again with --debug" not in errors[0], errors[0]
    # What a config names is looked for under that name, and is what is said then.
    known = (Path(name).name, str(Path(name).parent), "adapter", "model ")
    assert any(part in errors[0] for part in known), errors[0]
