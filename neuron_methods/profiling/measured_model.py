"""The model whose neurons are watched: in memory, with the map of its neurons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from neuron_methods.adapters.live import opened_model
from neuron_methods.models.loading import read_architecture, read_config
from neuron_methods.models.reference import ModelName
from neuron_methods.neurons import NeuronMap, neuron_map


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, all weights frozen, ready to be called.

    Attributes:
        model: as transformers makes it, with the adapter injected if there is one.
        neurons: its neurons.
        device: where its inputs go.
    """

    model: PreTrainedModel
    neurons: NeuronMap
    device: torch.device

    def forward(self, inputs: dict[str, Any], with_head: bool) -> Any:
        """Run one forward pass; without its head a decoder saves the product with the vocabulary."""
        return run(self.model if with_head else self.model.base_model, inputs)


def run(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    """Run one forward pass without keeping anything for a next one."""
    cache = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    return model(**inputs, **cache)


def read_neurons(name: ModelName) -> NeuronMap:
    """Read the neurons of a model from its config alone.

    Raises:
        UserError: there is no config, its architecture is unknown, or the model's family is.
    """
    where = f"model {name.shown}"
    config = read_config(name.base, where)
    return neuron_map(config, read_architecture(config, where))


@contextmanager
def load_model(
    name: ModelName, dtype: str, max_memory: dict[Any, int | str] | None = None, *, merged: bool = False
) -> Iterator[LoadedModel]:
    """Load a model whose neurons are known, as `adapters.live.opened_model` does.

    Raises:
        UserError: as there, and as `read_neurons`.
    """
    neurons = read_neurons(name)
    with opened_model(name, dtype, max_memory, merged=merged) as (model, device):
        yield LoadedModel(model, neurons, device)
