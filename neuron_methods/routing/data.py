"""Every expert's samples: drawn, split into training and calibration, and laid out for the base model."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from neuron_methods.data.batching import batched, by_length, pad
from neuron_methods.data.feeders import Batch, Feeder
from neuron_methods.data.images import ImageFeeder
from neuron_methods.data.sources import DataSource, Sample, SourceReader
from neuron_methods.data.texts import TextFeeder, TextToTextFeeder, target_loss
from neuron_methods.models.kinds import text_limit
from neuron_methods.models.loading import input_device
from neuron_methods.routing.base import Routable
from neuron_methods.routing.route_yaml import Data, Expert, RouteConfig, Text
from neuron_methods.support.errors import UserError

FEWEST = 4  # calibration samples that can be halved and still hold something


class _Refusing(TextFeeder):
    """Refuses texts that it would have to cut off."""

    def tokenize(self, texts: list[str], special: bool = True) -> list[list[int]]:
        """Token ids; raises UserError for a text of more than `max_length`."""
        sequences = self.tokenizer(texts, add_special_tokens=special)["input_ids"]
        for text, tokens in zip(texts, sequences, strict=True):
            self.refuse_long(text, len(tokens))
        return sequences

    def refuse_long(self, text: str, tokens: int) -> None:
        """Raise UserError if so many tokens are too many."""
        if tokens > self.max_length:
            raise UserError(
                f"{self.reader.label}: a sample is {tokens} tokens long ({text[:30]!r}...), and {self.max_length} is "
                "the limit (text.max_length, or the base model's context); shorten it or raise the limit"
            )


class TargetFeeder(_Refusing, TextToTextFeeder):
    """Text-to-text models: input for the encoder, target for the decoder."""


class PromptFeeder(_Refusing):
    """A decoder's input and target as one sequence; the loss is over the target."""

    columns = ("input", "target")
    columns_for_loss = 2

    def __init__(self, tokenizer: Any, text: Text, max_length: int) -> None:
        """Feed texts of up to `max_length` tokens, joined and ended as `text` says."""
        super().__init__(tokenizer, max_length, context=0, causal=True, separator=text.separator)
        self.end = [tokenizer.eos_token_id] if text.end_of_sequence and tokenizer.eos_token_id is not None else []

    def batch(self, samples: list[Sample]) -> Batch:
        """Input, separator with target, and the end of the sequence."""
        texts = self.texts(samples, 0)
        prompts = self.tokenize(texts)
        if len(self.reader.columns) < 2:
            return self.sequences(prompts, [1] * len(prompts), samples)
        answers = self.tokenize([self.separator + text for text in self.texts(samples, 1)], special=False)
        both = [prompt + answer + self.end for prompt, answer in zip(prompts, answers, strict=True)]
        for text, tokens in zip(texts, both, strict=True):
            self.refuse_long(text, len(tokens))
        return self.sequences(both, [len(prompt) for prompt in prompts], samples)


class TaskImageFeeder(ImageFeeder):
    """Image classifiers whose head may have more classes than the task at hand."""

    def __init__(self, processor: Any, config: Any, classes: Sequence[int] | None) -> None:
        """Count `classes` alone in the loss; None: all of the head."""
        super().__init__(processor, config, has_loss=True)
        self.classes = classes

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Class of the image, among those of the task."""
        if self.classes is None:
            return super().loss(output, batch)
        logits = output.logits.float()
        others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
        others[list(self.classes)] = False
        return cross_entropy(logits.masked_fill(others, float("-inf")), batch.targets, reduction="sum")

    def batch(self, samples: list[Sample]) -> Batch:
        """Pixels and classes; raises UserError for a class that is none of the task's."""
        batch = super().batch(samples)
        if self.classes is not None and batch.targets is not None:
            strange = [target for target in batch.targets.tolist() if target not in self.classes]
            if strange:
                raise UserError(f"{self.reader.label}: class {strange[0]} is none of the expert's data.labels")
        return batch


class ExpertSamples:
    """The samples of one expert.

    Attributes:
        name: the expert's.
        train: what the router learns from.
        calibration: what is held out of that.
        parts: names of the two.
        batch_size: samples per forward pass.
    """

    parts: tuple[str, ...] = ("train", "calibration")

    def __init__(self, expert: Expert, config: RouteConfig, model: Any, processor: Any, kind: Routable) -> None:
        """Open the sources and draw.

        Raises:
            UserError: a source cannot be read, a column is missing, or too few samples are there.
        """
        self.name = expert.name
        self.kind = kind
        self.batch_size = config.batch_size
        settings = config.router
        needs_loss = config.enhancement.enabled

        def feeder(data: Data, what: str) -> Feeder:
            return _open(f"{expert.name}{what}", data, config, model, processor, kind, needs_loss)

        self._train = self._calibration = feeder(expert.data, "")
        drawn = list(self._train.reader.samples(settings.samples, settings.seed))
        if expert.calibration is None:
            held = max(round(settings.holdout * len(drawn)), min(FEWEST, len(drawn)))
            self.calibration, self.train = drawn[:held], drawn[held:]
        else:
            self._calibration = feeder(expert.calibration, ".calibration")
            wanted = max(round(settings.holdout * settings.samples), config.enhancement.samples)
            self.train, self.calibration = drawn, list(self._calibration.reader.samples(wanted, settings.seed))
        for part, samples, source in (
            ("training", self.train, self._train),
            ("calibration", self.calibration, self._calibration),
        ):
            if len(samples) < FEWEST:
                raise UserError(
                    f"expert {expert.name!r}: {len(samples)} {part} samples from {source.reader.label} that are not "
                    f"empty; {FEWEST} are needed at least"
                )
        if needs_loss:
            self.labelled(config.enhancement.samples)  # what is wrong with them is better known now than in an hour

    def inputs(self, part: str) -> Iterator[dict[str, Tensor]]:
        """What the router sees of the samples of ``train`` or ``calibration``, in batches: no targets."""
        feeder = self._train if part == "train" else self._calibration
        for samples in batched(getattr(self, part), self.batch_size):
            if isinstance(feeder, ImageFeeder):
                yield {"pixel_values": feeder.pixels(samples)}
            else:
                ids, mask = pad(feeder.tokenize(feeder.texts(samples, 0)))
                yield {"input_ids": ids, "attention_mask": mask.long()}

    def labelled(self, count: int) -> tuple[Feeder, list[Batch]]:
        """Batches with targets of the first `count` calibration samples, those of like length together."""
        samples = self.calibration[:count]
        if self.kind != "image-classification":
            order = by_length([sum(map(len, map(str, sample.values))) for sample in samples])
            samples = [samples[i] for i in order]
        return self._calibration, [self._calibration.batch(some) for some in batched(samples, self.batch_size)]

    def fingerprint(self) -> str:
        """Tells apart samples that differ."""
        digest = hashlib.sha256()
        for sample in (*self.train, None, *self.calibration):
            _update(digest, sample and sample.values)
        return digest.hexdigest()[:16]


class BackgroundSamples(ExpertSamples):
    """Samples that no expert is for: inputs alone, all of them to train on."""

    parts = ("train",)

    def __init__(
        self, data: Data, number: int, config: RouteConfig, model: Any, processor: Any, kind: Routable
    ) -> None:
        """Open the source and draw; errors as for an expert's."""
        self.name = f"background-{number}"
        self.kind = kind
        self.batch_size = config.batch_size
        self._train = _open(self.name, data, config, model, processor, kind, needs_loss=False)
        self.train = list(self._train.reader.samples(config.router.samples, config.router.seed))
        self.calibration = []
        if not self.train:
            raise UserError(f"{self._train.reader.label}: all its rows are empty")


def _open(
    name: str, data: Data, config: RouteConfig, model: Any, processor: Any, kind: Routable, needs_loss: bool
) -> Feeder:
    """The feeder of a source."""
    made = _feeder(kind, config.text, model, processor, data.labels)
    reader = SourceReader(_source(name, data), _defaults(kind, data, made))
    _refuse_unlabelled(reader, kind, data, needs_loss)
    # Text-to-text feeders ask for a target even where the loss is not wanted.
    made.columns_needed = 1
    made.start(reader, False)
    return made


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, (tuple, list)):
        for part in value:
            _update(digest, part)
    elif isinstance(value, dict):
        _update(digest, sorted(value.items(), key=lambda item: item[0]))
    else:
        digest.update(value if isinstance(value, bytes) else repr(value).encode())
        digest.update(b"\0")


def _source(name: str, data: Data) -> DataSource:
    local = Path(data.source).exists()
    if not local and (Path(data.source).suffix in (".jsonl", ".json", ".csv", ".txt", ".parquet", ".tsv")):
        raise UserError(f"expert {name!r}: data.source: there is no file {data.source}")
    if not local and data.split is None:
        raise UserError(
            f"expert {name!r}: data.source: there is no file or folder {data.source}, and a data set of the hub needs "
            "a split"
        )
    columns = tuple(data.columns[key] for key in ("text", "input", "image", "target", "label") if key in data.columns)
    return DataSource(name, data.source, local, data.name, data.split, columns)


def _defaults(kind: Routable, data: Data, feeder: Feeder) -> tuple[str, ...]:
    wanted = {"image", "label"} if kind == "image-classification" else {"input", "target", "text"}
    wrong = next((key for key in data.columns if key not in wanted), None)
    if wrong is not None:
        raise UserError(f"data.columns: {wrong!r} says nothing to a {kind} model (known: {', '.join(sorted(wanted))})")
    return feeder.columns


def _refuse_unlabelled(reader: SourceReader, kind: Routable, data: Data, needs_loss: bool) -> None:
    if len(reader.columns) >= 2 or not needs_loss or (kind == "causal" and "text" in data.columns):
        return
    label = "label" if kind == "image-classification" else "target"
    raise UserError(
        f"{reader.label}: labels are missing: no column {label!r}, and enhancement needs a loss; name the column as "
        f"data.columns.{label}, or set enhancement.enabled: false"
    )


def _feeder(kind: Routable, text: Text, model: Any, processor: Any, classes: Sequence[int] | None) -> Feeder:
    if kind == "image-classification":
        wrong = next((c for c in classes or () if not 0 <= c < model.config.num_labels), None)
        if wrong is not None:
            raise UserError(f"data.labels: {wrong} is none of the model's {model.config.num_labels} classes")
        return TaskImageFeeder(processor, model.config, classes)
    limit = min(text.max_length, text_limit(model.config) or text.max_length)
    if kind == "text-to-text":
        return TargetFeeder(processor, limit, 0, model)
    return PromptFeeder(processor, text, limit)


@dataclass(frozen=True)
class CalibrationLoss:
    """The mean over calibration samples of each one's loss (mean over its targets), in nats."""

    feeder: Feeder
    batches: list[Batch]

    @property
    def samples(self) -> int:
        """How many samples it is over."""
        return sum(len(next(iter(batch.inputs.values()))) for batch in self.batches)

    def __call__(self, model: Any) -> float:
        """Measure `model` as it stands."""
        device = input_device(model)
        # Logits are formed where there is something to predict alone: a large vocabulary costs as much as some layers.
        sparse = "logits_to_keep" in inspect.signature(model.forward).parameters
        total = 0.0
        with torch.no_grad():
            for batch in self.batches:
                batch = batch.to(device)
                if sparse and batch.targets is not None:
                    kept = (batch.targets != -100).any(0).nonzero().squeeze(1)
                    output = model(**batch.inputs, use_cache=False, logits_to_keep=kept)
                    total += float(target_loss(output.logits, batch.targets[:, kept]))
                else:
                    total += float(self.feeder.loss(model(**batch.inputs), batch))
        return total / self.samples
