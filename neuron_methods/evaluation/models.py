"""MODEL, whatever it is: its config, its processor, and the model itself in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from neuron_methods.adapters.live import opened_model
from neuron_methods.models.loading import (
    computing_dtype,
    device_map,
    load_processor,
    placed_weights,
    read_architecture,
    read_config,
)
from neuron_methods.models.processes import process_state
from neuron_methods.models.reference import ModelName, Place
from neuron_methods.plugin.in_memory import HeldModel
from neuron_methods.routing.heads import Classes
from neuron_methods.routing.model import NeuronRoutedModel
from neuron_methods.routing.routed_files import RoutedConfig, is_routed
from neuron_methods.support.quiet import quiet_transformers


class Processors:
    """A model's tokenizer and image processor, each loaded when it is first asked for."""

    def __init__(self, name: ModelName) -> None:
        self._name = name

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; raises UserError if there is none."""
        return load_processor("AutoTokenizer", self._name.base, f"model {self._name.shown}")

    @cached_property
    def image_processor(self) -> Any:
        """The image processor; raises UserError if there is none."""
        return load_processor("AutoImageProcessor", self._name.base, f"model {self._name.shown}")


@dataclass(frozen=True)
class OpenedModel:
    """A model in memory, frozen and in evaluation mode, with its `Processors` and the device where its inputs go."""

    model: Any
    processor: Any
    device: torch.device


@dataclass(frozen=True)
class ModelSpec:
    """MODEL as the user names it, looked up but not loaded.

    Attributes:
        name: of the model; of the base, if routed.
        routed: directory of a routed model; None: it is none.
        config: of the model (of the base, if routed, with the classes of all heads).
        architecture: class of transformers.
    """

    name: ModelName
    routed: Path | None
    config: Any
    architecture: str

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Find out what MODEL is; raises UserError where there is no such model."""
        routed = Path(text) if is_routed(text) else None
        stored = None if routed is None else RoutedConfig.read(routed)
        if routed is not None and stored is not None:
            name = ModelName(Place.parse(stored.base_reference(routed)))
        else:
            name = ModelName.find(text)
        config = read_config(name.base, f"model {name.shown}")
        if stored is not None and stored.architecture is not None:
            classes = Classes.of(stored.experts, stored.architecture, config, text)
            return cls(name, routed, classes.config(config), stored.architecture)
        return cls(name, routed, config, read_architecture(config, f"model {name.shown}"))

    @property
    def shown(self) -> str:
        """The model's name without the directories of local paths."""
        return self.name.shown if self.routed is None else self.routed.resolve().name

    @property
    def processors(self) -> Processors:
        """The model's tokenizer and image processor, not loaded yet."""
        return Processors(self.name)


@contextlib.contextmanager
def open_held(held: HeldModel, dtype: str = "auto") -> Iterator[OpenedModel]:
    """Give a model that was merged in memory as `open_model` gives one from files; arguments and errors as there."""
    name = ModelName(Place.parse(str(held.place)))
    with placed_weights(name.base, "the merge", computing_dtype(dtype), held=held.tensors) as model:
        yield OpenedModel(model, Processors(name), process_state().device)


@contextlib.contextmanager
def open_model(spec: str | ModelSpec, dtype: str = "auto") -> Iterator[OpenedModel]:
    """Load a model, of whatever kind, and let accelerate place it for as long as the block lasts.

    Args:
        spec: directory, repository of the hub, adapter, base+adapter, or a routed model's directory.
        dtype: ``auto`` (see `computing_dtype`), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        UserError: there is no such model, or it cannot be loaded.
    """
    found = ModelSpec.parse(spec) if isinstance(spec, str) else spec
    if not found.routed:
        with opened_model(found.name, computing_dtype(dtype)) as (model, device):
            yield OpenedModel(model, found.processors, device)
        return
    with quiet_transformers():
        place, placed = str(found.routed), device_map()
        routed = NeuronRoutedModel.from_pretrained(place, device_map=placed, dtype=computing_dtype(dtype))
    yield OpenedModel(routed.eval(), found.processors, process_state().device)


def architecture_of(model: Any) -> str:
    """Name the class of transformers that a model in memory is, under the wrappers of peft and routing."""
    if hasattr(model, "routed_config"):
        model = model.base
    elif hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return type(model).__name__
