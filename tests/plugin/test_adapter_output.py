"""A merge that comes out as an adapter is held to what is promised of every output: checked, verified, told of."""

import collections
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from neuron_methods.adapters import export
from neuron_methods.cli import main
from tests.support.checkpoints import configuration, edit, read

UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"
EXPERTS = ("expert-a", "expert-b")


def invoke(*options, out="out", code=0, method="neuro_merging", **keys):
    Path("merge.yaml").write_text(configuration(method, **keys))
    result = CliRunner().invoke(main, ["merge", "merge.yaml", out, "--as-adapter", *options])
    assert result.exit_code == code, result.output
    return result


def refused(*options, **keys):
    """The one line of an error; nothing is left behind."""
    Path("merge.yaml").write_text("")
    before = sorted(os.listdir())
    result = invoke("--quiet", *options, code=1, **keys)
    assert sorted(os.listdir()) == before
    (line,) = result.stderr.splitlines()
    return line


def test_the_summary_says_that_it_is_verified(workspace):
    workspace("llama-tied")
    assert invoke().stdout.endswith("  complete and verified: out\n")


def test_a_disk_without_room_is_seen_before_the_merge(workspace, monkeypatch):
    folder = workspace("llama-tied")
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9, 1000))
    # Ranks are as many as the smaller side has at most. Embedding 40 × 16; per layer two matrices of 16 × 16, two of
    # 8 × 16 and three of 24 × 16; five norms of 16, stored whole.
    entries = 16 * 56 + 2 * (2 * 16 * 32 + 2 * 8 * 24 + 3 * 16 * 40) + 5 * 16
    assert refused() == (
        f"error: {folder}: {4 * entries / 1000:.1f} kB to write, 1.0 kB free; make room or choose another disk"
    )
    # By rank 2, at 16 bits.
    entries = 2 * 56 + 2 * (2 * 2 * 32 + 2 * 2 * 24 + 3 * 2 * 40) + 5 * 16
    assert f"{2 * entries / 1000:.1f} kB to write" in refused("--rank", "2", "--adapter-dtype", "bfloat16")


def test_a_disk_that_runs_full_leaves_what_is_finished_and_no_adapter(workspace, monkeypatch):
    folder = workspace("llama-tied")
    Path("merge.yaml").write_text("")

    def full(*_args, **_keys):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model")

    before = sorted(os.listdir())
    with monkeypatch.context() as patch:
        patch.setattr(export, "save_file", full)
        kept, line = invoke("--quiet", code=1).stderr.splitlines()
    assert line.startswith("error: out: no space left on the disk, or for a file (")
    assert kept.endswith("tensors, kept; the same command with --resume goes on")
    assert sorted(os.listdir()) == sorted([".out.unfinished", *before])
    invoke("--quiet", "--resume")
    assert sorted(os.listdir(folder)) == sorted([*before, "out"])


def after_writing(monkeypatch, damage):
    """Let `damage` have the directory once the adapter is written."""
    write = export.AdapterBuilder.write

    def write_and_damage(self, directory, *args, **keys):
        summary = write(self, directory, *args, **keys)
        damage(directory)
        return summary

    monkeypatch.setattr(export.AdapterBuilder, "write", write_and_damage)


A, B = (f"base_model.model.{UP.removesuffix('weight')}lora_{part}.weight" for part in "AB")
TENSORS = {
    "one less": (lambda tensors: tensors.pop(B), f"{B} is missing from the output"),
    "one more": (
        lambda tensors: tensors.update({A.replace("1", "7"): torch.zeros(2, 2)}),
        f"{A.replace('1', '7')} is in the output, and not of this merge",
    ),
    "another shape": (
        lambda tensors: tensors.update({A: tensors[A].T.contiguous()}),
        f"{A} has shape [16, 8], expected [8, 16]",
    ),
    "another dtype": (lambda tensors: tensors.update({A: tensors[A].half()}), f"{A} is float16, expected float32"),
}


@pytest.mark.parametrize("damage", TENSORS)
def test_every_tensor_is_read_back(workspace, monkeypatch, damage):
    workspace("llama-tied")
    change, message = TENSORS[damage]

    def rewrite(directory):
        tensors = read(directory)
        change(tensors)
        save_file(tensors, directory / "adapter_model.safetensors")

    after_writing(monkeypatch, rewrite)
    assert refused("--rank", "8") == f"error: verification failed: {message}"


def test_a_truncated_file_is_found(workspace, monkeypatch):
    workspace("llama-tied")
    after_writing(monkeypatch, lambda directory: os.truncate(directory / "adapter_model.safetensors", 2000))
    assert "adapter_model.safetensors: not a complete safetensors file" in refused()


CONFIGS = {
    "cut short": (lambda config: "{", "adapter_config.json was not written completely"),
    "without type": (
        lambda config: json.dumps({**config, "peft_type": None}),
        "adapter_config.json was not written completely",
    ),
    "for other modules": (
        lambda config: json.dumps({**config, "target_modules": ["q_proj"]}),
        "peft would not find a place for base_model.model.",
    ),
    "for more tensors": (
        lambda config: json.dumps({**config, "use_dora": True}),
        "peft would miss base_model.model.",
    ),
    "of another rank": (
        lambda config: json.dumps({**config, "r": 3, "rank_pattern": {}, "alpha_pattern": {}}),
        "peft would take base_model.model.",
    ),
}


@pytest.mark.parametrize("damage", CONFIGS)
def test_peft_could_load_it(workspace, monkeypatch, damage):
    workspace("llama-tied")
    change, message = CONFIGS[damage]

    def rewrite(directory):
        place = directory / "adapter_config.json"
        place.write_text(change(json.loads(place.read_text())))

    after_writing(monkeypatch, rewrite)
    assert refused("--rank", "8").startswith(f"error: verification failed: {message}")


def test_what_the_method_found_is_told(workspace):
    workspace("llama-tied")
    assert "  expert-a: keeps 25 of 48 MLP neurons (52.1%)\n" in invoke(method="min_merging").stdout
    assert "  sigma 0." in invoke(out="other").stdout


def test_what_the_plan_noted_is_told(workspace):
    edit(workspace("llama-tied") / "expert-b", lambda tensors: tensors.update(value_head=torch.ones(2)))
    note = "left out, as only expert-b stores them and no method merges them: value_head\n"
    assert f"  {note}" in invoke().stdout
    assert invoke("--quiet", out="quiet").stderr == f"note: {note}"


def test_nonfinite_values_that_are_allowed_are_told_of(workspace):
    edit(workspace("llama-tied") / "expert-b", lambda tensors: tensors[NORM].__setitem__(3, float("nan")))
    assert f"{NORM}: NaN or Inf in expert-b" in refused(method="task_arithmetic", parameters={"weight": 0.5})
    told = invoke("--allow-nonfinite", method="task_arithmetic", parameters={"weight": 0.5}).stdout
    assert f"  NaN or Inf in the output, as --allow-nonfinite has it: {NORM}\n" in told
    stored = next(t for name, t in read(Path("out")).items() if name.endswith(NORM))
    assert stored.isnan().nonzero().tolist() == [[3]]


def test_nonfinite_values_cannot_be_factored(workspace):
    edit(workspace("llama-tied") / "expert-b", lambda tensors: tensors[UP].__setitem__((2, 3), float("inf")))
    line = refused("--allow-nonfinite", method="task_arithmetic", parameters={"weight": 0.5})
    assert line.startswith(f"error: {UP}: the merged update holds NaN or Inf")


def test_thresholds_are_written_on_request(workspace):
    workspace("llama-tied")
    invoke("--profile-out", "profile.json")
    assert json.loads(Path("profile.json").read_text())["format"] == "mergekit-neuron/trim-profile"
    parameters = {"profile": "profile.json"}
    invoke("--profile-out", "again/within.json", out="again", parameters=parameters)
    assert Path("again/within.json").read_text() == Path("profile.json").read_text()
    keys = {"method": "task_arithmetic", "parameters": {"weight": 0.5}}
    assert "measures no trim profile" in refused("--profile-out", "other.json", out="other", **keys)
