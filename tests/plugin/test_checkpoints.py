"""What is read of a checkpoint is what transformers would load of it, whatever lies beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuron_methods.support.errors import UserError
from tests.support.checkpoints import build, configuration, read, save
from tests.support.commands import run
from tests.support.merges import EMBEDDING, EXPERTS, UP, merge, merged, same

FAMILY = "llama-untied"


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """As transformers loads it, without a word of complaint."""
    model, found = build(FAMILY).from_pretrained(path, output_loading_info=True)
    assert not any(found.values()), found
    return model.state_dict()


def mean(folder: Path) -> dict[str, torch.Tensor]:
    one, other = (loaded(folder / name) for name in EXPERTS)
    return {name: 0.75 * one[name] + 0.25 * other[name] for name in one}


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0, msg=name)


def stale_index(expert: Path, *, shards: bool) -> None:
    """Shards and an index of older weights, beside the newer single file."""
    newer = (expert / "model.safetensors").read_bytes()
    save(build(FAMILY, seed=9), expert, max_shard_size="8KB")
    (expert / "model.safetensors").write_bytes(newer)
    assert (expert / "model.safetensors.index.json").is_file()
    for shard in () if shards else expert.glob("model-*.safetensors"):
        shard.unlink()


@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize("command", ["ours", "mergekit-yaml"])
def test_a_single_file_comes_before_an_index(workspace, command: str, shards: bool) -> None:
    folder = workspace(FAMILY)
    stale_index(folder / "expert-a", shards=shards)
    stale_index(folder / "expert-b", shards=shards)
    Path("merge.yaml").write_text(configuration("linear"))
    if command == "ours":
        merge(configuration("linear"))
    else:
        result = run(command, "merge.yaml", "out", folder=folder)
        assert result.returncode == 0, result.stderr
    close(read(Path("out")), mean(folder))


def test_the_base_too(workspace) -> None:
    folder = workspace(FAMILY)
    expected = merged(out="expected")
    stale_index(folder / "base", shards=True)
    assert same(merged(), expected)


@pytest.mark.parametrize("named", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
def test_a_tensor_in_two_shards_is_the_one_that_transformers_takes(workspace, named: str) -> None:
    folder = workspace(FAMILY)
    expert = folder / "expert-a"
    tensors = load_file(expert / "model.safetensors")
    (expert / "model.safetensors").unlink()
    half = len(tensors) // 2
    parts = dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])
    for part, value in zip(parts, (3.0, 4.0), strict=True):
        part[UP] = torch.full_like(tensors[UP], value)
    index = {}
    for number, part in enumerate(parts, 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file(part, expert / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    index[UP] = named
    index.pop(EMBEDDING)  # of which only the shard knows
    (expert / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert loaded(expert)[UP].unique().tolist() == [4.0]
    close(merged(configuration("linear")), mean(folder))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("models", [("expert-a",), ("base", *EXPERTS)])
def test_names_as_wrappers_leave_them(workspace, prefix: str, models: tuple[str, ...]) -> None:
    folder = workspace(FAMILY)
    expected = merged(out="expected")
    for name in models:
        file = folder / name / "model.safetensors"
        save_file({prefix + key: value for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    summary = merge()
    assert same(read(Path("out")), expected)
    for name in models:
        assert any(note.startswith(f"{name}: read without ") and prefix[:-1] in note for note in summary.notes) or (
            prefix.count(".") > 1
        )


def test_names_of_a_compiled_part(workspace) -> None:
    folder = workspace(FAMILY)
    expected = merged(out="expected")
    file = folder / "expert-a" / "model.safetensors"
    renamed = {key.replace("mlp.", "mlp._orig_mod."): value for key, value in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    summary = merge()
    assert same(read(Path("out")), expected)
    assert any("expert-a: read without _orig_mod. (of torch.compile)" in note for note in summary.notes)


def test_a_training_checkpoint_is_called_what_it_is(workspace) -> None:
    expert = workspace(FAMILY) / "expert-a"
    tensors = load_file(expert / "model.safetensors")
    (expert / "model.safetensors").unlink()
    torch.save({"state_dict": tensors, "step": 3}, expert / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"expert-a/pytorch_model.bin: a training checkpoint .* 'state_dict'"):
        merge(lazy_unpickle=True)
    torch.save(torch.load(expert / "pytorch_model.bin")["state_dict"], expert / "pytorch_model.bin")  # the cure
    merge(lazy_unpickle=True)
