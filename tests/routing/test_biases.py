"""Experts that trained biases: mixed per sample they are what the merged bias gives; against peft one at a time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file

from neuron_methods import NeuronRoutedModel
from neuron_methods.routing.build import build_routed_model
from neuron_methods.support.errors import UserError
from tests.support.routed import EXPERTS, make_workspace, settings

PIXELS = torch.linspace(-1, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)


def train_biases(folder, name, which, seed):
    """Change biases of an adapter's file as peft stores them: all of the model's, or those of its LoRA layers."""
    base = transformers.ViTForImageClassification.from_pretrained(folder / "base")
    file, config = (folder / "adapters" / name / f"adapter_{end}" for end in ("model.safetensors", "config.json"))
    tensors = load_file(file)
    wrapped = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors}
    generator = torch.Generator().manual_seed(seed)
    for path, value in base.named_parameters():
        module = path.removesuffix(".bias")
        if path.endswith(".bias") and (which == "all" or module in wrapped):
            stored = f"{module}.base_layer.bias" if module in wrapped else path
            tensors[f"base_model.model.{stored}"] = value.detach() + torch.randn(value.shape, generator=generator)
    save_file(tensors, file, metadata={"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "bias": which}))


def by_peft(folder, name):
    base = transformers.ViTForImageClassification.from_pretrained(folder / "base")
    with torch.no_grad():
        return PeftModel.from_pretrained(base, folder / "adapters" / name).eval()(pixel_values=PIXELS).logits


def build(folder, out, **changes):
    Path(folder, "routed.yaml").write_text(yaml.safe_dump(settings("vit", **changes)))
    build_routed_model(folder / "routed.yaml", folder / out)
    return NeuronRoutedModel.from_pretrained(folder / out)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder whose first expert trained all biases, whose second those of its LoRA layers, whose third none."""
    folder = make_workspace("vit", tmp_path_factory.mktemp("biases"))
    train_biases(folder, EXPERTS[0], "all", 0)
    train_biases(folder, EXPERTS[1], "lora_only", 1)
    build(folder, "routed", enhancement={"enabled": False})
    return folder


@pytest.fixture(scope="session")
def loaded(made):
    return NeuronRoutedModel.from_pretrained(made / "routed")


def test_each_sample_gets_the_biases_of_its_own_expert_and_some_none(made, loaded):
    rows = [loaded.mixer.only(name)[0] for name in EXPERTS]
    with torch.no_grad(), loaded.mixer.using(torch.stack([*rows, torch.zeros_like(rows[0])])):
        mixed = loaded.base(pixel_values=PIXELS).logits
    base = transformers.ViTForImageClassification.from_pretrained(made / "base")
    with torch.no_grad():
        assert torch.allclose(mixed[3], base(pixel_values=PIXELS).logits[3], atol=1e-5)
    for number, name in enumerate(EXPERTS):
        assert torch.allclose(mixed[number], by_peft(made, name)[number], atol=1e-4), name


def test_mixtures_of_biases_are_the_merged_biases(loaded):
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.rand(4, len(loaded.mixer.layers), 3, generator=generator)
    with torch.no_grad(), loaded.mixer.using(coefficients):
        mixed = loaded.base(pixel_values=PIXELS).logits
    for row in range(4):
        plain = loaded.as_static(coefficients[row])
        with torch.no_grad():
            assert torch.allclose(plain(pixel_values=PIXELS[row : row + 1]).logits[0], mixed[row], atol=1e-4)


def test_saved_and_loaded_they_are_the_same(loaded, tmp_path):
    loaded.save_pretrained(tmp_path / "again")
    assert sorted(file.stem for file in (tmp_path / "again" / "biases").iterdir()) == sorted(EXPERTS[:2])
    again = NeuronRoutedModel.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(pixel_values=PIXELS).logits, loaded(pixel_values=PIXELS).logits)


def test_what_enhancement_drops_of_an_expert_is_dropped_of_its_biases(made, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    model = build(folder, "new", enhancement={"tolerance": 100.0, "density": 0.5})
    for expert in model.routed_config.experts[:2]:
        (dropped,) = expert.redundant_layers
        biases = model.mixer.biases[expert.name]
        assert biases and not any(path.startswith(f"{dropped}.") for path in biases)
        rows = next(path for path in model.mixer.paths_of(expert.name) if path.endswith("q_proj"))
        kept = model.mixer.modules[rows].lora_B[expert.name].weight.any(1)
        assert 0 < kept.sum() < len(kept) and torch.equal(biases[rows] != 0, kept)


def test_files_of_biases_that_are_missing_or_of_another_model(made, tmp_path):
    folder = tmp_path / "routed"
    shutil.copytree(made / "routed", folder)
    file = folder / "biases" / f"{EXPERTS[0]}.safetensors"
    save_file({"vit.layernorm": torch.zeros(3)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"safetensors: 'vit\.layernorm' is of shape \[3\], expected \[16\]"):
        NeuronRoutedModel.from_pretrained(folder, base_model=str(made / "base"))
    file.unlink()
    with pytest.raises(UserError, match=rf"biases/{EXPERTS[0]}\.safetensors"):
        NeuronRoutedModel.from_pretrained(folder, base_model=str(made / "base"))
