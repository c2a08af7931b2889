"""Whole merges of kinds of models that no table knows, held against arithmetic on what transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from neuron_methods.plugin.merging import merge_to_directory
from tests.support.checkpoints import configuration
from tests.support.commands import run
from tests.support.kinds import KINDS, build_kind, model_class, save_kind

#: Kinds whose tensors transformers 5 has under other names in memory than it stores by default.
RENAMED = ("qwen2-vl", "qwen2.5-vl", "llava")
MIXTURES = ("deepseek-v2", "deepseek-v3", "qwen2-moe", "qwen3-moe", "glm4-moe", "mixtral", "olmoe")


def load(kind: str, path: Path) -> PreTrainedModel:
    """As a user would, but with nothing missing, left over or of another shape."""
    model, found = model_class(kind).from_pretrained(path, output_loading_info=True)
    assert not any(found.values()), found
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_the_weighted_mean_of_the_experts(kind: str, tmp_path: Path) -> None:
    save_kind(tmp_path, kind)
    merge_to_directory(configuration("linear", tmp_path), tmp_path / "out", progress=False)
    one, other = (load(kind, tmp_path / name).state_dict() for name in ("expert-a", "expert-b"))
    merged = load(kind, tmp_path / "out").state_dict()
    assert merged.keys() == one.keys()
    for name, tensor in merged.items():
        expected = 0.75 * one[name] + 0.25 * other[name] if tensor.is_floating_point() else one[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["deepseek-v3", "whisper", "resnet", "bert-masked", "qwen2-vl"])
def test_methods_of_ours_merge_them_too(kind: str, tmp_path: Path) -> None:
    save_kind(tmp_path, kind)
    merge_to_directory(configuration("neuro_merging", tmp_path), tmp_path / "out", progress=False)
    base, merged = (load(kind, tmp_path / name).state_dict() for name in ("base", "out"))
    matrices = [name for name, tensor in base.items() if tensor.ndim > 1]
    assert all(not torch.equal(base[name], merged[name]) for name in matrices)


def weighted(method: str, folder: Path, *weights: float) -> str:
    """YAML of a merge of the experts with these weights."""
    models = [
        {"model": str(folder / name), "parameters": {"weight": weight}}
        for name, weight in zip(("expert-a", "expert-b"), weights, strict=True)
    ]
    return configuration(method, folder, models=models)


@pytest.mark.parametrize("packed", ["base", "experts"])
@pytest.mark.parametrize("kind", MIXTURES + RENAMED)
def test_a_model_in_the_names_of_memory_and_another_in_those_of_old(kind: str, packed: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "expert-a", "expert-b")):
        build_kind(kind, seed).save_pretrained(
            tmp_path / name, save_original_format=(name == "base") != (packed == "base")
        )
    merge_to_directory(weighted("task_arithmetic", tmp_path, 0.75, 0.25), tmp_path / "out", progress=False)
    base, one, other, merged = (load(kind, tmp_path / n).state_dict() for n in ("base", "expert-a", "expert-b", "out"))
    for name, start in base.items():
        expected = start + 0.75 * (one[name] - start) + 0.25 * (other[name] - start)
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("method", "models", "keys", "shares"),
    [
        ("linear", {"expert-a": 3.0, "expert-b": 1.0}, {}, {"expert-a": 0.75, "expert-b": 0.25}),
        ("task_arithmetic", {"expert-a": 0.6, "expert-b": 0.2}, {}, {"expert-a": 0.75, "expert-b": 0.25}),
        ("task_arithmetic", {"expert-a": 0.6, "expert-b": -0.2}, {}, {"expert-a": 0.5, "expert-b": 0.5}),
        ("slerp", {"base": None, "expert-b": None}, {"parameters": {"t": 0.0}}, {"base": 0.5, "expert-b": 0.5}),
        ("sce", {"expert-a": None, "expert-b": None}, {}, {"expert-a": 0.5, "expert-b": 0.5}),
        ("neuro_merging", {"expert-a": 0.6, "expert-b": 0.2}, {}, {"expert-a": 0.75, "expert-b": 0.25}),
    ],
)
def test_statistics_are_averaged_as_the_models_weigh_and_that_is_said(
    method: str, models: dict, keys: dict, shares: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(save_kind(tmp_path, "resnet"))
    entries = [{"model": m} | ({} if w is None else {"parameters": {"weight": w}}) for m, w in models.items()]
    source = configuration(method, **{**keys, "models": entries})
    summary = merge_to_directory(source, tmp_path / "out", progress=False)
    states = {name: load("resnet", tmp_path / name).state_dict() for name in shares}
    merged = load("resnet", tmp_path / "out").state_dict()
    measured = [name for name in merged if name.endswith(("running_mean", "running_var"))]
    assert measured
    for name in measured:
        expected = sum(share * states[model][name] for model, share in shares.items())
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6, msg=name)
    assert any("running_mean" in note and "averaged" in note for note in summary.notes)


def test_the_stock_command_plans_a_mixture_whole(tmp_path: Path) -> None:
    # mergekit 0.1.5 alone leaves out all routed experts of this one, and exits normally.
    save_kind(tmp_path, "deepseek-v2")
    (tmp_path / "merge.yml").write_text(configuration("linear", tmp_path))
    done = run("mergekit-yaml", "merge.yml", "out", "--no-copy-tokenizer", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    one, other, merged = (load("deepseek-v2", tmp_path / n).state_dict() for n in ("expert-a", "expert-b", "out"))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.75 * one[name] + 0.25 * other[name], rtol=0, atol=1e-6, msg=name)
