"""`mergekit-neuron merge` as a user runs it; and mergekit's own commands with our method."""

import json
import os
import re
import shutil

import pytest
import torch
import yaml

from tests.support.checkpoints import configuration, read
from tests.support.commands import run
from tests.support.merges import EXPERTS, same


@pytest.fixture(scope="module")
def merged(checkpoints, tmp_path_factory):
    """A folder with a family and what one run of the command made of it, with the run itself."""
    folder = tmp_path_factory.mktemp("run") / "work"
    shutil.copytree(checkpoints("llama-tied"), folder)
    (folder / "merge.yaml").write_text(configuration(dtype="bfloat16"))
    done = run(
        "mergekit-neuron",
        "merge",
        "merge.yaml",
        "nested/out",
        "--profile-out",
        "profile.json",
        folder=folder,
        preexec_fn=lambda: os.umask(0o027),
        PYTHONHASHSEED="1",
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_command_leaves_a_model(merged):
    folder, _ = merged
    out = folder / "nested" / "out"
    assert sorted(os.listdir(out)) == [
        ".mergekit-neuron.json",
        "README.md",
        "config.json",
        "generation_config.json",
        "mergekit_config.yml",
        "model.safetensors",
    ]
    assert len(read(out)) == 20
    assert os.listdir(folder / "nested") == ["out"]
    assert json.loads((folder / "profile.json").read_text())["format"] == "mergekit-neuron/trim-profile"


def test_files_have_ordinary_permissions(merged):
    out = merged[0] / "nested" / "out"
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}
    assert out.stat().st_mode & 0o777 == 0o750


def test_the_command_shows_progress_with_names_and_a_summary(merged):
    _, done = merged
    bars = set(re.findall(r"^([A-Z][^:]*): 0 of \d+ tensors", done.stderr, re.MULTILINE))
    assert "\r" not in done.stderr  # which is no terminal
    assert bars == {"Measuring trim thresholds", "Merging tensors"} or bars == {
        "Measuring trim thresholds",
        "Measuring the last bits of the thresholds",
        "Merging tensors",
    }
    assert "deprecated" not in done.stderr
    assert "arning" not in done.stderr
    for part in ("tensors, ", "read, ", "written, ", "sigma", "automatic lambda_orthogonal", "% parallel"):
        assert part in done.stdout
    assert done.stdout.endswith("complete and verified: nested/out\n")


def test_another_process_gives_the_same_bytes(merged):
    folder, _ = merged
    done = run(
        "mergekit-neuron", "merge", "merge.yaml", "again", "--quiet", "-j", "1", folder=folder, PYTHONHASHSEED="2"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for name in ("model.safetensors", "config.json", "mergekit_config.yml"):
        assert (folder / "again" / name).read_bytes() == (folder / "nested" / "out" / name).read_bytes()
    first, second = ((folder / out / "README.md").read_text() for out in ("nested/out", "again"))
    assert first.replace("# out", "# again") == second


@pytest.mark.parametrize("command", ["mergekit-yaml", "mergekit-multi"])
def test_mergekits_own_commands_give_the_same_tensors(merged, command, tmp_path):
    folder, _ = merged
    expected = read(folder / "nested" / "out")
    if command == "mergekit-yaml":
        done = run(command, "merge.yaml", tmp_path / "out", folder=folder)
        assert done.returncode == 0, done.stderr
        assert same(read(tmp_path / "out"), expected)
        assert (tmp_path / "out" / "README.md").exists()
        return
    stages = [
        {"name": "stage", **yaml.safe_load(configuration(dtype="bfloat16"))},
        {
            "merge_method": "neuro_merging",
            "base_model": "base",
            "models": [{"model": "stage"}],
            "parameters": {"density": 0.5},
        },
    ]
    (folder / "multi.yaml").write_text(yaml.safe_dump_all(stages))
    arguments = ("multi.yaml", "--out-path", tmp_path / "final", "-I", "stages")
    done = run(command, *arguments, folder=folder)
    assert done.returncode == 0, done.stderr
    assert same(read(folder / "stages" / "stage"), expected)
    final, stage, base = read(tmp_path / "final"), read(folder / "stages" / "stage"), read(folder / "base")
    assert final.keys() == stage.keys()
    assert not same(final, stage)
    assert not same(final, base)


def test_mergekit_pytorch_knows_the_method(merged, tmp_path):
    folder, _ = merged
    files = {name: {"model": f"{name}/model.safetensors"} for name in ("base", *EXPERTS)}
    source = configuration(
        base_model=files["base"]["model"], models=[files[name] for name in EXPERTS], dtype="bfloat16"
    )
    (folder / "files.yaml").write_text(source)
    done = run("mergekit-pytorch", "files.yaml", tmp_path / "out", folder=folder)
    assert done.returncode == 0, done.stderr
    for name, tensor in read(folder / "nested" / "out").items():
        torch.testing.assert_close(read(tmp_path / "out")[name], tensor, atol=0, rtol=2**-7, msg=name)
