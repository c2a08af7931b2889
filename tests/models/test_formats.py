"""Quantised models and those of other libraries, where commands load a model: each is called what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neuron_methods.models.formats import quantised_with
from neuron_methods.models.loading import load_weights, read_config
from neuron_methods.models.reference import Place
from neuron_methods.models.verification import verify_model
from neuron_methods.support.errors import UserError
from tests.support.checkpoints import build, save

QUANTISED = {
    "GPTQ, 4 bit": {"quant_method": "gptq", "bits": 4},
    "AWQ, 4 bit": {"quant_method": "awq", "bits": 4},
    "bitsandbytes, 4 bit": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes, 8 bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "fp8": {"quant_method": "fp8"},
}


def quantised(path: Path, how: str) -> Path:
    save(build("llama-untied"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTISED[how]}))
    return path


@pytest.mark.parametrize("how", ["GPTQ, 4 bit", "AWQ, 4 bit"])
def test_what_cannot_be_loaded_here_is_called_quantised(tmp_path: Path, how: str) -> None:
    with pytest.raises(UserError, match=rf"model base: its weights are quantised \({how}\): .*; name the model"):
        load_weights(Place(str(quantised(tmp_path, how))), "model base")


@pytest.mark.parametrize("how", QUANTISED)
def test_verify_says_so(tmp_path: Path, how: str) -> None:
    (note,) = verify_model(quantised(tmp_path, how)).notes
    assert note.startswith(f"quantised ({how}), so it was not built")


def test_a_config_without_quantisation() -> None:
    assert quantised_with({}) is None
    assert quantised_with(build("llama-untied").config) is None


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": '{"architecture": "vit_tiny"}'}, r"model m: a checkpoint of timm \(vit_tiny\)"),
        ({"m.gguf": ""}, r"model m: weights quantised as GGUF \(m.gguf\)"),
        ({"last.pth": ""}, r"model m: a training checkpoint, .*\(last.pth\)"),
    ],
)
def test_other_libraries(tmp_path: Path, files: dict[str, str], said: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    if "config.json" in files:
        (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(UserError, match=said):
        read_config(Place(str(tmp_path)), "model m")
