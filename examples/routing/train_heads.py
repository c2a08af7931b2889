"""Train LoRA adapters with heads of their own on the tasks of a ViT zoo, and write what routes and scores them.

    python examples/zoo/vit.py ZOO
    python examples/routing/train_heads.py ZOO OUT --tasks digits-latin shapes:8 textures:5 counts
    mergekit-neuron route OUT/routed.yaml OUT/routed
    mergekit-neuron evaluate OUT/routed --task OUT/tasks.yml

The base is the zoo's without its head, a `ViTModel`. Every task counts its classes from 0, of which shapes:8 takes the
first eight; they are called as in the zoo's head. Each adapter is scored on its own task when it is trained: the routed
model can be held against that.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import ViTForImageClassification, ViTImageProcessor, ViTModel

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
from vit import LORA_TARGETS, read_images

from neuron_methods.support.progress import progress_bar

STEPS, BATCH, RANK, LEARNING_RATE = 160, 64, 8, 2e-3


def train(base: Path, out: Path, data: Path, first: int, classes: int, seed: int) -> float:
    """Train an adapter and its head; returns its accuracy on the test images."""
    torch.manual_seed(seed)
    model: Any = ViTForImageClassification.from_pretrained(base, num_labels=classes)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LORA_TARGETS), modules_to_save=["classifier"])
    model = get_peft_model(model, config).train()
    images, labels = of_task(data / "train.parquet", first, classes)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    for step in progress_bar(range(STEPS), what=out.name, unit="step"):
        chosen = torch.randint(len(images), (BATCH,))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, 10 * (step + 1) / STEPS, 2 * (1 - step / STEPS))
        loss = torch.nn.functional.cross_entropy(model(pixel_values=images[chosen]).logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(out)
    images, labels = of_task(data / "test.parquet", first, classes)
    with torch.no_grad():
        found = torch.cat([model(pixel_values=some).logits.argmax(1) for some in images.split(250)])
    return float((found == labels).float().mean())


def of_task(file: Path, first: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the images of some classes, and these counted from 0."""
    images, labels = read_images(file)
    mine = (labels >= first) & (labels < first + classes)
    return images[mine], labels[mine] - first


def write_task_data(data: Path, out: Path, names: dict[int, str]) -> None:
    """Write the splits, images of some classes alone, with labels by their names."""
    from datasets import Features, Image, Value, load_dataset

    for split in ("train", "test"):
        rows = load_dataset("parquet", data_files=str(data / f"{split}.parquet"), split="train")
        rows = rows.filter(lambda row: row["label"] in names)
        labels = [names[label] for label in rows["label"]]
        rows = rows.remove_columns("label").add_column("label", labels)
        rows = rows.cast(Features({"image": Image(), "label": Value("string")}))
        out.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(str(out / f"{split}.parquet"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    zoo, out = arguments.zoo.resolve(), arguments.out.resolve()
    whole = ViTForImageClassification.from_pretrained(zoo / "base")
    names = [name.split(": ")[1] for _, name in sorted(whole.config.id2label.items())]
    base = out / "base"
    body = ViTModel(whole.config, add_pooling_layer=False)
    body.load_state_dict(whole.vit.state_dict())
    body.save_pretrained(base)
    ViTImageProcessor.from_pretrained(zoo / "base").save_pretrained(base)
    experts, tasks = [], []
    wanted = {name: int(count) if count else None for name, _, count in (t.partition(":") for t in arguments.tasks)}
    for task in yaml.safe_load((zoo / "tasks.yml").read_text())["tasks"]:
        name = task["name"]
        if name not in wanted:
            continue
        classes = task["labels"][: wanted[name]]
        place = out / "adapters" / name
        score = train(base, place, zoo / "data" / name, classes[0], len(classes), arguments.seed)
        print(f"{name}: {len(classes)} classes, {score:.1%} by itself", flush=True)
        head = {number: names[number] for number in classes}
        write_task_data(zoo / "data" / name, out / "data" / name, head)
        data = {"source": f"data/{name}", "split": "train"}
        experts.append({"name": name, "adapter": f"adapters/{name}", "data": data, "head_labels": [*head.values()]})
        tasks.append(
            {"name": name, "kind": "image-classification", "data": {**data, "split": "test"}, "batch_size": 250}
        )
    (out / "routed.yaml").write_text(yaml.safe_dump({"base_model": "base", "experts": experts}, sort_keys=False))
    (out / "tasks.yml").write_text(yaml.safe_dump({"tasks": tasks}, sort_keys=False))


if __name__ == "__main__":
    main()
