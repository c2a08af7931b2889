"""Whole merges of kinds of models that no table knows, held against arithmetic on what transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from neuron_methods.plugin.merging import merge_to_directory
from tests.support.checkpoints import configuration
from tests.support.commands import run
from tests.support.kinds import KINDS, model_class, save_kind


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
        share = 0.5 if "running_" in name else 0.75  # what was measured is averaged
        expected = share * one[name] + (1 - share) * other[name] if tensor.is_floating_point() else one[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["deepseek-v3", "whisper", "resnet", "bert-masked", "qwen2-vl"])
def test_methods_of_ours_merge_them_too(kind: str, tmp_path: Path) -> None:
    save_kind(tmp_path, kind)
    merge_to_directory(configuration("neuro_merging", tmp_path), tmp_path / "out", progress=False)
    base, merged = (load(kind, tmp_path / name).state_dict() for name in ("base", "out"))
    matrices = [name for name, tensor in base.items() if tensor.ndim > 1]
    assert all(not torch.equal(base[name], merged[name]) for name in matrices)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "neuro_merging"])
def test_statistics_are_averaged_over_the_experts_and_that_is_said(method: str, tmp_path: Path) -> None:
    save_kind(tmp_path, "resnet")
    weights = {} if method == "linear" else {"parameters": {"weight": 0.5}}
    summary = merge_to_directory(configuration(method, tmp_path, **weights), tmp_path / "out", progress=False)
    one, other, merged = (load("resnet", tmp_path / n).state_dict() for n in ("expert-a", "expert-b", "out"))
    measured = [name for name in merged if name.endswith(("running_mean", "running_var"))]
    assert measured
    for name in measured:
        torch.testing.assert_close(merged[name], (one[name] + other[name]) / 2, rtol=0, atol=1e-6, msg=name)
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
