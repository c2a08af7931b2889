"""Scripts under examples/ import their neighbours by name, as they do when run; and tiny zoos for them."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
for folder in ("zoo", "leaderboard"):
    sys.path.insert(0, str(EXAMPLES / folder))


def load_script(path):
    """A script of a name that others have, too."""
    spec = importlib.util.spec_from_file_location(f"script_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def board():
    """examples/leaderboard/run.py; other scripts are called run, too."""
    return load_script(EXAMPLES / "leaderboard" / "run.py")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    from tests.support.zoos import build_zoo

    out = tmp_path_factory.mktemp("leaderboard") / "vit"
    build_zoo("vit", out, checks=False)
    return out


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """A zoo with a table of token embeddings and with adapters."""
    from tests.support.zoos import build_zoo

    out = tmp_path_factory.mktemp("leaderboard") / "t5"
    build_zoo("t5", out, checks=False, lora=True)
    return out
