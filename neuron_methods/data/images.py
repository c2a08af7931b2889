"""Feeders for models that read images; see `feeders`. Every patch counts as a token, and so does the class token."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from neuron_methods.data.classes import ClassFeeder
from neuron_methods.data.feeders import Batch, Feeder, orders_and_rows
from neuron_methods.data.sources import Sample, SourceReader
from neuron_methods.data.texts import TextFeeder
from neuron_methods.data.tokens import TokenBatch
from neuron_methods.support.documents import open_file
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import first_line, shortened

NAME_WIDTH = 64  # characters kept of an image's name, from its end
#: Formats that are decoded here; others would start programs (EPS) or were never asked for.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MOST_PIXELS = 100_000_000
MOST_BYTES = 1 << 30  # of a file, more of which is not looked at
LONGEST = 200  # sides, one to the other; resizing the shorter one to what a model reads makes the longer one so large


class ImageFeeder(ClassFeeder):
    """Vision models; the loss is that of image classification, from the second column."""

    columns = ("image", "label")
    columns_for_loss = 2

    def __init__(self, processor: Any, config: Any, has_loss: bool, classes: Collection[int] | None = None) -> None:
        """Make a feeder for the model of `config`; it has a loss where it has a head that says classes.

        `classes` are those that count in the loss, where the head has more than the task at hand; None: all.
        """
        self.processor, self.config, self.has_loss, self.classes = processor, config, has_loss, classes

    def payload_width(self, stream: str) -> int:
        """Count the characters of an image's name."""
        return NAME_WIDTH

    def batch(self, samples: list[Sample]) -> Batch:
        """Lay out pixels, and classes if there is a head to say them."""
        order, row = orders_and_rows(samples)
        names = (image_name(sample)[-NAME_WIDTH:].ljust(NAME_WIDTH, "\0") for sample in samples)
        payloads = torch.tensor([list(map(ord, name)) for name in names], dtype=torch.int32)
        labelled = self.has_loss and len(self.reader.columns) == 2
        targets = torch.tensor([self.class_of(sample) for sample in samples]) if labelled else None
        return Batch({"pixel_values": self.pixels(samples)}, {"": TokenBatch(order, row, payloads[:, None])}, targets)

    def pixels(self, samples: list[Sample]) -> Tensor:
        """Make float32 pixels (B, channels, height, width)."""
        images = [self._open(sample) for sample in samples]
        return self.processor(images, return_tensors="pt")["pixel_values"]

    def describe(self, stream: str, payloads: Tensor) -> list[dict[str, str]]:
        """Tell the image's name."""
        return [{"image": "".join(map(chr, filter(None, name)))} for name in payloads.tolist()]

    def _open(self, sample: Sample) -> Any:
        from PIL import Image

        value = sample.values[0]
        if isinstance(value, Image.Image):
            return value.convert("RGB")
        path = value.get("path") if isinstance(value, dict) else value
        content = value.get("bytes") if isinstance(value, dict) else None
        if not isinstance(content, bytes) and not isinstance(path, str):
            raise self.wrong_value(sample, 0, "an image")
        where = f"{self.reader.label}: image {shortened(image_name(sample), quote=False)} of row {sample.row}"
        return read_image(content or path, where)


class ImageTextFeeder(Feeder):
    """CLIP with both towers; the loss is contrastive, so that it depends on how the samples fall into batches."""

    columns = ("image", "text")
    columns_needed = columns_for_loss = 2

    def __init__(self, images: ImageFeeder, texts: TextFeeder) -> None:
        """Feed each tower as its own kind is fed."""
        self.images, self.texts = images, texts

    def start(self, reader: SourceReader, gradients: bool) -> None:
        """Get both ready."""
        super().start(reader, gradients)
        self.images.start(reader, False)
        self.texts.start(reader, False)

    def stream_of(self, layer_key: str) -> str:
        """Name ``text_model`` or ``vision_model``, the projections behind them included."""
        return "vision_model" if layer_key.startswith("vis") else "text_model"

    def payload_width(self, stream: str) -> int:
        """Give that of images or of texts."""
        return self._of(stream).payload_width("")

    def batch(self, samples: list[Sample]) -> Batch:
        """Lay out images with their texts; a class that has a name becomes a sentence."""
        images = self.images.batch(samples)
        ids = self.texts.tokenize([self._caption(sample) for sample in samples])
        texts = self.texts.sequences(ids, [1] * len(ids), samples)
        streams = {"vision_model": images.streams[""], "text_model": texts.streams[""]}
        return Batch({**images.inputs, **texts.inputs}, streams)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Measure how well it is told which text belongs to which image, and the other way round."""
        logits = output.logits_per_image.float()
        which = torch.arange(len(logits), device=logits.device)
        return (cross_entropy(logits, which, reduction="sum") + cross_entropy(logits.T, which, reduction="sum")) / 2

    def describe(self, stream: str, payloads: Tensor) -> list[dict[str, str]]:
        """Tell of an image its name, of a text the token in its context."""
        return self._of(stream).describe("", payloads)

    def _of(self, stream: str) -> Feeder:
        return self.images if stream == "vision_model" else self.texts

    def _caption(self, sample: Sample) -> str:
        text, names = sample.values[1], self.reader.labels
        if isinstance(text, int) and names and 0 <= text < len(names):
            return f"a photo of a {names[text]}"
        if not isinstance(text, str):
            raise self.wrong_value(sample, 1, "text, or a class with a name")
        return text


def read_image(source: str | os.PathLike[str] | bytes, where: str) -> Any:
    """Decode an image, RGB, of PIL.

    Args:
        source: path, letter by letter, or bytes.
        where: what messages begin with.

    Raises:
        UserError: it is no regular file, of no format that is read, damaged, or has too many pixels.
    """
    from PIL import Image

    if isinstance(source, bytes):
        content = source
    else:
        with open_file(source, where) as file:
            content = file.read(MOST_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PIL, about what is refused below
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
        if width * height > MOST_PIXELS or max(width, height) > LONGEST * min(width, height):
            raise UserError(
                f"{where}: {width} x {height} pixels; images of up to {MOST_PIXELS // 10**6} million pixels and sides "
                f"of up to {LONGEST} to 1 are read"
            )
        return image.convert("RGB")
    except UserError:
        raise
    except Exception as error:  # PIL's readers raise whatever the bytes make them stumble over
        raise UserError(f"{where}: cannot be read as an image ({first_line(error)})") from None


def image_name(sample: Sample) -> str:
    """Say what an image is called in a profile: folder and file as far as known, else its row."""
    value = sample.values[0]
    path = value.get("path") if isinstance(value, dict) else value
    return "/".join(path.split("/")[-2:]) if isinstance(path, str) and path else f"row {sample.row}"
