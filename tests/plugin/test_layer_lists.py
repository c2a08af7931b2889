"""What a config says of each layer stays with the layer, wherever slices put it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from neuron_methods.plugin.merging import merge_to_directory
from tests.support.commands import run
from tests.support.kinds import build_kind, model_class

KINDS_OF_LAYER = {
    "expert-a": ["sliding_attention", "full_attention", "sliding_attention"],
    "expert-b": ["full_attention", "sliding_attention", "sliding_attention"],
}


def stacked(*slices: tuple[str, int, int]) -> str:
    """YAML of slices put one on another."""
    sources = [{"sources": [{"model": model, "layer_range": [a, b]}]} for model, a, b in slices]
    return yaml.safe_dump({"merge_method": "passthrough", "slices": sources, "dtype": "float32"})


def config(place: str = "out") -> dict[str, Any]:
    return json.loads(Path(place, "config.json").read_text())


@pytest.fixture
def gemmas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, (name, layers) in enumerate(KINDS_OF_LAYER.items()):
        build_kind("gemma3", seed, layer_types=layers, sliding_window=2, eos_token_id=[1, 2, 3]).save_pretrained(name)
    return tmp_path


@pytest.mark.parametrize(
    "slices",
    [
        (("expert-a", 1, 3), ("expert-b", 1, 2)),
        (("expert-a", 0, 2), ("expert-b", 0, 3)),
        (("expert-b", 0, 1),),
    ],
)
def test_kinds_of_layers_move_with_the_layers(gemmas: Path, slices: tuple) -> None:
    merge_to_directory(stacked(*slices), "out", progress=False)
    expected = [kind for model, a, b in slices for kind in KINDS_OF_LAYER[model][a:b]]
    assert config()["layer_types"] == expected
    assert config()["eos_token_id"] == [1, 2, 3]
    assert model_class("gemma3").from_pretrained("out").config.num_hidden_layers == len(expected)


def test_the_stock_command_moves_them_too(gemmas: Path) -> None:
    Path("merge.yml").write_text(stacked(("expert-a", 0, 2), ("expert-b", 0, 2)))
    done = run("mergekit-yaml", "merge.yml", "out", "--no-copy-tokenizer", folder=gemmas)
    assert done.returncode == 0, done.stderr
    assert config()["layer_types"] == [*KINDS_OF_LAYER["expert-a"][:2], *KINDS_OF_LAYER["expert-b"][:2]]


def test_numbers_of_dense_layers_are_counted_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build_kind("qwen3-moe", 0, mlp_only_layers=[2]).save_pretrained("base")
    merge_to_directory(stacked(("base", 0, 3), ("base", 2, 3)), "out", progress=False)
    assert config()["mlp_only_layers"] == [2, 3]
    model_class("qwen3-moe").from_pretrained("out")
