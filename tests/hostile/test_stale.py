"""What was measured or kept of files that have changed since is not gone on with; nor is a merge that saw both."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from neuron_methods.cli import main
from neuron_methods.plugin.session import MergeSession
from tests.support import routed, tiny

_MODELS = {"base_model": "base", "models": [{"model": "expert-a"}, {"model": "base+lora"}], "dtype": "float32"}
_TASK = {"name": "p", "kind": "perplexity", "data": {"source": "a.jsonl", "split": "[:4]", "validation_split": "[4:]"}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tiny.save_experts(tmp_path_factory.mktemp("models"))
    routed.save_adapter(folder / "base", "llama", folder / "lora", 3)
    tiny.write_texts(folder / "a.jsonl", 8)
    tiny.write_texts(folder / "b.jsonl", 8, 1)
    write(folder / "merge.yml", {"merge_method": "neuro_merging", **_MODELS})
    write(folder / "tasks.yml", {"tasks": [_TASK]})
    return folder


def write(path, content):
    path.write_text(yaml.safe_dump(content))


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def refused(*arguments):
    (line,) = [text for text in run(*arguments, code=1).stderr.splitlines() if text.startswith("error: ")]
    assert "unexpected" not in line
    return line


def retrain(name):
    """Other weights of the same shapes in the same file, which gets its old time back."""
    (file,) = Path(name).glob("*.safetensors")
    times = os.stat(file)
    save_file({key: 1.5 * tensor for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(("model", "told"), [("expert-a", "expert-a"), ("base", "the base"), ("lora", "base+lora")])
def test_thresholds_of_other_weights(place, model, told):
    run("merge", "merge.yml", "out", "--quiet", "--profile-out", "t.json")
    write(Path("again.yml"), {"merge_method": "neuro_merging", **_MODELS, "parameters": {"profile": "t.json"}})
    run("merge", "again.yml", "again", "--quiet")
    retrain(model)
    assert f"profile t.json: {told} has other weights now" in refused("merge", "again.yml", "third", "--quiet")


def test_groups_and_profiles_of_other_weights(place):
    data = ("--data", "a=a.jsonl:text", "--data", "b=b.jsonl:text")
    run("profile", "base", *data, "-o", "base.safetensors")
    run("groups", "base.safetensors", "-o", "g.json")
    run("profile", "expert-a", *data, "-o", "expert.safetensors")
    experts = [
        {"model": name, "parameters": {"group": group}} for name, group in (("expert-a", "a"), ("expert-b", "b"))
    ]
    common = {"base_model": "base", "dtype": "float32"}
    write(
        Path("g.yml"), {**common, "merge_method": "neuron_merge", "models": experts, "parameters": {"groups": "g.json"}}
    )
    own = {"importance": "activation", "profile": "expert.safetensors"}
    write(
        Path("p.yml"), {**common, "merge_method": "min_merging", "models": [{"model": "expert-a", "parameters": own}]}
    )
    shutil.copytree("base", "elsewhere/base")  # a copy holds the same
    run("merge", "g.yml", "one", "--quiet")
    run("merge", "p.yml", "two", "--quiet")
    retrain("base")
    assert "groups g.json: base has other weights now" in refused("merge", "g.yml", "three", "--quiet")
    run("merge", "p.yml", "four", "--quiet")
    retrain("expert-a")
    assert "profile expert.safetensors: expert-a has other weights now" in refused("merge", "p.yml", "five", "--quiet")
    assert "made otherwise (model's place or files)" in refused(
        "profile", "expert-a", *data, "-o", "expert.safetensors"
    )


def test_a_profile_goes_on_with_data_as_it_was(place):
    run("profile", "base", "--data", "a=a.jsonl:text", "-o", "p.safetensors")
    tiny.write_texts(Path("a.jsonl"), 8, 5)
    line = refused("profile", "base", "--data", "a=a.jsonl:text", "--data", "b=b.jsonl:text", "-o", "p.safetensors")
    assert "a.jsonl:text has changed since 'a' was measured on it" in line
    run("profile", "base", "--data", "a=a.jsonl:text", "-o", "p.safetensors", "--force")
    assert "already in" in run("profile", "base", "--data", "a=a.jsonl:text", "-o", "p.safetensors").output


@pytest.mark.parametrize("what", ["expert-a", "lora", "adapter_config.json", "a.jsonl", "merge.yml"])
def test_a_search_knows_its_inputs(place, what):
    search = ("tune", "merge.yml", "--task", "tasks.yml", "-q", "--search", "density=0.1", "-o", "out")
    run(*search)
    if what == "adapter_config.json":
        config = json.loads(Path("lora", what).read_text())
        Path("lora", what).write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * 2}))
    elif what == "a.jsonl":
        tiny.write_texts(Path("a.jsonl"), 8, 5)
    elif what == "merge.yml":
        write(Path("merge.yml"), {"merge_method": "neuro_merging", **_MODELS, "parameters": {"trim": "tensor"}})
    else:
        retrain(what)
    assert "holds a search with another" in refused(*search)
    run(*search, "--force")
    assert "0 points tried" in run(*search).output


@pytest.mark.parametrize(
    "what", ["expert-a/model.safetensors", "lora/adapter_config.json", "merge.yml", "base/tokenizer.json"]
)
def test_an_input_that_changes_during_a_merge(place, monkeypatch, what):
    close = MergeSession.close

    def change(session):
        with Path(what).open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b" }" if what.endswith("n") else b"\n\n")
        close(session)

    monkeypatch.setattr(MergeSession, "close", change)
    before = sorted(os.listdir())
    assert f"{what}: changed while it was read" in refused("merge", "merge.yml", "out", "--quiet")
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("what", ["expert-a/model.safetensors", "lora/adapter_model.safetensors"])
def test_a_file_that_is_cut_short_during_a_merge(place, monkeypatch, what):
    """Looked at through a map of its memory, it would end the process."""
    merging, seen = MergeSession.merging, []

    def cut(session, name, tensors):
        seen.append(name)
        if len(seen) == 2:
            os.truncate(what, os.path.getsize(what) - 8)
        return merging(session, name, tensors)

    monkeypatch.setattr(MergeSession, "merging", cut)
    before = sorted(os.listdir())
    assert f"{what}: was cut short or removed" in refused("merge", "merge.yml", "out", "--quiet")
    assert sorted(os.listdir()) == before
