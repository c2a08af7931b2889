"""Loading the model to profile or to evaluate, placing it, and finding the feeder for its kind."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PretrainedConfig, PreTrainedModel

from neuron_methods.data.feeders import Feeder
from neuron_methods.data.images import ImageFeeder, ImageTextFeeder
from neuron_methods.data.texts import TextFeeder, TextToTextFeeder
from neuron_methods.models.processes import process_state
from neuron_methods.neurons import NeuronMap, neuron_map
from neuron_methods.support.errors import UserError
from neuron_methods.support.quiet import quiet_transformers


@dataclass(frozen=True)
class ModelName:
    """MODEL as the user writes it: a directory, a repository of the hub, or base+adapter of either."""

    base: str
    adapter: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """Read MODEL. A directory whose own name contains a ``+`` is taken for what it is."""
        if Path(text).exists():
            return cls(text)
        base, plus, adapter = text.partition("+")
        if plus and (not base or not adapter or "+" in adapter):
            raise UserError(f"model {text!r}: expected a model, or base+adapter")
        return cls(base, adapter or None)

    @property
    def shown(self) -> str:
        """The name without the directories of local paths."""
        return "+".join(Path(p).resolve().name if Path(p).exists() else p for p in self._parts)

    @property
    def fingerprint(self) -> str:
        """Tells apart models that are shown alike."""
        places = [str(Path(p).resolve()) if Path(p).exists() else p for p in self._parts]
        return hashlib.sha256(repr(places).encode()).hexdigest()[:16]

    @property
    def _parts(self) -> tuple[str, ...]:
        return (self.base, self.adapter) if self.adapter else (self.base,)


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
        """One forward pass; without its head a decoder saves the product with the vocabulary."""
        module = self.model if with_head else self.model.base_model
        cache = {"use_cache": False} if getattr(self.model.config, "use_cache", False) else {}
        return module(**inputs, **cache)


def read_neurons(name: ModelName) -> NeuronMap:
    """The neurons of a model, from its config alone; errors as in `load_model`."""
    config = read_config(name)
    return neuron_map(config, read_architecture(name, config))


@contextlib.contextmanager
def load_model(name: ModelName, dtype: str, max_memory: dict[Any, int | str] | None = None) -> Iterator[LoadedModel]:
    """Load a model whose neurons are known, as `load_checkpoint` does.

    Raises:
        UserError: as there, or the model's family is unknown.
    """
    neurons = read_neurons(name)
    with load_checkpoint(name, dtype, max_memory) as (model, device):
        yield LoadedModel(model, neurons, device)


@contextlib.contextmanager
def load_checkpoint(
    name: ModelName, dtype: str, max_memory: dict[Any, int | str] | None = None
) -> Iterator[tuple[PreTrainedModel, torch.device]]:
    """Load a model and let accelerate place it, for as long as the block lasts.

    A process on its own spreads the model over what there is, and offloads to the CPU and to disk (into a directory
    that is removed afterwards) what does not fit. Under ``accelerate launch`` every process holds the whole model.

    Args:
        name: which model; an adapter stays unmerged.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        max_memory: accelerate's bounds per device, by default what is free.

    Yields:
        The model as transformers makes it, all weights frozen, and the device where its inputs go.

    Raises:
        UserError: there is no such model, its architecture is unknown, its weights are not safetensors, or some of
            them are missing or of another shape than its config says.
    """
    config = read_config(name)
    architecture = read_architecture(name, config)
    state = process_state()
    alone = state.num_processes == 1
    with tempfile.TemporaryDirectory(prefix="mergekit-neuron-offload-") as offload:
        placement: dict[str, Any] = {"device_map": {"": state.device}}
        if alone and not (state.device.type == "cpu" and torch.accelerator.is_available()):
            placement = {"device_map": "auto", "offload_folder": offload, "max_memory": max_memory}
        with quiet_transformers():
            try:
                model, found = getattr(transformers, architecture).from_pretrained(
                    name.base,
                    config=config,
                    dtype=dtype,
                    use_safetensors=True,
                    output_loading_info=True,
                    **placement,
                )
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(f"model {name.shown}: cannot load it: {error}") from error
        if found["missing_keys"]:  # transformers would go on with random numbers in their place
            missing = sorted(found["missing_keys"])
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise UserError(
                f"model {name.shown}: its files lack weights of {architecture}, which its config names: "
                f"{', '.join(missing[:3])}{more}"
            )
        if name.adapter is not None:
            _inject_adapter(model, name)
        yield model.eval().requires_grad_(False), state.device


def make_feeder(
    name: ModelName, model: PreTrainedModel, max_length: int, context: int, separator: str = "\n"
) -> Feeder:
    """The feeder for a model's kind, with the tokenizer or image processor saved beside the model.

    Raises:
        UserError: it is of no kind that can be fed, or the tokenizer or image processor is missing.
    """
    architecture = type(model).__name__

    def tokenizer() -> Any:
        return load_processor(AutoTokenizer, name, "tokenizer")

    def images(has_loss: bool) -> ImageFeeder:
        return ImageFeeder(load_processor(AutoImageProcessor, name, "image processor"), model.config, has_loss)

    if architecture == "CLIPModel":
        limit = min(max_length, model.config.text_config.max_position_embeddings)
        return ImageTextFeeder(images(False), TextFeeder(tokenizer(), limit, context, causal=False))
    if model.main_input_name == "pixel_values":
        return images("ForImageClassification" in architecture)
    if model.config.is_encoder_decoder and not architecture.endswith(("EncoderModel", "ForTokenClassification")):
        if not hasattr(model, "_shift_right") or not architecture.endswith(("ForConditionalGeneration", "Model")):
            raise UserError(f"model {name.shown}: {architecture} cannot be profiled; save it as a model that generates")
        return TextToTextFeeder(tokenizer(), max_length, context, model)
    limit = getattr(model.config, "max_position_embeddings", None)
    causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    return TextFeeder(tokenizer(), min(max_length, limit or max_length), context, causal, separator)


def read_config(name: ModelName) -> PretrainedConfig:
    """The config of a model; raises UserError if there is none to read."""
    try:
        return AutoConfig.from_pretrained(name.base)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model {name.shown}: cannot read its config: {error}") from error


def read_architecture(name: ModelName, config: PretrainedConfig) -> str:
    """The class that the config names; raises UserError if transformers has no such class."""
    architecture = (config.architectures or [""])[0]
    if not hasattr(transformers, architecture or "-"):
        raise UserError(
            f"model {name.shown}: its config's first architecture, {architecture!r}, is no class of transformers "
            f"{transformers.__version__}"
        )
    return architecture


def _inject_adapter(model: PreTrainedModel, name: ModelName) -> None:
    """Put an adapter's modules into the model, unmerged: nothing is rounded, and offloaded weights stay offloaded."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 for checkpointing under a name that is to go.
            warnings.simplefilter("ignore", FutureWarning)
            wrapper = PeftModel.from_pretrained(model, name.adapter)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model {name.shown}: cannot load the adapter: {error}") from error
    if any(config.is_prompt_learning for config in wrapper.peft_config.values()):
        raise UserError(f"model {name.shown}: the adapter learned prompts, it does not change the neurons")


def load_processor(kind: type, name: ModelName, what: str) -> Any:
    """The tokenizer or image processor saved beside the model; raises UserError if there is none."""
    try:
        with quiet_transformers():
            return kind.from_pretrained(name.base)
    except ImportError as error:
        raise UserError(f"model {name.shown}: its {what} needs another package: {error}") from error
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model {name.shown}: cannot load its {what}: {error}") from error
