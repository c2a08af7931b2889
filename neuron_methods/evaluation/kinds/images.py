"""Tasks on images: by a classifier's head, or by how near an image is to the names of the classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from torch.nn.functional import normalize

from neuron_methods.data.images import ImageFeeder, class_index
from neuron_methods.evaluation.examples import Examples, Outcome
from neuron_methods.evaluation.kinds.base import Scorer, text_limit, wrong_model
from neuron_methods.evaluation.tasks import Task
from neuron_methods.support.errors import UserError

#: Pixels of at most this many bytes are kept, for when the same examples are scored again.
KEPT_PIXELS = 1 << 30


class PixelCache:
    """Pixels of a task's images, float32 (channels, height, width) each, decoded once while they fit."""

    def __init__(self, processor: Any, config: Any, examples: Examples) -> None:
        self._feeder = ImageFeeder(processor, config, has_loss=True)
        self._feeder.reader = examples.reader
        self._examples = examples
        self._kept: dict[int, Tensor] = {}
        self._bytes = 0

    def batch(self, indices: Sequence[int]) -> Tensor:
        """The pixels of some examples, (B, channels, height, width)."""
        new = [i for i in indices if i not in self._kept]
        found = (
            dict(zip(new, self._feeder.pixels([self._examples.samples[i] for i in new]), strict=True)) if new else {}
        )
        batch = torch.stack([found[i] if i in found else self._kept[i] for i in indices])
        for index, pixels in found.items():
            if self._bytes + pixels.nbytes <= KEPT_PIXELS:
                self._kept[index] = pixels.clone()
                self._bytes += pixels.nbytes
        return batch


class ImageClassification(Scorer):
    """The class with the largest logit, among all or among `labels` alone."""

    columns: ClassVar[Mapping[str, str]] = {"image": "image", "label": "label"}
    settings = ("labels",)
    batch_size = 64
    needs = ("image_processor",)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        config = self.model.config
        self.pixels = PixelCache(self.part("image_processor"), config, self.examples)
        self.targets = target_classes(self.examples, config)
        classes = restricted_classes(self.examples, config)
        self.classes = None if classes is None else torch.tensor(classes)
        self.names = config.id2label or {}

    @classmethod
    def check_task(cls, task: Task, place: str) -> None:
        """`labels` is a list of different names or numbers."""
        check_labels(task, place, (str, int))

    @classmethod
    def check_model(cls, task: Task, config: Any, architecture: str, shown: str) -> None:
        """An image classifier that has the task's labels."""
        if not architecture.endswith("ForImageClassification"):
            raise wrong_model(task, shown, architecture, "an image classifier with its head (…ForImageClassification)")
        for label in task.settings.get("labels", ()):
            if class_index(label, None, config) is None:
                raise lacks_label(task, label, config, shown)

    @classmethod
    def check_examples(cls, examples: Examples, config: Any) -> None:
        """Every label is one of the model's, and one of the task's."""
        target_classes(examples, config)

    def score(self, indices: Sequence[int]) -> list[Outcome]:
        """Classify."""
        pixels = self.pixels.batch(indices).to(self.device, self.model.dtype)
        return classified(self, self.model(pixel_values=pixels).logits.float().cpu(), indices)


def classified(scorer: Any, logits: Tensor, indices: Sequence[int]) -> list[Outcome]:
    """What a classifier's logits say of a batch.

    Args:
        scorer: has `examples`, `targets`, `classes` (those to choose from; None: all) and `names`.
        logits: float32 (batch, classes of the model), on the CPU.
        indices: the batch's examples.
    """
    if scorer.classes is not None:
        found = scorer.classes[logits[:, scorer.classes].argmax(dim=1)].tolist()
    else:
        found = logits.argmax(dim=1).tolist()
    return [
        Outcome(
            scorer.examples.samples[i].row,
            float(predicted == scorer.targets[i]),
            scorer.names.get(predicted, predicted),
            scorer.names.get(scorer.targets[i], scorer.targets[i]),
        )
        for i, predicted in zip(indices, found, strict=True)
    ]


class ZeroShotImageClassification(Scorer):
    """CLIP: the class whose prompts are nearest to the image.

    Radford et al., 2021, arXiv:2103.00020: a class stands for the mean of its prompts' normalised embeddings.
    """

    columns: ClassVar[Mapping[str, str]] = {"image": "image", "label": "label"}
    settings = ("labels", "prompts")
    batch_size = 64
    needs = ("image_processor", "tokenizer")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pixels = PixelCache(self.part("image_processor"), self.model.config, self.examples)
        self.names = class_names(self.examples)
        self.targets = named_targets(self.examples)
        prompts = self.task.settings.get("prompts", ["a photo of a {}."])
        limit = text_limit(self.model.config)
        texts = [prompt.replace("{}", name) for name in self.names for prompt in prompts]
        self.tokens = self.part("tokenizer")(
            texts, padding=True, truncation=limit is not None, max_length=limit, return_tensors="pt"
        )
        self.classes = torch.empty(0)

    @classmethod
    def check_task(cls, task: Task, place: str) -> None:
        """`labels` are names; every one of `prompts` has room for a name."""
        check_labels(task, place, (str,))
        prompts = task.settings.get("prompts", ["{}"])
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and "{}" in p for p in prompts):
            raise UserError(f"{place}: prompts: expected a list of texts with {{}} for the label, found {prompts!r}")

    @classmethod
    def check_model(cls, task: Task, config: Any, architecture: str, shown: str) -> None:
        """A model with both towers."""
        model_class = getattr(transformers, architecture, None)
        if not all(hasattr(model_class, f"get_{what}_features") for what in ("image", "text")):
            raise wrong_model(task, shown, architecture, "a model of images and texts (CLIPModel)")

    @classmethod
    def check_examples(cls, examples: Examples, config: Any) -> None:
        """Labels have names."""
        named_targets(examples)

    def begin(self) -> None:
        """Embed the classes' prompts, float32 (classes, width)."""
        inputs = {k: v.to(self.device) for k, v in self.tokens.items() if k in ("input_ids", "attention_mask")}
        count = len(self.names)
        parts = [
            _features(self.model.get_text_features(**{k: v[i : i + 256] for k, v in inputs.items()}))
            for i in range(0, len(inputs["input_ids"]), 256)
        ]
        prompts = normalize(torch.cat(parts), dim=-1)
        self.classes = normalize(prompts.view(count, -1, prompts.shape[-1]).mean(dim=1), dim=-1)

    def score(self, indices: Sequence[int]) -> list[Outcome]:
        """Compare images with classes."""
        pixels = self.pixels.batch(indices).to(self.device, self.model.dtype)
        images = normalize(_features(self.model.get_image_features(pixel_values=pixels)), dim=-1)
        found = (images @ self.classes.T).argmax(dim=1).tolist()
        return [
            Outcome(
                self.examples.samples[i].row,
                float(predicted == self.targets[i]),
                self.names[predicted],
                self.names[self.targets[i]],
            )
            for i, predicted in zip(indices, found, strict=True)
        ]


def _features(output: Any) -> Tensor:
    """Embeddings, float32 (B, width): transformers 5 hands them out within an output."""
    return (output if isinstance(output, Tensor) else output.pooler_output).float()


def class_names(examples: Examples) -> list[str]:
    """The classes' names: the task's `labels`, else the data's.

    Raises:
        UserError: neither names them.
    """
    names = examples.task.settings.get("labels") or (examples.reader.labels if examples.reader else None)
    if not names:
        raise UserError(f"task {examples.task.name!r}: labels: the data names no labels; list them in their order")
    return names


def named_targets(examples: Examples) -> list[int]:
    """The place of every example's label among `class_names`.

    Raises:
        UserError: a label is none of them.
    """
    names, known = class_names(examples), examples.reader.labels if examples.reader else None
    targets = []
    for index in range(len(examples)):
        label = examples.value(index, "label")
        if isinstance(label, int) and known and 0 <= label < len(known):
            label = known[label]
        if isinstance(label, str) and label in names:
            label = names.index(label)
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(names):
            raise examples.wrong(index, "label", f"one of the {len(names)} labels")
        targets.append(label)
    return targets


def check_labels(task: Task, place: str, types: tuple[type, ...]) -> None:
    """Refuse `labels` that are no list of different names (or numbers)."""
    labels = task.settings.get("labels")
    if labels is None:
        return
    sound = isinstance(labels, list) and labels and all(isinstance(v, types) and v is not True for v in labels)
    if not sound or len({*labels}) < len(labels):
        raise UserError(f"{place}: labels: expected a list of different labels, found {labels!r}")


def restricted_classes(examples: Examples, config: Any) -> list[int] | None:
    """The model's classes that the task restricts it to; None: all."""
    labels = examples.task.settings.get("labels")
    if labels is None:
        return None
    classes = [class_index(label, None, config) for label in labels]
    for label, index in zip(labels, classes, strict=True):
        if index is None:
            raise lacks_label(examples.task, label, config, "")
    return classes


def target_classes(examples: Examples, config: Any) -> list[int]:
    """The model's class of every example.

    Raises:
        UserError: a label is none of the model's, or none that the task restricts it to.
    """
    allowed = restricted_classes(examples, config)
    names = examples.reader.labels if examples.reader is not None else None
    targets = []
    for index in range(len(examples)):
        found = class_index(examples.value(index, "label"), names, config)
        if found is None:
            raise examples.wrong(index, "label", f"one of the model's {config.num_labels} labels")
        if allowed is not None and found not in allowed:
            raise examples.wrong(index, "label", "one of the task's labels")
        targets.append(found)
    return targets


def lacks_label(task: Task, label: Any, config: Any, shown: str) -> UserError:
    """The error about a label that a model does not have."""
    known = [name for name in config.label2id or {} if not name.startswith("LABEL_")]
    what = f"{', '.join(known[:5])}{', …' if len(known) > 5 else ''}" if known else f"0 to {config.num_labels - 1}"
    return UserError(
        f"task {task.name!r}: labels: the model {shown} has no label {label!r} (it has {what})".replace("  ", " ")
    )
