"""Whole merges of kinds of models that no table knows, held against arithmetic on what transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from neuron_methods.plugin.merging import merge_to_directory
from tests.support.checkpoints import configuration
from tests.support.kinds import KINDS, model_class, save_kind

# What ours do to a tensor is held elsewhere; here every method is given what to merge by the same plan.
_METHODS = ("linear", "neuro_merging")


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
