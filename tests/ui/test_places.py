"""Where a page that others reach may read: in its directory, and on the Hub; nowhere else, however it is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neuron_methods.support.errors import UserError
from neuron_methods.ui.places import Root

OUTSIDE = "is outside of the page's directory"


@pytest.fixture
def root(tmp_path, monkeypatch):
    for name in ("root/model", "root/adapter", "secret"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "root/link").symlink_to(tmp_path / "secret")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "secret")}
    (tmp_path / "root/adapter/adapter_config.json").write_text(json.dumps(adapter))
    monkeypatch.chdir(tmp_path / "root")
    monkeypatch.setenv("HOME", str(tmp_path))
    return Root((tmp_path / "root").resolve(), closed=True)


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc", "link", "~/secret", "model/../../secret", "model+../secret", "../secret@main", "adapter"],
)
def test_nothing_outside_is_a_model(root, name):
    with pytest.raises(UserError, match=OUTSIDE):
        root.check_model(name, "base")


@pytest.mark.parametrize(
    "text",
    [
        "models: [model: ../secret]",
        "models: [model: {model: {path: model}, lora: {path: /etc}}]",
        "base_model: adapter",
        "parameters: {profile: ../secret/x.json}",
        "models: [{model: model, parameters: {profile: link/x.safetensors}}]",
        "tokenizer: {source: ../secret}",
        "groups: [{../secret: 1}]",
    ],
)
def test_nothing_outside_is_named_in_a_yaml(root, text):
    with pytest.raises(UserError, match=OUTSIDE):
        root.check_yaml(text, "the YAML")


def test_what_is_inside_is_taken(root):
    root.check_model("model", "base")
    root.check_yaml("merge_method: ties\nmodels: [model: model]\nparameters: {density: 0.5}\n", "the YAML")
    assert root.path("new/out", "output") == root.place / "new/out"
    for out in ("../out", "link/out", "/tmp/out"):
        with pytest.raises(UserError, match=OUTSIDE):
            root.path(out, "output")


def test_an_open_page_reads_anywhere(tmp_path):
    root = Root(tmp_path)
    root.check_model("/etc", "base")
    root.check_yaml("models: [model: ../secret]", "the YAML")
    assert root.path("/tmp/out", "output") == Path("/tmp/out")
    with pytest.raises(UserError, match="output: name a directory"):
        root.path(" ", "output")
