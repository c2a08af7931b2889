"""The frozen base: loading it by its config's class, what kind of model it is, and where its layers are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from neuron_methods.support.errors import UserError
from neuron_methods.support.quiet import quiet_transformers

Kind = Literal["causal", "text-to-text", "image-classification"]


def load_base(reference: str, where: str, *, dtype: str = "auto", device_map: Any = None) -> Any:
    """The base model in evaluation mode, all weights frozen.

    Args:
        reference: directory, or repository of the hub.
        where: how messages name it.
        dtype: ``auto``: as stored.
        device_map: as transformers takes it.

    Raises:
        UserError: it cannot be loaded, or is of no kind that can be routed.
    """
    import transformers
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(reference)
        architecture = (config.architectures or [""])[0]
        if not hasattr(transformers, architecture or "-"):
            raise UserError(f"{where}: its architecture {architecture!r} is no class of transformers")
        with quiet_transformers():
            model = getattr(transformers, architecture).from_pretrained(
                reference, config=config, dtype=dtype, use_safetensors=True, device_map=device_map
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        place = "" if Path(reference).is_dir() else " (neither a directory here nor to be had from the hub)"
        raise UserError(f"{where}: cannot load the base model{place}: {error}") from None
    kind_of(model, where)
    return model.eval().requires_grad_(False)


def kind_of(model: Any, where: str = "the base model") -> Kind:
    """What the model does, by its class.

    Raises:
        UserError: it neither generates text nor classifies images.
    """
    name = type(model).__name__
    if model.main_input_name == "pixel_values" and "ForImageClassification" in name:
        return "image-classification"
    if model.config.is_encoder_decoder and name.endswith("ForConditionalGeneration"):
        return "text-to-text"
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    raise UserError(f"{where}: {name} cannot be routed; causal, text-to-text and image-classification models can")


def context_length(model: Any) -> int | None:
    """Tokens that the model's positions reach; None where they are relative or an image's."""
    if model.main_input_name == "pixel_values" or model.config.model_type in ("t5", "mt5", "umt5"):
        return None
    return getattr(model.config, "max_position_embeddings", None)


def body_of(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """What computes hidden states from the inputs (of an encoder-decoder the encoder), and its layers in order."""
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    lists = [module for module in body.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError(f"{type(model).__name__}: no list of layers in it, so there are no hidden states to route by")
    return body, max(lists, key=len)


def load_processor(reference: str | Path, kind: Kind, where: str) -> Any:
    """The tokenizer or image processor saved beside a model.

    Raises:
        UserError: there is none, or it needs a package that is missing.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    what, loader = (
        ("image processor", AutoImageProcessor)
        if kind == "image-classification"
        else (
            "tokenizer",
            AutoTokenizer,
        )
    )
    try:
        with quiet_transformers():
            return loader.from_pretrained(reference)
    except ImportError as error:
        raise UserError(f"{where}: its {what} needs another package: {error}") from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{where}: cannot load its {what}: {error}") from None


def placement(device: str | None) -> str | None:
    """What ``--device`` means to transformers: by default the accelerator, where there is one."""
    return device or ("auto" if torch.accelerator.is_available() else None)


def input_device(model: Any) -> torch.device:
    """Where the model's inputs go: its first parameter's device, or where accelerate computes it."""
    hook = getattr(model, "_hf_hook", None)
    execution_device = getattr(hook, "execution_device", None)
    return torch.device(execution_device) if execution_device is not None else model.device
