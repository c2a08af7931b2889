"""An output is complete or absent, and so is the profile written with it."""

import json
import os
from pathlib import Path

import pytest

from neuron_methods.plugin.merging import plan_merge
from neuron_methods.support.errors import UserError
from tests.support.checkpoints import (
    configuration,
    read,
)
from tests.support.merges import EXPERTS, UP, close, merge, merged, same, spoil

# --- profiles


def test_a_profile_gives_the_same_bytes(workspace):
    workspace("llama-tied")
    measured = merged(out="measured", profile_out="profile.json")
    source = configuration(parameters={"profile": "profile.json"})
    assert same(merged(source), measured)
    assert not plan_merge(source).measures
    content = json.loads(Path("profile.json").read_text())
    assert content["sigma"] == max(expert["sigma"] for expert in content["experts"])
    merge(source, "again", profile_out="copy.json")
    assert json.loads(Path("copy.json").read_text()) == content


def test_a_profile_per_tensor_gives_the_same_bytes(workspace):
    workspace("llama-tied")
    parameters = {"trim": "tensor", "density": [0.1, 0.5]}
    measured = merged(configuration(parameters=parameters), "measured", profile_out="profile.json")
    assert same(merged(configuration(parameters={**parameters, "profile": "profile.json"})), measured)


def test_a_profile_may_lie_within_the_output(workspace):
    workspace("llama-tied")
    merge(profile_out="out/facts/profile.json")
    assert json.loads(Path("out/facts/profile.json").read_text())["trim"] == "model"


@pytest.mark.parametrize(
    ("method", "parameters", "place", "message"),
    [
        ("linear", {}, "p.json", "linear measures no trim profile"),
        ("neuro_merging", {"trim": "tensor", "lambda_orthogonal": 1}, "p.json", "this merge measures nothing"),
        ("neuro_merging", {}, "none/p.json", "its directory is missing"),
        ("neuro_merging", {}, "base", "a directory; name a file"),
        ("neuro_merging", {}, "out", "a directory; name a file"),
    ],
)
def test_a_profile_that_cannot_be(workspace, method, parameters, place, message):
    folder = workspace("llama-tied")
    with pytest.raises(UserError, match=f"--profile-out.*: .*{message}"):
        merge(configuration(method, parameters=parameters), profile_out=place)
    assert sorted(os.listdir(folder)) == ["base", *EXPERTS]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "truncated, or not valid JSON"),
        ("{}", "not a file of the format 'mergekit-neuron/trim-profile'"),
    ],
)
def test_a_profile_that_is_none(workspace, content, message):
    workspace("llama-tied")
    if content is not None:
        Path("profile.json").write_text(content)
    with pytest.raises(UserError, match=f"profile profile.json: {message}"):
        merge(configuration(parameters={"profile": "profile.json"}))


# --- complete or absent


def test_a_failing_merge_leaves_nothing_and_keeps_the_old_output(workspace):
    folder = workspace("llama-tied")
    merge(out="a/b/out")
    before = {path: path.read_bytes() for path in Path("a/b/out").iterdir()}
    spoil(folder / "expert-b", float("nan"))
    with pytest.raises(UserError):
        merge(out="a/b/out", force=True)
    assert {path: path.read_bytes() for path in Path("a/b/out").iterdir()} == before
    with pytest.raises(UserError):
        merge(out="c/d/out")
    assert sorted(os.listdir(folder)) == ["a", "base", *EXPERTS]
    assert os.listdir("a/b") == ["out"]


def test_force_replaces_the_old_output_whole(workspace):
    workspace("llama-tied")
    merge(out_shard_size=5000)
    with pytest.raises(UserError, match="exists already"):
        merge()
    merge(force=True)
    assert sorted(p.name for p in Path("out").glob("*.safetensors")) == ["model.safetensors"]
    Path("out/notes").write_text("")
    with pytest.raises(UserError, match=r"notes in it is not of mergekit-neuron's making"):
        merge(force=True)


@pytest.mark.parametrize("out", ["base", "expert-a", "."])
def test_force_never_replaces_an_input(workspace, out):
    workspace("llama-tied")
    with pytest.raises(UserError, match=r"which is read|current directory"):
        merge(out=out, force=True)
    assert len(read(Path("base"))) == 20


def test_a_run_again_gives_the_same_bytes_in_any_order_of_the_experts_nearly(workspace):
    workspace("llama-tied")
    first, again = merged(), merged(out="again")
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()
    assert same(first, again)
    close(merged(configuration(models=[{"model": m} for m in EXPERTS[::-1]]), "turned"), first)


def test_the_verification_is_of_what_was_written(workspace, monkeypatch):
    folder = workspace("llama-tied")
    from neuron_methods.plugin.shards import ShardWriter

    original = ShardWriter.save_tensor

    def forgetful(self, name, tensor):
        if name != UP:
            original(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "save_tensor", forgetful)
    with pytest.raises(UserError, match=f"verification failed: tensor {UP} is missing"):
        merge()
    assert sorted(os.listdir(folder)) == ["base", *EXPERTS]
