"""What the feeders of all classifiers share: which class a sample is of, and how well a model tells it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from neuron_methods.data.feeders import Batch, Feeder
from neuron_methods.data.sources import Sample
from neuron_methods.support.errors import UserError


class ClassFeeder(Feeder):
    """Feeds classifiers; the label is a sample's last column.

    Attributes:
        config: of the model, which knows its labels.
        classes: those that count in the loss, where the head has more than the task at hand; None: all.
    """

    config: Any
    classes: Collection[int] | None = None

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Measure how well a sample's class is told, among those that count."""
        logits = output.logits.float()
        if self.classes is not None:
            others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
            others[list(self.classes)] = False
            logits = logits.masked_fill(others, float("-inf"))
        return cross_entropy(logits, batch.targets, reduction="sum")

    def class_of(self, sample: Sample) -> int:
        """Find the model's number of a sample's label; raises UserError if it has no such class."""
        label, names = sample.values[-1], self.reader.labels
        index = class_index(label, names, self.config)
        if index is None:
            shown = names[label] if isinstance(label, int) and names and 0 <= label < len(names) else label
            raise self.wrong_value(
                sample, len(sample.values) - 1, f"one of the model's {self.config.num_labels} labels, not {shown!r}"
            )
        if self.classes is not None and index not in self.classes:
            raise UserError(f"{self.reader.label}: class {index} of row {sample.row} is none of the labels that count")
        return index


def class_index(label: Any, names: list[str] | None, config: Any) -> int | None:
    """Find the number of a label among a model's classes: by its name if both know names, else as it stands.

    `names` are the data set's of its numbers, if it has any. None where the model has no such class.
    """
    known = config.label2id or {}
    model_knows_names = any(not name.startswith("LABEL_") for name in known)  # transformers' placeholders
    if isinstance(label, int) and names and 0 <= label < len(names):
        if model_knows_names:
            label = names[label]
        elif all(name.isdecimal() for name in names):  # folders named 3 and 7 hold the classes 3 and 7
            label = int(names[label])
    if isinstance(label, str) and label in known:
        number = str(known[label])  # a text where one of transformers' own examples trained the model
        label = int(number) if number.isdecimal() else None
    return label if isinstance(label, int) and 0 <= label < config.num_labels else None
