"""Make the ViT zoo: a small vision transformer and eight experts, from fonts and drawn scenes.

    apt-get install fonts-noto-core
    python examples/zoo/vit.py OUT [--seed N] [--lora]

The base learns the letters of fifteen scripts. Then its head is replaced, once for all tasks, by the mean features that
it gives each task's classes on plain paper (as CLIP's head is the features of the classes' names), and stays frozen; a
task names the classes that count. Each task shows its classes under conditions of its own, in which the base is weak;
its expert is fine-tuned to them, gently. With ``--lora`` every task has a LoRA adapter too.

Finished stages are kept: run it again to resume.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import Zoo, finish, generator, parse_arguments, run_script, schedule, take_step
from glyphs import NOTO
from PIL import Image
from scenes import IMAGE
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTImageProcessor
from vision_tasks import CAMERA, LETTER_SCRIPTS, TASKS, LetterStream, VisionTask, vision_tasks

from neuron_methods.support.progress import progress_bar
from neuron_methods.support.quiet import quiet_transformers

#: The modules that LoRA adapts: every matrix of the layers.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")


@dataclass(frozen=True)
class Settings:
    """Sizes and training of the zoo.

    Attributes:
        tasks: names out of `vision_tasks.TASKS`.
        scripts: whose letters the base is pre-trained on.
        latin_faces: faces of ``digits-latin`` instead of Noto's; empty: Noto's.
        width: features per token; its MLPs are three times as wide.
        layers: of the transformer, with four heads each.
        pretraining_steps: of the base.
        pretraining_batch: letters per step.
        steps: of an expert.
        batch: images per step of an expert.
        learning_rate: of a full expert.
        lora_rank: of an adapter; its alpha is twice that.
        lora_learning_rate: of an adapter.
        train: images to train an expert on.
        validation: images to tune merges on, per task.
        test: images to score on, per task.
    """

    tasks: tuple[str, ...] = TASKS
    scripts: tuple[str, ...] = LETTER_SCRIPTS
    latin_faces: tuple[str, ...] = ()
    width: int = 128
    layers: int = 4
    pretraining_steps: int = 1400
    pretraining_batch: int = 80
    steps: int = 160
    batch: int = 64
    learning_rate: float = 3e-4
    lora_rank: int = 8
    lora_learning_rate: float = 2e-3
    train: int = 4000
    validation: int = 300
    test: int = 2000


SPLITS = ("train", "validation", "test")


def build_zoo(
    out: Path,
    settings: Settings,
    seed: int = 0,
    *,
    lora: bool = False,
    checks: bool = True,
    fonts: Path = NOTO,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> None:
    """Do every stage that is not done yet.

    Raises:
        UserError: the fonts are missing, or `out` cannot be used.
    """
    zoo = Zoo(out, "vit", seed, say)
    tasks = vision_tasks(settings.tasks, fonts, settings.latin_faces or None)
    sizes = {split: getattr(settings, split) for split in SPLITS}
    shown = {"tasks": settings.tasks, "latin_faces": settings.latin_faces, "camera": CAMERA}
    about_data = {"stage": "data", **shown, "sizes": sizes}
    zoo.stage("data", about_data, lambda path: write_data(path, tasks, settings, seed))
    about_base = {
        key: value
        for key, value in asdict(settings).items()
        if key in ("tasks", "scripts", "latin_faces", "width", "layers") or key.startswith("pretraining")
    } | {"stage": "base"}
    base = zoo.out / "base"
    zoo.stage("base", about_base, lambda path: make_base(path, tasks, settings, fonts, seed, progress))

    labels = label_ranges(tasks)
    about_training = {"data": about_data, "base": about_base, "steps": settings.steps, "batch": settings.batch}
    kinds: list[tuple[str, dict[str, Any]]] = [("experts", {"learning_rate": settings.learning_rate})]
    if lora:
        kinds.append(("adapters", {"learning_rate": settings.lora_learning_rate, "rank": settings.lora_rank}))
    for place, training in kinds:
        for task in tasks:
            about = {**about_training, **training, "stage": place, "task": task.name}

            def build(path: Path, task: VisionTask = task, training: dict[str, Any] = training) -> dict[str, float]:
                images, classes = read_images(zoo.out / "data" / task.name / "train.parquet")
                return train_expert(
                    base, path, images, classes, labels[task.name], settings, seed, task.name, progress, **training
                )

            zoo.stage(f"{place}/{task.name}", about, build)
    entries = [
        {
            "name": task.name,
            "kind": "image-classification",
            "columns": {"image": "image", "label": "label"},
            "labels": list(labels[task.name]),
            "metric": "accuracy",
            "batch_size": 250,
        }
        for task in tasks
    ]
    zoo.write_yaml(entries, "float32")
    finish(zoo, {"training": about_training, "full": kinds[0][1]}, checks)


def label_ranges(tasks: Sequence[VisionTask]) -> dict[str, range]:
    """Say which classes of the head are whose."""
    found, start = {}, 0
    for task in tasks:
        found[task.name] = range(start, start + len(task.classes))
        start += len(task.classes)
    return found


def write_data(path: Path, tasks: Sequence[VisionTask], settings: Settings, seed: int) -> None:
    """Write images of all tasks and splits as parquet, each image a PNG; labels are the head's classes."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": Value("int64")})
    for task in tasks:
        labels = label_ranges(tasks)[task.name]
        folder = path / task.name
        folder.mkdir(parents=True)
        for split in SPLITS:
            random = generator("vit", seed, task.name, split)
            classes = torch.randint(len(task.classes), (getattr(settings, split),), generator=random)
            pixels = (task.paint(classes, random) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            images = [{"bytes": _png(picture), "path": None} for picture in pixels]
            rows = {"image": images, "label": [labels[c] for c in classes.tolist()]}
            Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))


def _png(pixels: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def read_images(path: Path) -> tuple[Tensor, Tensor]:
    """Read images (n, 3, 28, 28) in -1…1, as the processor makes them, and labels (n,), of a parquet file."""
    import numpy as np
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    pictures = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table["image"].to_pylist()]
    return to_pixels(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255), torch.tensor(
        table["label"].to_pylist()
    )


def to_pixels(images: Tensor) -> Tensor:
    """Scale from 0…1 to the -1…1 that the model reads."""
    return (images - 0.5) / 0.5


def make_base(
    path: Path, tasks: Sequence[VisionTask], settings: Settings, fonts: Path, seed: int, progress: bool
) -> dict[str, float]:
    """Pre-train on letters, set the head to the tasks' class vectors, and save."""
    stream = LetterStream(settings.scripts, fonts)
    torch.manual_seed(seed)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=IMAGE,
            patch_size=IMAGE // 4,
            hidden_size=settings.width,
            intermediate_size=3 * settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=4,
            num_labels=stream.classes,
            initializer_range=0.06,
        )
    )
    # With the usual 0.02 and four layers, positions and patches are too faint for the attention to find.
    torch.nn.init.normal_(model.vit.embeddings.position_embeddings, std=0.3)
    torch.nn.init.normal_(model.vit.embeddings.patch_embeddings.projection.weight, std=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05, betas=(0.9, 0.98))
    steps = settings.pretraining_steps
    rate = schedule(optimizer, steps, min(50, steps // 10))
    random = generator("vit", seed, "letters")
    right = 0.0
    with progress_bar(range(steps), what="base", unit="step", shown=progress) as bar:
        for step in bar:
            difficulty = min(1.0, max(0.0, 2.5 * step / steps - 0.15))
            images, classes = stream.batch(settings.pretraining_batch, random, difficulty)
            logits = model(pixel_values=to_pixels(images)).logits
            take_step(cross_entropy(logits, classes), model.parameters(), optimizer)
            rate.step()
            right += 0.02 * (logits.argmax(1).eq(classes).float().mean().item() - right)
            bar.set_postfix_str(f"letters {100 * right:.0f} %", refresh=False)
    model.eval()
    set_head(model, tasks, generator("vit", seed, "head"))
    save(model, path)
    return {"letters": round(right, 3)}


@torch.no_grad()
def set_head(model: PreTrainedModel, tasks: Sequence[VisionTask], random: torch.Generator, examples: int = 32) -> None:
    """Replace the classifier: per class the direction of its mean feature on plain paper, from the mean of all."""
    vectors = []
    for task in tasks:
        classes = torch.arange(len(task.classes)).repeat_interleave(examples)
        features = model.vit(pixel_values=to_pixels(task.paint_clean(classes, random))).last_hidden_state[:, 0]
        vectors.append(features.view(len(task.classes), examples, -1).mean(1))
    stacked = torch.cat(vectors)
    centre = stacked.mean(0)
    head = torch.nn.Linear(stacked.shape[1], len(stacked))
    head.weight.copy_(normalize(stacked - centre, dim=1))
    head.bias.copy_(-head.weight @ centre)
    model.classifier = head
    names = [f"{task.name}: {name}" for task in tasks for name in task.classes]
    model.num_labels = model.config.num_labels = len(names)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}


def save(model: PreTrainedModel, path: Path) -> None:
    """Save the model with the processor that makes its pixels."""
    with quiet_transformers():
        model.save_pretrained(path)
        ViTImageProcessor(size={"height": IMAGE, "width": IMAGE}).save_pretrained(path)


def train_expert(
    base: Path,
    path: Path,
    images: Tensor,
    classes: Tensor,
    labels: range,
    settings: Settings,
    seed: int,
    name: str,
    progress: bool,
    learning_rate: float,
    rank: int = 0,
) -> dict[str, float]:
    """Fine-tune the base on a task, its head frozen; with a `rank`, a LoRA adapter."""
    torch.manual_seed(seed)
    with quiet_transformers():
        model = ViTForImageClassification.from_pretrained(base, local_files_only=True)
    model.classifier.requires_grad_(False)
    if rank:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS)))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    rate = schedule(optimizer, settings.steps, settings.steps // 10)
    random = generator("vit", seed, name, "order")
    running = 0.0
    with progress_bar(range(settings.steps), what=name, unit="step", shown=progress, leave=False) as bar:
        for _ in bar:
            chosen = torch.randint(len(images), (settings.batch,), generator=random)
            logits = model(pixel_values=images[chosen]).logits[:, labels.start : labels.stop]
            loss = cross_entropy(logits, classes[chosen] - labels.start)
            take_step(loss, trained, optimizer)
            rate.step()
            running += 0.1 * (loss.item() - running)
            bar.set_postfix_str(f"loss {running:.2f}", refresh=False)
    model.eval()
    if rank:
        with quiet_transformers():
            model.save_pretrained(path)
    else:
        save(model, path)
    return {"loss": round(running, 4)}


def main() -> None:
    options = {"fonts": f"directory of the Noto fonts (default: {NOTO})"}
    arguments = parse_arguments(__doc__, options, lora="train a LoRA adapter per task too")
    fonts = Path(arguments.fonts) if arguments.fonts else NOTO
    checks = not arguments.no_checks
    build_zoo(arguments.out, Settings(), arguments.seed, lora=arguments.lora, checks=checks, fonts=fonts)


if __name__ == "__main__":
    run_script(main)
