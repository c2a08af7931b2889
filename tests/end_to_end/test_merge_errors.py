"""Errors of `mergekit-neuron merge`: one line, exit code 1, nothing left behind."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from neuron_methods.cli import main
from tests.support.checkpoints import build, configuration, edit, fine_tune, save
from tests.support.commands import refused
from tests.support.merges import UP, spoil

ACCIDENTS = {
    "a model that is not there": (
        "llama-tied",
        lambda folder: shutil.rmtree(folder / "expert-a"),
        "error: model expert-a: no such directory here",
    ),
    "a directory without weights": (
        "llama-tied",
        lambda folder: os.remove(folder / "expert-a" / "model.safetensors"),
        "error: model expert-a: no weights in it",
    ),
    "a directory without config": (
        "llama-tied",
        lambda folder: os.remove(folder / "base" / "config.json"),
        "error: model base: the directory has no config.json",
    ),
    "a truncated file": (
        "llama-tied",
        lambda folder: os.truncate(folder / "expert-a" / "model.safetensors", 5000),
        "error: expert-a/model.safetensors: not a complete safetensors file",
    ),
    "a missing tensor": (
        "llama-tied",
        lambda folder: edit(folder / "expert-b", lambda tensors: tensors.pop(UP)),
        f"error: expert-b: tensor {UP} is missing from its checkpoint",
    ),
    "another shape": (
        "llama-tied",
        lambda folder: edit(folder / "expert-b", lambda tensors: tensors.update({UP: torch.zeros(3, 16)})),
        f"error: {UP}: shapes differ: expert-b has [3, 16], base has [24, 16]",
    ),
    "another vocabulary": (
        "llama-tied",
        lambda folder: save(fine_tune(build("llama-tied", vocab_size=48), 1), folder / "expert-b"),
        "align them in the YAML with tokenizer: {source: base}",
    ),
    "another number of layers": (
        "llama-tied",
        lambda folder: save(build("llama-tied", num_hidden_layers=1), folder / "expert-b"),
        "the models contribute different numbers of layers",
    ),
    "a bias that the base has alone": (
        "llama-tied",
        lambda folder: save(build("llama-tied", attention_bias=True), folder / "base"),
        "error: expert-a: its layers lack model.layers.{i}.self_attn.q_proj.bias, which those of base have",
    ),
    "another architecture": (
        "llama-tied",
        lambda folder: save(build("vit"), folder / "expert-b"),
        "error: the models are of different architectures",
    ),
    "another feed-forward": (
        "t5-gated",
        lambda folder: save(build("t5-ungated"), folder / "expert-b"),
        "error: expert-b: its layers have encoder.block.{i}.layer.{i}.DenseReluDense.wi.weight",
    ),
    "other classes": (
        "vit",
        lambda folder: save(build("vit", num_labels=7), folder / "expert-b"),
        "error: classifier.weight: the heads differ in shape: base has [3, 16], expert-b has [7, 16]",
    ),
    "NaN in the base": (
        "llama-tied",
        lambda folder: spoil(folder / "base", float("nan")),
        f"error: {UP}: the base model holds NaN or Inf",
    ),
    "Inf in an expert": (
        "llama-tied",
        lambda folder: spoil(folder / "expert-b", float("inf")),
        f"error: {UP}: expert-b holds NaN or Inf",
    ),
    "a tensor that no method would merge": (
        "llama-tied",
        lambda folder: [edit(folder / m, lambda t: t.update(odd=torch.rand(3))) for m in ("base", "expert-a")],
        "error: expert-a: tensor odd differs from that of base",
    ),
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_an_accident_is_told_in_one_line(workspace, monkeypatch, accident):
    family, happen, message = ACCIDENTS[accident]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = workspace(family)
    happen(folder)
    assert message in refused("--quiet")


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_accidents_under_mergekits_methods(workspace, method):
    folder = workspace("llama-tied")
    spoil(folder / "expert-b", float("nan"))
    parameters = {"weight": 0.5, "density": 0.5} if method == "ties" else {}
    assert f"error: {UP}: NaN or Inf in expert-b" in refused("--quiet", method=method, parameters=parameters)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--device", "nonsense"], 1, "error: --device nonsense: no such kind of device"),
        (["--device", "cuda:99"], 1, "error: --device cuda:99: not available here"),
        (["--device", "meta"], 1, "error: --device meta: not available here"),
        (["--out-shard-size", "many"], 2, "Invalid value for '--out-shard-size': 'many' is no size"),
        (["--out-shard-size", ""], 2, "Invalid value for '--out-shard-size'"),
        (["-j", "0"], 2, "Invalid value for '--num-threads' / '-j'"),
        (["--random-seed", "x"], 2, "Invalid value for '--random-seed'"),
        (["--frobnicate"], 2, "No such option"),
        (["second-out"], 2, "unexpected extra argument"),
        (["--profile-out", "none/profile.json"], 1, "error: --profile-out none/profile.json: its directory is missing"),
    ],
)
def test_wrong_options(workspace, options, code, message):
    workspace("llama-tied")
    assert message in refused("--quiet", *options, code=code)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["none.yaml", "out"], 1, "error: none.yaml: cannot be read (No such file or directory)"),
        (["base/model.safetensors", "out"], 1, "error: base/model.safetensors: cannot be read"),
        (["base", "out"], 2, "'base' is a directory"),
        ([], 2, "Missing argument 'CONFIG'"),
        (["merge.yaml"], 2, "Missing argument 'OUT'"),
        (["merge.yaml", "base"], 1, "error: base: is or holds base, which is read"),
        (["merge.yaml", "base", "--force"], 1, "error: base: is or holds base, which is read"),
        (["merge.yaml", "merge.yaml", "--force"], 1, "error: merge.yaml: is or holds merge.yaml, which is read"),
        (["merge.yaml", "merge.yaml/out"], 1, "cannot be written (Not a directory)"),
    ],
)
def test_wrong_arguments(workspace, arguments, code, message):
    workspace("llama-tied")
    Path("merge.yaml").write_text(configuration())
    before = sorted(os.listdir())
    result = CliRunner().invoke(main, ["merge", *arguments])
    assert result.exit_code == code
    assert message in result.stderr
    assert code == 2 or len(result.stderr.splitlines()) == 1
    assert sorted(os.listdir()) == before
