"""What the router looks at: hidden states of the frozen base behind some of its layers, pooled over the tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from neuron_methods.models.loading import input_device
from neuron_methods.routing.route_yaml import Pooling
from neuron_methods.support.errors import UserError


class _Reached(Exception):
    """No error: it ends a forward pass that has gone far enough."""


def body_of(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """Find what computes hidden states from the inputs (of an encoder-decoder the encoder), and its layers in order."""
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    lists = [module for module in body.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError(f"{type(model).__name__}: no list of layers in it, so there are no hidden states to route by")
    return body, max(lists, key=len)


def resolve_layers(model: Any, layer: int | Sequence[int] | None, where: str = "router.layer") -> tuple[int, ...]:
    """Count how many layers lie before each of the hidden states that are read, from 0 to the number of layers.

    Args:
        model: the base.
        layer: one or several, negative ones counted from the end; None: what goes into the layers, and what lies
            behind a quarter and behind half of them.
        where: for messages.

    Raises:
        UserError: there are not so many layers.
    """
    depth = len(body_of(model)[1])
    if layer is None:
        return tuple(sorted({0, depth // 4, depth // 2}))
    resolved = set()
    for number in [layer] if isinstance(layer, int) else layer:
        counted = number + depth + 1 if number < 0 else number
        if not 0 <= counted <= depth:
            raise UserError(
                f"{where}: {number} is no layer of a model with {depth}; choose 0 to {depth}, or from the end"
            )
        resolved.add(counted)
    return tuple(sorted(resolved))


@torch.no_grad()
def pooled_states(
    model: Any, inputs: Mapping[str, Tensor], layers: Sequence[int], pooling: Pooling = "moments"
) -> Tensor:
    """Pool hidden states, those of the layers side by side; layers behind the last one read are not computed.

    Padding does not matter, on whichever side it is: padded tokens are not pooled, and positions count real tokens
    where the model takes positions.

    Args:
        model: the base, without any adapter at work.
        inputs: ``input_ids`` or ``inputs_embeds`` (with ``attention_mask``, if anything is padded), or
            ``pixel_values``.
        layers: how many layers lie before each; see `resolve_layers`.
        pooling: over tokens, or over patches with the class token: ``mean``, ``moments`` (mean and standard
            deviation), or the ``first`` or ``last`` alone.

    Returns:
        float32 (B, layers × width), twice as wide for ``moments``.
    """
    body, modules = body_of(model)
    device = input_device(model)
    keywords: dict[str, Any] = {key: value.to(device) for key, value in inputs.items()}
    mask = keywords.get("attention_mask")
    accepted = inspect.signature(body.forward).parameters
    if mask is not None and "position_ids" in accepted:
        keywords["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    if "use_cache" in accepted and getattr(model.config, "use_cache", False):
        keywords["use_cache"] = False
    states = _states_behind(body, modules, layers, keywords)
    return torch.cat([_pool(state.float(), mask, pooling).to(device) for state in states], dim=1)


def _pool(states: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """(B, tokens, width) to (B, width), or (B, 2 × width) for moments."""
    if mask is None:
        mask = torch.ones(states.shape[:2], device=states.device)
    mask = mask.to(states.device).bool()
    if pooling in ("mean", "moments"):
        real = mask.unsqueeze(2)
        count = mask.sum(1, keepdim=True).clamp(min=1)
        mean = states.masked_fill(~real, 0).sum(1) / count
        if pooling == "mean":
            return mean
        variance = (states - mean.unsqueeze(1)).square().masked_fill(~real, 0).sum(1) / count
        return torch.cat((mean, variance.sqrt()), dim=1)
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    if pooling == "first":
        chosen = places.masked_fill(~mask, mask.shape[1] - 1).amin(1)
    else:
        chosen = places.masked_fill(~mask, 0).amax(1)
    return states[torch.arange(len(states), device=states.device), chosen]


def _states_behind(
    body: nn.Module, modules: nn.ModuleList, layers: Sequence[int], keywords: dict[str, Any]
) -> list[Tensor]:
    """(B, tokens, width) of each layer. The forward pass ends by an exception, once the last of them is known."""
    found: dict[int, Tensor] = {}

    def keep(layer: int, states: Tensor) -> None:
        found[layer] = states
        if layer == max(layers):
            raise _Reached

    def before(layer: int) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            keep(layer, arguments[0] if arguments else named["hidden_states"])

        return hook

    def behind_all(_module: nn.Module, _arguments: Any, output: Any) -> None:
        keep(len(modules), output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for layer in layers:
            if layer < len(modules):
                hooks.enter_context(modules[layer].register_forward_pre_hook(before(layer), with_kwargs=True))
            else:
                hooks.enter_context(modules[-1].register_forward_hook(behind_all))
        try:
            body(**keywords)
        except _Reached:
            return [found[layer] for layer in layers]
    raise RuntimeError("the layers of the base model were not called")
