"""The frozen base: loading it, what kind of model it is, and where its layers are."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn

from neuron_methods.models.kinds import model_kind
from neuron_methods.models.loading import Processor, load_weights
from neuron_methods.models.reference import ModelName
from neuron_methods.support.errors import UserError

Routable = Literal["causal", "text-to-text", "image-classification"]


def load_base(reference: str, where: str, *, dtype: str = "auto", device_map: Any = None) -> Any:
    """Load the base model in evaluation mode, all weights frozen.

    Args:
        reference: directory, or repository of the hub.
        where: how messages name it.
        dtype: ``auto``: as stored.
        device_map: as transformers takes it.

    Raises:
        UserError: it cannot be loaded, lacks weights, or is of no kind that can be routed.
    """
    name = ModelName.find(reference)
    if name.adapter is not None:
        raise UserError(f"{where}: {name.adapter} is an adapter; name the model that the experts were trained on")
    model = load_weights(name.base, where, dtype=dtype, device_map=device_map)
    routable_kind(model, where)
    return model


def routable_kind(model: Any, where: str = "the base model") -> Routable:
    """Name what a model does, by its class.

    Raises:
        UserError: it neither generates text nor classifies images.
    """
    name = type(model).__name__
    kind = model_kind(name, model.config)
    if kind not in get_args(Routable):
        raise UserError(f"{where}: {name} cannot be routed; causal, text-to-text and image-classification models can")
    return kind


def processor_of(kind: Routable) -> Processor:
    """Name what makes the inputs of a kind of model."""
    return "image processor" if kind == "image-classification" else "tokenizer"


def body_of(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """Find what computes hidden states from the inputs (of an encoder-decoder the encoder), and its layers in order."""
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    lists = [module for module in body.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError(f"{type(model).__name__}: no list of layers in it, so there are no hidden states to route by")
    return body, max(lists, key=len)
