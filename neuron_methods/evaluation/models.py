"""MODEL, whatever it is: its config, its processor, and the model itself in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer

from neuron_methods.models.loading import (
    ModelName,
    load_checkpoint,
    load_processor,
    quiet_transformers,
    read_architecture,
    read_config,
)
from neuron_methods.models.processes import process_state
from neuron_methods.support.errors import UserError

#: The file that marks a routed model's directory.
ROUTED_FILE = "routed_config.json"


class Processors:
    """A model's tokenizer and image processor, each loaded when it is first asked for."""

    def __init__(self, name: ModelName) -> None:
        self._name = name

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; raises UserError if there is none."""
        return load_processor(AutoTokenizer, self._name, "tokenizer")

    @cached_property
    def image_processor(self) -> Any:
        """The image processor; raises UserError if there is none."""
        return load_processor(AutoImageProcessor, self._name, "image processor")


@dataclass(frozen=True)
class OpenedModel:
    """A model in memory, ready to be evaluated.

    Attributes:
        model: as transformers makes it, frozen and in evaluation mode.
        processor: its `Processors`.
        device: where its inputs go.
    """

    model: Any
    processor: Any
    device: torch.device


@dataclass(frozen=True)
class ModelSpec:
    """MODEL as the user names it, looked up but not loaded.

    Attributes:
        name: path, hub id, or base+adapter; the base of a routed model.
        routed: directory of a routed model; None: it is none.
        config: of the model (of the base, if routed).
        architecture: class of transformers.
    """

    name: ModelName
    routed: Path | None
    config: Any
    architecture: str

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Find out what MODEL is; raises UserError where there is no such model."""
        name = ModelName.parse(text)
        directory = Path(name.base)
        if name.adapter is None and (directory / ROUTED_FILE).is_file():
            from neuron_methods.routing.routed_files import RoutedConfig

            base = ModelName(RoutedConfig.read(directory).base_reference(directory))
            config = read_config(base)
            return cls(base, directory, config, read_architecture(base, config))
        if Path(name.base).is_dir() and not (Path(name.base) / "config.json").is_file():
            name = _adapter_by_itself(name)
        config = read_config(name)
        return cls(name, None, config, read_architecture(name, config))

    @property
    def shown(self) -> str:
        """The model's name without the directories of local paths."""
        return self.name.shown if self.routed is None else self.routed.resolve().name

    @property
    def processors(self) -> Processors:
        """The model's tokenizer and image processor, not loaded yet."""
        return Processors(self.name)


@contextlib.contextmanager
def open_model(
    spec: str | ModelSpec, dtype: str = "auto", max_memory: dict[Any, int | str] | None = None
) -> Iterator[OpenedModel]:
    """Load a model, of whatever kind, and let accelerate place it for as long as the block lasts.

    Args:
        spec: directory, repository of the hub, base+adapter, or a routed model's directory.
        dtype: ``auto`` (see `computing_dtype`), ``float32``, ``bfloat16`` or ``float16``.
        max_memory: accelerate's bounds per device, by default what is free.

    Raises:
        UserError: there is no such model, or it cannot be loaded.
    """
    found = ModelSpec.parse(spec) if isinstance(spec, str) else spec
    if found.routed:
        yield _open_routed(found, dtype)
        return
    with load_checkpoint(found.name, computing_dtype(dtype), max_memory) as (model, device):
        yield OpenedModel(model, found.processors, device)


def computing_dtype(dtype: str) -> str:
    """What ``auto`` means: as stored; but float32 on a CPU, where 16 bits are several times slower."""
    if dtype == "auto" and process_state().device.type == "cpu":
        return "float32"
    return dtype


def _adapter_by_itself(name: ModelName) -> ModelName:
    """base+adapter for the directory of an adapter, whose config names the base."""
    import json

    file = Path(name.base) / "adapter_config.json"
    if name.adapter is not None or not file.is_file():
        raise UserError(f"model {name.shown}: the directory holds no config.json; it is no model")
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise UserError(f"model {name.shown}: the adapter's config names no base; write base+adapter")
    return ModelName(base, name.base)


def _open_routed(spec: ModelSpec, dtype: str) -> OpenedModel:
    from neuron_methods.routing import NeuronRoutedModel

    state = process_state()
    placement: Any = None if state.device.type == "cpu" else {"": state.device}
    if placement is not None and state.num_processes == 1:
        placement = "auto"
    with quiet_transformers():
        model = NeuronRoutedModel.from_pretrained(str(spec.routed), device_map=placement, dtype=computing_dtype(dtype))
    return OpenedModel(model.eval(), spec.processors, state.device)


def architecture_of(model: Any) -> str:
    """The class of transformers that a model in memory is, under the wrappers of peft and routing."""
    if hasattr(model, "routed_config"):
        model = model.base
    elif hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return type(model).__name__
