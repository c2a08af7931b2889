"""Verification sees what is missing from an output."""

import json

import pytest
import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from safetensors.torch import save_file

from neuron_methods.models.headers import Header
from neuron_methods.plugin.output import verify_output
from neuron_methods.plugin.preflight import MergePlan
from neuron_methods.support.errors import UserError
from tests.support.checkpoints import edit

BASE = ModelReference.parse("base")
SHAPES = {"embed": (6, 2), "a.weight": (3, 2), "b.weight": (2,)}


def plan_of(shapes=SHAPES):
    plan = MergePlan("linear", BASE)
    for name, shape in shapes.items():
        header = Header(shape, torch.float32)
        weight = WeightInfo(name=name, vocabulary_axis=0 if name == "embed" else None)
        plan.tensors.append((weight, {BASE: header}, header.bytes))
    return plan


@pytest.fixture
def written(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({name: torch.ones(shape) for name, shape in SHAPES.items()}, tmp_path / "model.safetensors")
    return tmp_path


def verify(path, aligned=False, **options):
    verify_output(path, plan_of(), aligned=aligned, options=MergeOptions(**options))


def test_a_whole_model_passes(written):
    verify(written)


def test_a_missing_tensor_is_found(written):
    edit(written, lambda tensors: tensors.pop("a.weight"))
    with pytest.raises(UserError, match=r"verification failed: tensor a.weight is missing from the output"):
        verify(written)


def test_a_wrong_shape_is_found(written):
    edit(written, lambda tensors: tensors.update({"a.weight": torch.ones(2, 3)}))
    with pytest.raises(UserError, match=r"a.weight has shape \[2, 3\], expected \[3, 2\]"):
        verify(written)


def test_another_vocabulary_passes_only_where_it_was_aligned(written):
    edit(written, lambda tensors: tensors.update({"embed": torch.ones(7, 2)}))
    with pytest.raises(UserError, match=r"embed has shape \[7, 2\], expected \[6, 2\]"):
        verify(written)
    verify(written, aligned=True)
    edit(written, lambda tensors: tensors.update({"embed": torch.ones(7, 3)}))
    with pytest.raises(UserError, match=r"embed has shape \[7, 3\], expected \[7, 2\]"):
        verify(written, aligned=True)


@pytest.mark.parametrize("keep", [0, 50, -4])
def test_a_truncated_file_is_found(written, keep):
    file = written / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model.safetensors: not a complete safetensors file"):
        verify(written)


def test_a_missing_shard_is_found(written):
    (written / "model.safetensors").rename(written / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(SHAPES, "model-00001-of-00002.safetensors")
    weight_map["b.weight"] = "model-00002-of-00002.safetensors"
    (written / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors: no such file"):
        verify(written)
    weight_map["b.weight"] = "model-00001-of-00002.safetensors"
    (written / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    verify(written)
    weight_map["c.weight"] = "model-00001-of-00002.safetensors"
    (written / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"promises tensor c.weight, but no shard holds it"):
        verify(written)


def test_missing_files_are_found(written):
    (written / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights in it"):
        verify(written)
    (written / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json was not written completely"):
        verify(written)
    (written / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json was not written completely"):
        verify(written)


def test_pickled_output_is_verified_too(written):
    tensors = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    torch.save(tensors, written / "pytorch_model.bin")
    verify(written, safe_serialization=False)
    del tensors["b.weight"]
    torch.save(tensors, written / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"tensor b.weight is missing"):
        verify(written, safe_serialization=False)
    (written / "pytorch_model.bin").write_bytes((written / "pytorch_model.bin").read_bytes()[:-40])
    with pytest.raises(UserError, match=r"pytorch_model.bin: cannot be read back"):
        verify(written, safe_serialization=False)
