"""Tiny bases, adapters and data on which routing can be told right from wrong.

The experts' inputs are told apart by their words (colours, animals, numbers) or by the brightness of their images, so
that a router on a random base learns it from a few samples.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from tests.support.tiny import save_model

TOPICS = {"numbers": ["one", "two", "three", "four"], "colours": ["red", "green", "blue"], "animals": ["cat", "dog"]}
EXPERTS = tuple(TOPICS)
TARGETS = {
    "llama": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
    "t5": ["q", "v", "wi", "wo"],
    "vit": ["q_proj", "v_proj", "fc1", "fc2"],
}


def save_base(kind: str, folder: Path) -> Path:
    return save_model(kind, folder / "base")


def save_adapter(base: Path, kind: str, folder: Path, seed: int, scale: float = 0.3, **options: Any) -> Path:
    """A LoRA adapter with random factors."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(base)
    model = getattr(transformers, config.architectures[0]).from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind], **options}
    peft_model = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    peft_model.save_pretrained(folder)
    return folder


def write_topic(path: Path, topic: str, count: int, seed: int = 0) -> Path:
    """A jsonl file with the columns `input` and `target`, all words of the input from one topic."""
    generator = random.Random(seed)
    words = TOPICS[topic]
    lines = []
    for _ in range(count):
        text = " ".join(generator.choices(words, k=generator.randint(3, 8)))
        lines.append(json.dumps({"input": text, "target": generator.choice(words)}) + "\n")
    path.write_text("".join(lines))
    return path


def write_pictures(folder: Path, topic: str, count: int) -> Path:
    """An image folder with all three labels, whose brightness tells the topic."""
    from PIL import Image

    generator = random.Random(topic)
    low = {"numbers": 0, "colours": 100, "animals": 200}[topic]
    for i in range(count):
        place = folder / ("cat", "dog", "tree")[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (8, 8))
        image.putdata([tuple(generator.randint(low, low + 55) for _ in range(3)) for _ in range(64)])
        image.save(place / f"{i}.png")
    return folder


def settings(kind: str, **changes: Any) -> dict[str, Any]:
    """A configuration of three experts, quick to build; `changes` replace its keys, those of a section in part."""
    content: dict[str, Any] = {
        "base_model": "base",
        "experts": [
            {"name": name, "adapter": f"adapters/{name}", "data": {"source": f"data/{name}" + _END[kind]}}
            for name in EXPERTS
        ],
        "enhancement": {"select": "smallest", "tolerance": 0.05, "samples": 8},
        "router": {"samples": 60, "hidden": 16, "epochs": 60, "learning_rate": 0.01, "in_domain_share": 1.0},
    }
    for key, value in changes.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
    return content


_END = {"llama": ".jsonl", "t5": ".jsonl", "vit": ""}


def make_workspace(kind: str, folder: Path) -> Path:
    """base, adapters/NAME and data/NAME of a kind of model, in `folder`."""
    base = save_base(kind, folder)
    (folder / "data").mkdir()
    for number, name in enumerate(EXPERTS):
        # Different ranks, targets and scalings: nothing may rely on their being alike.
        options = [{}, {"r": 2, "use_rslora": True}, {"target_modules": TARGETS[kind][:3], "lora_alpha": 3}][number]
        save_adapter(base, kind, folder / "adapters" / name, number, **options)
        if kind == "vit":
            write_pictures(folder / "data" / name, name, 60)
        else:
            write_topic(folder / "data" / f"{name}.jsonl", name, 60, number)
    return folder


#: Labels of the experts that have heads of their own: no two heads are of one size.
HEADS = {
    "digits": ["nought", "one"],
    "animals": ["cat", "dog", "owl"],
    "shapes": ["disc", "ring", "star", "bar"],
    "colours": ["red", "green", "blue", "grey", "one"],
}


def save_headed(base: Path, folder: Path, labels: int, seed: int, **options: Any) -> Path:
    """A LoRA adapter with a head of its own for so many labels, trained on any class that the base's config has."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(base)
    name = options.pop("architecture", config.architectures[0])
    config.num_labels = labels
    trained = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = trained.from_pretrained(base, config=config, ignore_mismatched_sizes=True)
        head = options.pop("head", "classifier")
        targets = ["q_proj", "v_proj"]
        settings = {"r": 2, "lora_alpha": 4, "target_modules": targets, "modules_to_save": [head], **options}
        peft_model = get_peft_model(model, LoraConfig(**settings))
        with torch.no_grad():
            for key, parameter in peft_model.named_parameters():
                if ".lora_" in key or f"{head}.modules_to_save" in key:
                    parameter.copy_(torch.randn(parameter.shape) * 0.3)
    peft_model.save_pretrained(folder)
    return folder


def write_shades(folder: Path, labels: list[str], number: int, count: int) -> Path:
    """An image folder of these labels, whose brightness tells the number of the task."""
    from PIL import Image

    generator = random.Random(number)
    for i in range(count):
        place = folder / labels[i % len(labels)]
        place.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (8, 8))
        image.putdata([tuple(generator.randint(64 * number, 64 * number + 20) for _ in range(3)) for _ in range(64)])
        image.save(place / f"{i}.png")
    return folder


def make_headed_workspace(folder: Path, *, headless: bool = False) -> Path:
    """base (a ViT; `headless`: a `ViTModel`), adapters/NAME, data/NAME and routed.yaml of `HEADS`, in `folder`."""
    import yaml

    base = save_base("vit", folder)
    if headless:
        import transformers

        transformers.ViTModel.from_pretrained(base).save_pretrained(base)
    (folder / "data").mkdir()
    for number, (name, labels) in enumerate(HEADS.items()):
        architecture = "ViTForImageClassification"
        save_headed(base, folder / "adapters" / name, len(labels), number, architecture=architecture)
        write_shades(folder / "data" / name, labels, number, 12 * len(labels))
    (folder / "routed.yaml").write_text(yaml.safe_dump(headed_settings()))
    return folder


def headed_settings(**changes: Any) -> dict[str, Any]:
    """The configuration of such a folder; `changes` replace its keys."""
    content = settings("vit", **{"enhancement": {"samples": 6, "density": 1.0}, **changes})
    content["experts"] = [
        {"name": name, "adapter": f"adapters/{name}", "data": {"source": f"data/{name}"}} for name in HEADS
    ]
    return content
