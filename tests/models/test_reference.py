"""MODEL as a user writes it: its parts, what it is called, and which names mean one model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from neuron_methods.models.reference import ModelName, Place, is_adapter, looks_local, same_model
from neuron_methods.support.errors import UserError


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def directory(path: Path, config: str = "config.json", **content: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / config).write_text(json.dumps(content))
    return path


def adapter(path: Path, base: object, **content: Any) -> Path:
    return directory(path, "adapter_config.json", peft_type="LORA", base_model_name_or_path=base, **content)


def model(path: Path, changed: str = "") -> Path:
    """A directory with weights, the same everywhere but for one small tensor."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(300, 300, generator=generator) for name in ("layers.0.weight", "layers.1.weight")}
    tensors["layers.1.bias"] = torch.zeros(3)
    if changed:
        tensors[changed] += 1
    save_file(tensors, directory(path) / "model.safetensors")
    return path


def test_the_parts_of_a_name(tmp_path: Path) -> None:
    assert ModelName.parse("org/model") == ModelName(Place("org/model"))
    assert ModelName.parse("org/model@v1+org/lora@v2") == ModelName(Place("org/model", "v1"), Place("org/lora", "v2"))
    odd = directory(tmp_path / "a+b@c")
    assert ModelName.parse(str(odd)) == ModelName(Place(str(odd)))
    base = directory(tmp_path / "base")
    assert ModelName.parse(f"{base}+org/lora@v2").shown == "base+org/lora@v2"
    for text in ("+lora", "base+", "a+b+c", "org/model@", "@v1", "org/model@v1@v2", f"{base}@v1"):
        with pytest.raises(UserError, match=r"model '.*': .*(expected|no revisions)"):
            ModelName.parse(text)


def test_names_of_files_tell_models_of_one_name_apart(tmp_path, monkeypatch):
    for name in ("work/base", "work/german/adapter", "work/python/adapter", "elsewhere/base"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    names = {
        "base": "base",
        "./base/": "base",
        ".": "work",
        "base+german/adapter": "base+german--adapter",
        "base+./python/adapter": "base+python--adapter",
        "german/adapter": "german--adapter",
        "../elsewhere/base": "base",
        str(tmp_path / "work" / "python" / "adapter"): "python--adapter",
        "org/model@v1+org/lora": "org--model@v1+org--lora",
    }
    assert {text: ModelName.parse(text).file_name for text in names} == names


@pytest.mark.parametrize("named", ["{base}", "base", "./base", "../base"])
def test_an_adapter_by_itself_stands_on_the_base_it_names(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = directory(tmp_path / "base")
    lora = adapter(tmp_path / "lora", named.format(base=base))
    if not named.startswith(".."):
        monkeypatch.chdir(tmp_path)
    found = ModelName.find(str(lora))
    assert os.path.realpath(found.base.path) == str(base) and found.adapter == Place(str(lora))
    assert ModelName.find(f"org/other+{lora}").base == Place("org/other")  # said in so many words
    assert ModelName.find(str(base)) == ModelName(Place(str(base)))


def test_the_base_of_an_adapter_by_itself_may_be_a_repository_or_not_to_be_had(tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", "org/model", revision="v1")
    assert ModelName.find(str(lora)).base == Place("org/model", "v1")
    for base, says in ((None, "names no base"), ("/gone/base", "no such directory here")):
        with pytest.raises(UserError, match=f"{lora}: its adapter_config.json .*{says}"):
            ModelName.find(str(adapter(tmp_path / "lora", base)))


def test_a_fingerprint_changes_with_the_place_and_with_the_files(tmp_path: Path) -> None:
    base, copy = model(tmp_path / "base"), model(tmp_path / "copy")

    def of(text: object) -> str:
        return ModelName.parse(str(text)).fingerprint

    before = of(base)
    assert before == of(f"{copy}/../base") and len({before, of(copy), of(f"{base}+{copy}"), of("org/base")}) == 4
    assert of("org/base") != of("org/base@v1")
    model(tmp_path / "base", changed="layers.1.bias")
    os.utime(base / "model.safetensors", ns=(1, 1))
    assert of(base) != before


def test_what_can_only_be_local() -> None:
    assert all(map(looks_local, ["./a", "../a", "/a", "~/a", "a/b/c", "a/", "a/b/"]))
    assert not any(map(looks_local, ["a", "a/b", "gpt2"]))


@pytest.mark.parametrize(
    ("found", "wanted", "verdict"),
    [
        ("org/model", "org/model", True),
        ("Org/Model", "org/model", True),
        ("org/model", "other/model", False),
        ("org/model", "org/model-2", False),
        ("{base}", "{base}/", True),
        ("{base}", "{link}", True),
        ("{base}", "{copy}", True),
        ("{base}", "{tuned}", False),
        ("{base}", "{empty}", False),
        ("{empty}", "{emptied}", False),
        ("../base", "{base}", True),
        ("org/base", "{base}", None),
        ("org/model", "{base}", False),
        ("/gone/base", "{base}", None),
        ("/gone/base", "org/base", None),
        ("/gone/base", "org/model", False),
        ("org/base", "{cache}", True),
        ("/gone/base", "{cache}", None),
        ("org/other", "{cache}", False),
    ],
)
def test_same_model(found: str, wanted: str, verdict: bool | None, tmp_path: Path) -> None:
    places = {
        "base": model(tmp_path / "base"),
        "copy": model(tmp_path / "elsewhere" / "base"),
        "tuned": model(tmp_path / "tuned" / "base", changed="layers.1.bias"),
        "empty": directory(tmp_path / "empty" / "base"),
        "emptied": directory(tmp_path / "emptied" / "base"),
        "link": tmp_path / "link",
        "cache": directory(tmp_path / "hub" / "models--Org--base" / "snapshots" / "abc123"),
    }
    places["link"].symlink_to(places["base"])
    lora = directory(tmp_path / "lora")
    assert same_model(found.format(**places), wanted.format(**places), str(lora)) is verdict


def test_what_an_adapter_is(tmp_path: Path) -> None:
    both = adapter(directory(tmp_path / "both"), "org/model")
    assert is_adapter(str(both))  # a training directory with the model's config
    (both / "model.safetensors.index.json").write_text("{}")
    assert not is_adapter(str(both))  # but its weights make it a model
    assert not is_adapter(str(directory(tmp_path / "model")))
    assert not is_adapter("no-such/repository")
