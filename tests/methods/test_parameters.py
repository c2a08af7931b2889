"""Parameters of neuro_merging as mergekit's planner resolves them from a YAML, before any tensor is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

import neuron_methods
from neuron_methods.methods.contract import PlannedTensor
from neuron_methods.methods.neuro_merging import NeuroMerging, PreparedNeuroMerging
from neuron_methods.plugin.checkpoints import CheckpointLoader
from neuron_methods.support.errors import UserError
from tests.support.checkpoints import read, save_family

neuron_methods.register()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("llama"), "llama-untied", experts=2)


@pytest.fixture(autouse=True)
def fresh_loaders() -> Iterator[None]:
    LoaderCache().loaders.clear()
    yield
    LoaderCache().loaders.clear()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors read so far."""
    names: list[str] = []
    original = CheckpointLoader.get_tensor

    def get_tensor(self: CheckpointLoader, key: str, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        names.append(key)
        return original(self, key, *args, **kwargs)

    monkeypatch.setattr(CheckpointLoader, "get_tensor", get_tensor)
    return names


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[list[PlannedTensor]]:
    """The plans the method was shown."""
    shown: list[list[PlannedTensor]] = []
    original = NeuroMerging.prepare

    def prepare(self: NeuroMerging, tensors: list[PlannedTensor]) -> PreparedNeuroMerging:
        shown.append(tensors)
        return original(self, tensors)

    monkeypatch.setattr(NeuroMerging, "prepare", prepare)
    return shown


def merge(folder: Path, out: Path, shared: dict | None = None, first: dict | None = None) -> None:
    """Merge expert-a and expert-b; `first` are expert-a's own parameters."""
    source = {
        "merge_method": "neuro_merging",
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / "expert-a"), "parameters": first or {}},
            {"model": str(folder / "expert-b")},
        ],
        "parameters": shared or {},
    }
    configuration = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(source)))
    run_merge(configuration, str(out), MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))


REFUSED = [
    ({"density": 0.0}, {}, r"^density must be a number in \(0, 1\]; got 0\.0$"),
    ({}, {"density": 1.5}, r"^density must be a number in \(0, 1\]; got 1\.5$"),
    ({"density": "dense"}, {}, r"^density must be a number in \(0, 1\]; got 'dense'$"),
    ({"density": [0.5, 0.0]}, {}, r"^density must be a number in \(0, 1\]; got 0\.0$"),
    ({}, {"weight": float("nan")}, r"^weight must be a finite number; got nan$"),
    ({"rank_energy": -1}, {}, r"^rank_energy must be a number in \(0, 1\]; got -1$"),
    ({"lambda_parallel": float("inf")}, {}, r"^lambda_parallel must be a finite number; got inf$"),
    ({"lambda_orthogonal": "big"}, {}, r"^lambda_orthogonal must be a finite number or 'auto' or 'norm'; got 'big'$"),
    ({"trim": "layer"}, {}, r"^trim must be one of model, tensor, differing; got 'layer'$"),
    ({"trim": "differing"}, {}, r"lambda_orthogonal: auto is made of what trimming by magnitude removes"),
    (
        {"trim": "differing", "lambda_orthogonal": "norm"},
        {"density": 0.9},
        r"density of \S+ differs between the experts \(0\.15, 0\.9\): trim: differing keeps the same entries",
    ),
    ({"consensus": "max"}, {}, r"^consensus must be one of mean, sum; got 'max'$"),
    ({"density": [0.1, 0.9]}, {}, r"density of \S*expert-a varies over the tensors .*set trim: tensor$"),
    ({}, {"density": [{"filter": "mlp", "value": 0.5}, {"value": 0.1}]}, r"density of \S*expert-a varies"),
    ({"trim": [{"filter": "mlp", "value": "tensor"}, {"value": "model"}]}, {}, r"trim varies over the tensors"),
    ({"profile": [{"filter": "mlp", "value": "a.json"}, {"value": "b.json"}]}, {}, r"profile varies over the tensors"),
]


@pytest.mark.parametrize(("shared", "first", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refused_before_any_tensor_is_read(
    shared: dict, first: dict, message: str, checkpoints: Path, tmp_path: Path, reads: list[str]
) -> None:
    with pytest.raises(UserError, match=message) as error:
        merge(checkpoints, tmp_path / "out", shared, first)
    assert reads == []
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_defaults(checkpoints: Path, tmp_path: Path, plans: list[list[PlannedTensor]], reads: list[str]) -> None:
    merge(checkpoints, tmp_path / "out")
    (tensors,) = plans
    assert {t.name for t in tensors} == set(read(checkpoints / "base"))
    for tensor in tensors:
        assert tensor.parameters == {
            "trim": "model",
            "lambda_parallel": 0.0,
            "lambda_orthogonal": "auto",
            "lambda_points": "orthogonal",
            "rank_energy": 1.0,
            "spectral_exponent": 1.0,
            "consensus": "mean",
            "embeddings": "rows",
            "profile": "",
        }
        assert {name: set(values.values()) for name, values in tensor.expert_parameters.items()} == {
            "weight": {1.0},
            "density": {0.15},
        }
    assert reads


def resolved(tensors: list[PlannedTensor], name: str, part: str) -> dict[int, float]:
    """{layer: value} of a shared parameter, for the tensors whose name has `part`."""
    return {int(t.name.split(".")[2]): t.parameters[name] for t in tensors if ".layers." in t.name and part in t.name}


def test_gradients_and_filters_resolve(
    checkpoints: Path, tmp_path: Path, plans: list[list[PlannedTensor]], reads: list[str]
) -> None:
    shared = {
        "trim": "tensor",
        "lambda_parallel": [0.0, 1.0],
        "lambda_orthogonal": [
            {"filter": "mlp", "value": [0.5, 1.5]},
            {"filter": "norm", "value": "auto"},
            {"value": 2},
        ],
        "rank_energy": [{"filter": "self_attn", "value": 0.5}],
    }
    first = {"density": [0.2, 0.4], "weight": [{"filter": "down_proj", "value": -1}, {"value": [1, 3]}]}
    merge(checkpoints, tmp_path / "out", shared, first)
    (tensors,) = plans
    assert resolved(tensors, "lambda_parallel", "q_proj") == {0: 0.0, 1: 1.0}
    assert resolved(tensors, "lambda_orthogonal", "up_proj") == {0: 0.5, 1: 1.5}
    assert resolved(tensors, "lambda_orthogonal", "layernorm") == {0: "auto", 1: "auto"}
    assert resolved(tensors, "lambda_orthogonal", "q_proj") == {0: 2.0, 1: 2.0}
    assert resolved(tensors, "rank_energy", "k_proj") == {0: 0.5, 1: 0.5}
    assert resolved(tensors, "rank_energy", "up_proj") == {0: 1.0, 1: 1.0}
    found = {t.name: {k: [v[e] for e in v] for k, v in t.expert_parameters.items()} for t in tensors}
    assert found["model.layers.0.mlp.up_proj.weight"] == {"density": [0.2, 0.15], "weight": [1.0, 1.0]}
    assert found["model.layers.1.mlp.up_proj.weight"] == {"density": [0.4, 0.15], "weight": [3.0, 1.0]}
    assert found["model.layers.1.mlp.down_proj.weight"] == {"density": [0.4, 0.15], "weight": [-1.0, 1.0]}


def test_what_filters_resolve_to_is_what_is_merged(checkpoints: Path, tmp_path: Path) -> None:
    """One half of the tensors merged with one scale, the other left as it is."""
    scales = [{"filter": "mlp", "value": 1.0}, {"value": 0.0}]
    merge(checkpoints, tmp_path / "out", {"lambda_orthogonal": scales, "density": 0.5})
    base, merged = read(checkpoints / "base"), read(tmp_path / "out")
    for name, weights in base.items():
        assert torch.equal(merged[name], weights) == ("mlp" not in name), name
