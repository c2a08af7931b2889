"""What the router looks at: hidden states of the frozen base behind one of its layers, pooled over the tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neuron_methods.errors import UserError
from neuron_methods.routing.base import body_of, input_device

Pooling = Literal["mean", "first", "last"]


class _Reached(Exception):
    def __init__(self, states: Tensor) -> None:
        self.states = states


def resolve_layer(model: Any, layer: int | None, where: str = "router.layer") -> int:
    """How many layers lie before the hidden states that are read, from 0 to the number of layers.

    Raises:
        UserError: there are not so many layers.
    """
    depth = len(body_of(model)[1])
    resolved = depth // 2 if layer is None else layer + depth + 1 if layer < 0 else layer
    if not 0 <= resolved <= depth:
        raise UserError(f"{where}: {layer} is no layer of a model with {depth}; choose 0 to {depth}, or from the end")
    return resolved


@torch.no_grad()
def pooled_states(model: Any, inputs: Mapping[str, Tensor], layer: int, pooling: Pooling = "mean") -> Tensor:
    """Pooled hidden states; layers behind the one that is read are not computed.

    Padding does not matter, on whichever side it is: padded tokens are not pooled, and positions count real tokens
    where the model takes positions.

    Args:
        model: the base, without any adapter at work.
        inputs: ``input_ids`` or ``inputs_embeds`` (with ``attention_mask``, if anything is padded), or
            ``pixel_values``.
        layer: how many layers lie before; see `resolve_layer`.
        pooling: over tokens, or over patches with the class token.

    Returns:
        float32 (B, width).
    """
    body, layers = body_of(model)
    device = input_device(model)
    keywords: dict[str, Any] = {key: value.to(device) for key, value in inputs.items()}
    mask = keywords.get("attention_mask")
    accepted = inspect.signature(body.forward).parameters
    if mask is not None and "position_ids" in accepted:
        keywords["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    if "use_cache" in accepted and getattr(model.config, "use_cache", False):
        keywords["use_cache"] = False
    states = _states_behind(body, layers, layer, keywords).float()
    if mask is None:
        return {"mean": states.mean(1), "first": states[:, 0], "last": states[:, -1]}[pooling]
    mask = mask.to(states.device).bool()
    if pooling == "mean":
        kept = states.masked_fill(~mask.unsqueeze(2), 0)
        return kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    if pooling == "first":
        chosen = places.masked_fill(~mask, mask.shape[1] - 1).amin(1)
    else:
        chosen = places.masked_fill(~mask, 0).amax(1)
    return states[torch.arange(len(states), device=states.device), chosen]


def _states_behind(body: nn.Module, layers: nn.ModuleList, layer: int, keywords: dict[str, Any]) -> Tensor:
    """(B, tokens, width). Ends the forward pass by an exception, before the first layer that is not needed."""

    def before(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        raise _Reached(arguments[0] if arguments else named["hidden_states"])

    def behind(_module: nn.Module, _arguments: Any, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    if layer < len(layers):
        handle = layers[layer].register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = layers[-1].register_forward_hook(behind)
    try:
        body(**keywords)
    except _Reached as reached:
        return reached.states
    finally:
        handle.remove()
    raise RuntimeError("the layers of the base model were not called")
