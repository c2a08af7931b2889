"""From samples to what a model reads: tensors, the tokens behind them, and the loss of its task.

A *feeder* stands for a kind of model: decoders and other text models, text-to-text models (`texts`), image
classifiers and other vision models, images with texts (`images`). It knows which columns a sample needs, pads a
batch, says which token stream each stack of layers reads, computes the loss, and turns exemplars back into text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuron_methods.data.sources import Sample, SourceReader
from neuron_methods.data.tokens import TokenBatch
from neuron_methods.support.errors import UserError


@dataclass(frozen=True)
class Batch:
    """What one forward pass reads.

    Attributes:
        inputs: the model's keyword arguments.
        streams: stream -> its tokens.
        targets: token ids (B, T) or classes (B,) that the logits at the same place are to predict; -100 where there is
            nothing to predict. None: no loss.
    """

    inputs: dict[str, Tensor]
    streams: dict[str, TokenBatch]
    targets: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Move inputs and targets to `device`."""
        inputs = {name: values.to(device) for name, values in self.inputs.items()}
        return Batch(inputs, self.streams, None if self.targets is None else self.targets.to(device))


class Feeder(ABC):
    """Feeds one kind of model, one source after the other.

    Attributes:
        columns: the names taken where a source names no columns.
        columns_needed: how many of them a sample must have.
        columns_for_loss: how many of them the loss needs.
        has_loss: whether this model has a loss that we can compute.
    """

    columns: tuple[str, ...]
    columns_needed: int = 1
    columns_for_loss: int = 1
    has_loss: bool = True

    def start(self, reader: SourceReader, gradients: bool) -> None:
        """Get ready for the samples of a source.

        Raises:
            UserError: the source lacks a column, or `gradients` are wanted of a model without a loss.
        """
        self.reader = reader
        if gradients and not self.has_loss:
            raise UserError(
                "--gradients needs a loss, and this model has none that is known here: causal, text-to-text and "
                "image-classification models and CLIPModel have one (is its head missing?)"
            )
        needed = self.columns_for_loss if gradients else self.columns_needed
        if len(reader.columns) < needed:
            why = "the loss needs" if gradients else "this kind of model reads"
            raise UserError(
                f"{reader.label}: {why} {needed} columns ({' and '.join(self.columns)}), found "
                f"{', '.join(reader.columns)}; name them: --data {reader.source.name}=...:{','.join(self.columns)}"
            )

    def stream_of(self, layer_key: str) -> str:
        """Name the stream that a layer, or a module by its path in memory, reads."""
        return ""

    @abstractmethod
    def payload_width(self, stream: str) -> int:
        """Give the width of the payloads of a stream's exemplars."""

    @abstractmethod
    def batch(self, samples: list[Sample]) -> Batch:
        """Lay samples out for a forward pass, on the CPU; raises UserError for values of a wrong kind."""

    @abstractmethod
    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Add up over the batch each sample's loss, a scalar."""

    @abstractmethod
    def describe(self, stream: str, payloads: Tensor) -> list[dict[str, str]]:
        """Tell what is behind the payloads of a stream, int32 (exemplars, width), as fields of text."""

    def wrong_value(self, sample: Sample, column: int, needed: str) -> UserError:
        """Make the error about a value that is not what is needed."""
        value = sample.values[column]
        return UserError(
            f"{self.reader.label}: column {self.reader.columns[column]!r} of row {sample.row} holds "
            f"{type(value).__name__}, needed is {needed}; which columns to read is said in "
            f"{self.reader.source.told_by}"
        )


def orders_and_rows(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Read `order` and `row` of samples, int64 (B,) each."""
    return torch.tensor([sample.order for sample in samples]), torch.tensor([sample.row for sample in samples])
