"""Tasks on images: by a classifier's head, or by how near an image is to the names of the classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from torch.nn.functional import normalize

from neuron_methods.data.images import ImageFeeder
from neuron_methods.evaluation.examples import Examples, Outcome
from neuron_methods.evaluation.kinds.classification import Classification
from neuron_methods.evaluation.kinds.scorer import Scorer
from neuron_methods.evaluation.kinds.setting_checks import different_labels
from neuron_methods.models.kinds import text_limit
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
        """Give the pixels of some examples, (B, channels, height, width)."""
        new = [i for i in indices if i not in self._kept]
        decoded = self._feeder.pixels([self._examples.samples[i] for i in new]) if new else ()
        found = dict(zip(new, decoded, strict=True))
        batch = torch.stack([found[i] if i in found else self._kept[i] for i in indices])
        for index, pixels in found.items():
            if self._bytes + pixels.nbytes <= KEPT_PIXELS:
                self._kept[index] = pixels.clone()
                self._bytes += pixels.nbytes
        return batch


class ImageClassification(Classification):
    """The class of an image with the largest logit, among all or among `labels` alone."""

    columns: ClassVar[Mapping[str, str]] = {"image": "image", "label": "label"}
    batch_size = 64
    needs = ("image_processor",)
    models = ("image-classification",)
    needed = "an image classifier with its head (…ForImageClassification)"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pixels = PixelCache(self.part("image_processor"), self.model.config, self.examples)

    def score(self, indices: Sequence[int]) -> list[Outcome]:
        """Classify images."""
        pixels = self.pixels.batch(indices).to(self.device, self.model.dtype)
        return self.outcomes(self.model(pixel_values=pixels).logits.float().cpu(), indices)


def _prompts(value: Any) -> str | None:
    sound = isinstance(value, list) and value and all(isinstance(v, str) and "{}" in v for v in value)
    return None if sound else "a list of texts with {} for the label"


class ZeroShotImageClassification(Scorer):
    """CLIP: the class whose prompts are nearest to the image.

    Radford et al., 2021, arXiv:2103.00020: a class stands for the mean of its prompts' normalised embeddings.
    """

    columns: ClassVar[Mapping[str, str]] = {"image": "image", "label": "label"}
    settings: ClassVar = {"labels": different_labels(str), "prompts": _prompts}
    batch_size = 64
    needed = "a model of images and texts (CLIPModel)"
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
    def fits(cls, architecture: str, config: Any) -> bool:
        """Tell whether it has both towers."""
        model_class = getattr(transformers, architecture, None)
        return all(hasattr(model_class, f"get_{what}_features") for what in ("image", "text"))

    @classmethod
    def check_examples(cls, examples: Examples, config: Any) -> None:
        """Refuse labels without names."""
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
        return self.chosen(indices, found, dict(enumerate(self.names)))


def _features(output: Any) -> Tensor:
    """Take embeddings, float32 (B, width): transformers 5 hands them out within an output."""
    return (output if isinstance(output, Tensor) else output.pooler_output).float()


def class_names(examples: Examples) -> list[str]:
    """Name the classes: by the task's `labels`, else the data's.

    Raises:
        UserError: neither names them.
    """
    names = examples.task.settings.get("labels") or examples.reader.labels
    if not names:
        raise UserError(f"task {examples.task.name!r}: labels: the data names no labels; list them in their order")
    return names


def named_targets(examples: Examples) -> list[int]:
    """Find the place of every example's label among `class_names`.

    Raises:
        UserError: a label is none of them.
    """
    names, known = class_names(examples), examples.reader.labels
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
