"""Adapters that stand by themselves in a configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from neuron_methods.adapters.resolve import resolve_adapters
from neuron_methods.support.errors import UserError


def directory(path: Path, config: str = "config.json", **content: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / config).write_text(json.dumps(content))
    return path


def adapter(path: Path, base: object, **content: Any) -> Path:
    base_name = None if base is None else str(base)
    return directory(path, "adapter_config.json", peft_type="LORA", base_model_name_or_path=base_name, **content)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_every_place_where_a_model_may_stand(tmp_path: Path) -> None:
    base = directory(tmp_path / "base")
    lora = str(adapter(tmp_path / "lora", base))
    both = ModelReference.parse(f"{base}+{lora}")
    slices = [{"sources": [{"model": lora, "layer_range": [0, 1]}], "base_model": str(base)}]
    tokens = {"<a>": {"source": lora}, "<b>": {"source": {"kind": "model_token", "model": lora, "token_id": 1}}}
    for content in (
        {"models": [{"model": lora}]},
        {"slices": slices},
        {"modules": {"default": {"slices": slices}}},
        {"modules": {"default": {"models": [{"model": lora}]}}},
    ):
        configuration = MergeConfiguration.model_validate(
            {**content, "merge_method": "ties", "base_model": str(base), "tokenizer": {"tokens": tokens}}
        )
        assert set(configuration.referenced_models()) == {ModelReference.parse(str(base)), both}
        assert lora not in str(configuration.to_yaml()).replace(str(both), "")
        assert configuration.tokenizer.tokens["<a>"].source == both
        assert configuration.tokenizer.tokens["<b>"].source.model == both
        before = configuration.to_yaml()
        assert resolve_adapters(configuration).to_yaml() == before


def test_the_base_is_the_adapter_s_own_where_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = directory(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for found in (str(base), "base", "./base", "../base"):
        lora = adapter(tmp_path / "lora", found)
        configuration = MergeConfiguration.model_validate({"merge_method": "linear", "models": [{"model": str(lora)}]})
        (reference,) = resolve_adapters(configuration).referenced_models()
        assert os.path.realpath(reference.model.path) == os.path.realpath(base)
        assert reference.lora.path == str(lora)
    lora = adapter(tmp_path / "lora", "org/model", revision="v1")
    configuration = MergeConfiguration.model_validate({"merge_method": "linear", "models": [{"model": str(lora)}]})
    (reference,) = resolve_adapters(configuration).referenced_models()
    assert str(reference) == f"org/model@v1+{lora}"


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ("/trained/elsewhere/model", "names the base /trained/elsewhere/model, and there is no such directory here"),
        (None, "names no base"),
    ],
)
def test_a_base_that_is_not_to_be_had(found: str | None, says: str, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", found)
    configuration = MergeConfiguration.model_validate({"merge_method": "linear", "models": [{"model": str(lora)}]})
    with pytest.raises(UserError, match=f"{lora}: its adapter_config.json {says}"):
        configuration.referenced_models()


def test_another_base_is_refused_with_both_names(tmp_path: Path) -> None:
    base, other = directory(tmp_path / "base"), directory(tmp_path / "other")
    lora = adapter(tmp_path / "lora", other)
    configuration = MergeConfiguration.model_validate(
        {"merge_method": "ties", "base_model": str(base), "models": [{"model": str(lora)}]}
    )
    with pytest.raises(UserError, match=rf"names the base {other}, but base_model is {base};.*{base}\+{lora}"):
        configuration.referenced_models()
    # Said in so many words, it is the user's business.
    configuration = MergeConfiguration.model_validate(
        {"merge_method": "ties", "base_model": str(base), "models": [{"model": f"{base}+{lora}"}]}
    )
    assert len(configuration.referenced_models()) == 2


def test_another_revision_is_refused(tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", "org/model", revision="v1")

    def referenced(base: str) -> int:
        content = {"merge_method": "ties", "base_model": base, "models": [{"model": str(lora)}]}
        return len(MergeConfiguration.model_validate(content).referenced_models())

    with pytest.raises(UserError, match="revision v1 of the base, but base_model is org/model@v2"):
        referenced("org/model@v2")
    assert referenced("org/model@v1") == referenced("org/model") == 2


def test_a_broken_adapter_config(tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    content = {"merge_method": "linear", "models": [{"model": str(lora)}]}
    for text, says in (
        ("{", "not valid JSON"),
        ("[]", "found a list"),
        ("{}", "no peft_type"),
        ('{"peft_type": "LORA", "r": "x"}', "r: .*integer.*found 'x'"),
    ):
        (lora / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=f"{lora}/adapter_config.json: .*{says}"):
            MergeConfiguration.model_validate(content).referenced_models()
