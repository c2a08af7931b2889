"""Every expert's samples: drawn, split into training and calibration, and laid out for the base model."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from neuron_methods.data.batching import batched, by_length, pad
from neuron_methods.data.classes import ClassFeeder
from neuron_methods.data.feeders import Batch, Feeder
from neuron_methods.data.images import ImageFeeder
from neuron_methods.data.sources import DataSource, Sample, SourceReader, is_local
from neuron_methods.data.texts import TextFeeder, TextToTextFeeder
from neuron_methods.data.tokens import sequence_identity
from neuron_methods.models.kinds import Kind, text_limit
from neuron_methods.models.loading import input_device
from neuron_methods.routing.heads import check_labels
from neuron_methods.routing.route_yaml import Data, Expert, RouteConfig
from neuron_methods.routing.routed_files import CLASSIFIERS
from neuron_methods.support.errors import UserError

_COLUMNS = {"image-classification": ("image", "label"), "text-classification": ("text", "pair", "label")}
_DEFAULT = {kind: (columns[0], columns[-1]) for kind, columns in _COLUMNS.items()}
FEWEST = 4  # calibration samples that can be halved and still hold something


class PromptFeeder(TextFeeder):
    """A decoder's input and target as one sequence; the loss is over the target."""

    columns = ("input", "target")
    columns_for_loss = 2
    end: tuple[int, ...] = ()  # of a target

    def pairs(self, inputs: list[str], targets: list[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Make token ids; the separator is tokenized with the target, which ends the sequence."""
        answers = self.tokenize([self.separator + text for text in targets], special=False)
        return self.tokenize(inputs), [[*answer, *self.end] for answer in answers]


class TextClassFeeder(ClassFeeder, TextFeeder):
    """Classifiers of texts, or of pairs of texts."""

    columns = ("text", "label")
    columns_for_loss = 2

    def __init__(
        self, tokenizer: Any, max_length: int, config: PretrainedConfig, classes: Collection[int] | None = None
    ) -> None:
        """Make a feeder for the model of `config`, of whose classes some may count alone; see `ImageFeeder`."""
        super().__init__(tokenizer, max_length, 0, causal=False)
        self.config, self.classes, self.has_loss = config, classes, True

    def tokens(self, samples: list[Sample]) -> list[list[int]]:
        """Make token ids of texts, or of pairs."""
        texts = [self.texts(samples, column) for column in range(max(1, len(self.reader.columns) - 1))]
        sequences = self.tokenizer(*texts)["input_ids"]
        self.refuse_long(texts[0], sequences)
        return sequences

    def batch(self, samples: list[Sample]) -> Batch:
        """Lay out texts and their classes."""
        # A decoder tells where a text ends by the padding's id.
        ids, mask = pad(self.tokens(samples), self.config.pad_token_id or 0)
        targets = torch.tensor([self.class_of(sample) for sample in samples])
        stream = self.stream("", ids, mask, sequence_identity(ids, mask), samples)
        return Batch({"input_ids": ids, "attention_mask": mask.long()}, {"": stream}, targets)


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
        return float(self.of_samples(model).mean())

    def of_samples(self, model: Any) -> Tensor:
        """Measure each sample's loss, float64 (samples,) on the CPU, in the batches' order."""
        device = input_device(model)
        # Logits are formed where there is something to predict alone: a large vocabulary costs as much as some layers.
        sparse = "logits_to_keep" in inspect.signature(model.forward).parameters
        losses = []
        with torch.no_grad():
            for batch in self.batches:
                batch = batch.to(device)
                if sparse and batch.targets is not None:
                    kept = (batch.targets != -100).any(0).nonzero().squeeze(1)
                    logits = model(**batch.inputs, use_cache=False, logits_to_keep=kept).logits
                    batch = Batch({}, {}, batch.targets[:, kept])
                else:
                    logits = model(**batch.inputs).logits
                assert batch.targets is not None
                for one, targets in zip(logits.split(1), batch.targets.split(1), strict=True):
                    losses.append(self.feeder.loss(SimpleNamespace(logits=one), Batch({}, {}, targets)))
        return torch.stack(losses).double().cpu()


@dataclass(frozen=True)
class Samples:
    """Samples of one source, and the feeder that lays them out."""

    feeder: Feeder
    samples: list[Sample]
    batch_size: int

    def __len__(self) -> int:
        return len(self.samples)

    def inputs(self) -> Iterator[dict[str, Tensor]]:
        """Lay out what the router sees, in batches: no targets."""
        for samples in batched(self.samples, self.batch_size):
            if isinstance(self.feeder, ImageFeeder):
                yield {"pixel_values": self.feeder.pixels(samples)}
            else:
                if isinstance(self.feeder, TextClassFeeder):
                    tokens = self.feeder.tokens(samples)
                else:
                    tokens = self.feeder.tokenize(self.feeder.texts(samples, 0))
                ids, mask = pad(tokens)
                yield {"input_ids": ids, "attention_mask": mask.long()}

    def losses(self, count: int) -> tuple[CalibrationLoss, CalibrationLoss]:
        """Lay out up to `count` samples with their targets to decide by, and as many others that have no say.

        Where there are not enough for both, a third of them have no say.
        """
        deciding = min(count, len(self) - len(self) // 3)
        return self._loss(self.samples[:deciding]), self._loss(self.samples[deciding : deciding + count])

    def _loss(self, samples: list[Sample]) -> CalibrationLoss:
        """Lay samples out, those of like length together."""
        if not isinstance(self.feeder, ImageFeeder):
            order = by_length([sum(map(len, map(str, sample.values))) for sample in samples])
            samples = [samples[i] for i in order]
        return CalibrationLoss(self.feeder, [self.feeder.batch(some) for some in batched(samples, self.batch_size)])


def source_of(name: str, data: Data, kind: Kind) -> DataSource:
    """Find an expert's data source; nothing is opened yet.

    Args:
        name: of the expert.
        data: what the YAML says of it.
        kind: what the base does.

    Raises:
        UserError: it is a file or folder that is not there, a data set of the hub without a split, or a column has a
            name that says nothing to such a model.
    """
    known = _COLUMNS.get(kind, ("text", "input", "target"))
    wrong = next((key for key in data.columns if key not in known), None)
    if wrong is not None:
        raise UserError(f"data.columns: {wrong!r} says nothing to a {kind} model (known: {', '.join(sorted(known))})")
    where = f"expert {name!r}: data.source"
    local = is_local(data.source, where)
    if not local and data.split is None:
        raise UserError(f"{where}: there is no file or folder {data.source}, and a data set of the hub needs a split")
    columns = tuple(data.columns[key] for key in known if key in data.columns)
    return DataSource(name, data.source, local, data.name, data.split, columns)


def labels_of(expert: Expert, kind: Kind, classes: int, where: str) -> list[str]:
    """Name the classes of an expert's head: as the YAML does, else its data; by number where neither knows names.

    Raises:
        UserError: they are not as many as the head has classes, or two are called alike.
    """
    names, place = expert.head_labels, f"{where}: expert {expert.name!r}: head_labels"
    if names is None:
        names = SourceReader(source_of(expert.name, expert.data, kind), _DEFAULT[kind]).labels
        place = f"{where}: expert {expert.name!r}: the labels of its data (head_labels names others)"
    if names is None:
        return [f"LABEL_{number}" for number in range(classes)]
    check_labels(list(names), classes, place)
    return list(names)


def fingerprint_of_samples(parts: dict[str, Samples]) -> str:
    """Tell apart samples that differ."""
    digest = hashlib.sha256()
    for samples in parts.values():
        for sample in samples.samples:
            digest.update(repr(sample.values).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class SampleDrawer:
    """Opens the sources of a configuration for a base, and draws from them.

    Attributes:
        config: says what to read, and how much of it.
        model: the base.
        processor: its tokenizer or image processor.
        kind: what the base does.
        heads: expert -> config of the model with the expert's own head, where it has one.
    """

    config: RouteConfig
    model: Any
    processor: Any
    kind: Kind
    heads: Mapping[str, PretrainedConfig] = field(default_factory=dict)

    def of_expert(self, expert: Expert) -> dict[str, Samples]:
        """Draw an expert's samples: ``train`` for the router to learn from, and what is held out, ``calibration``.

        Raises:
            UserError: a source cannot be read, a column is missing, or too few samples are there.
        """
        settings, enhancement = self.config.router, self.config.enhancement
        labels = self.heads.get(expert.name, self.model.config)
        train = calibration = self._drawn(expert.name, expert.data, settings.samples, enhancement.enabled, labels)
        if expert.calibration is None:
            held = max(round(settings.holdout * len(train)), min(FEWEST, len(train)))
            train, calibration = (
                Samples(train.feeder, part, train.batch_size) for part in (train.samples[held:], train.samples[:held])
            )
        else:
            wanted = max(round(settings.holdout * settings.samples), 2 * enhancement.samples)
            name = f"{expert.name}.calibration"
            calibration = self._drawn(name, expert.calibration, wanted, enhancement.enabled, labels)
        for part, samples in (("training", train), ("calibration", calibration)):
            if len(samples) < FEWEST:
                raise UserError(
                    f"expert {expert.name!r}: {len(samples)} {part} samples from {samples.feeder.reader.label} that "
                    f"are not empty; {FEWEST} are needed at least"
                )
        if enhancement.enabled:
            calibration.losses(enhancement.samples)  # what is wrong with them is better known now than in an hour
        return {"train": train, "calibration": calibration}

    def of_background(self, number: int, data: Data) -> dict[str, Samples]:
        """Draw samples that no expert is for, inputs alone, all of them to train on; errors as for an expert's."""
        name, count = f"background-{number}", self.config.router.samples
        samples = self._drawn(name, data, count, False, self.model.config)
        if not samples:
            raise UserError(f"{samples.feeder.reader.label}: all its rows are empty")
        return {"train": samples}

    def _drawn(self, name: str, data: Data, count: int, needs_loss: bool, labels: PretrainedConfig) -> Samples:
        feeder = self._feeder(data, labels)
        reader = SourceReader(source_of(name, data, self.kind), feeder.columns)
        label = "label" if self.kind in CLASSIFIERS else "target"
        one_text = self.kind == "causal" and "text" in data.columns
        if needs_loss and len(reader.columns) < 2 and not one_text:
            raise UserError(
                f"{reader.label}: labels are missing: no column {label!r}, and enhancement needs a loss; name the "
                f"column as data.columns.{label}, or set enhancement.enabled: false"
            )
        feeder.columns_needed = 1  # text-to-text feeders ask for a target even where the loss is not wanted
        feeder.start(reader, False)
        return Samples(feeder, list(reader.samples(count, self.config.router.seed)), self.config.batch_size)

    def _feeder(self, data: Data, config: PretrainedConfig) -> Feeder:
        text, processor = self.config.text, self.processor
        limit = min(text.max_length, text_limit(config) or text.max_length)
        if self.kind in CLASSIFIERS:
            wrong = next((c for c in data.labels or () if not 0 <= c < config.num_labels), None)
            if wrong is not None:
                raise UserError(f"data.labels: {wrong} is none of the model's {config.num_labels} classes")
            if self.kind == "text-classification":
                return TextClassFeeder(processor, limit, config, data.labels)
            return ImageFeeder(processor, config, has_loss=True, classes=data.labels)
        feeder: TextFeeder
        if self.kind == "text-to-text":
            feeder = TextToTextFeeder(processor, limit, 0, self.model)
        else:
            feeder = PromptFeeder(processor, limit, 0, causal=True, separator=text.separator)
            if text.end_of_sequence and processor.eos_token_id is not None:
                feeder.end = (processor.eos_token_id,)
        feeder.truncates = False
        return feeder
