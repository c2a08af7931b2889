"""The Hub's stand-in, with the real client turned to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sharing.hub_standin import StandIn, hub, user

TOKEN = "hf_TestOnlyNotARealTokenXXXXXXXXXX"


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """A Hub on loopback where `alice` may write with `TOKEN`; the client asks it and nothing else."""
    from huggingface_hub import constants

    with hub() as state:
        state.users[TOKEN] = user("alice", orgs={"lab": "write", "readers": "read"})
        monkeypatch.setattr(constants, "ENDPOINT", state.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", state.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        # The stand-in speaks the Hub's plain protocol for large files, not Xet.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        yield state
