"""neuron_response gives the same merge whichever command of mergekit's runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from mergekit.merge_methods import merge_state_dicts

from tests.support.checkpoints import configuration, read
from tests.support.commands import run
from tests.support.merges import merged, same

KEYS = {
    "gradients and filters": {
        "parameters": {"ridge": [0.05, 0.5], "toward": [{"filter": "mlp", "value": "sum"}, {"value": "mean"}]}
    },
    "orthogonal": {"parameters": {"subspace": "orthogonal", "lambda": 0.8}},
}


@pytest.mark.parametrize("keys", KEYS)
def test_mergekits_commands_give_the_same(workspace, keys):
    folder = workspace("llama-tied")
    source = configuration("neuron_response", **KEYS[keys])
    ours = merged(source)
    assert same(ours, merged(source, "again"))
    assert not same(ours, read(folder / "base"))
    Path("merge.yaml").write_text(source)
    Path("multi.yaml").write_text(yaml.safe_dump({"name": "stage", **yaml.safe_load(source)}))
    for command, *arguments in (
        ("mergekit-yaml", "merge.yaml", "by-yaml"),
        ("mergekit-multi", "multi.yaml", "--out-path", "by-multi", "-I", "stages"),
    ):
        done = run(command, *arguments, folder=folder)
        assert done.returncode == 0, done.stderr
    assert same(read(Path("by-yaml")), ours)
    assert same(read(Path("stages/stage")) if Path("stages/stage").exists() else read(Path("by-multi")), ours)


def test_merges_of_files_and_of_tensors_give_the_same(workspace):
    folder = workspace("llama-tied")
    ours = merged(configuration("neuron_response"))
    files = {name: {"model": f"{name}/model.safetensors"} for name in ("base", "expert-a", "expert-b")}
    Path("files.yaml").write_text(
        configuration("neuron_response", base_model=files.pop("base")["model"], models=list(files.values()))
    )
    done = run("mergekit-pytorch", "files.yaml", "by-files", folder=folder)
    assert done.returncode == 0, done.stderr
    assert same(read(Path("by-files")), ours)
    models = {name: read(folder / name) for name in ("base", "expert-a", "expert-b")}
    in_memory = merge_state_dicts(models, "neuron_response", base="base")
    for name, tensor in ours.items():
        torch.testing.assert_close(in_memory[name], tensor, atol=1e-7, rtol=0, msg=name)
