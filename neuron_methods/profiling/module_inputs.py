"""What the weights of modules are multiplied with: inputs of linear layers, patches of convolutions."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """List the modules whose weight is one matrix that is applied to inputs, by their paths in memory.

    Linear layers, Conv1D of GPT-2, and convolutions without groups. A convolution in groups has inputs for each of
    them, and stacks of experts route theirs within one module; both are left out.
    """
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) or (isinstance(module, _CONVOLUTIONS) and module.groups == 1)
    }


def input_width(module: Any) -> int:
    """Count the inputs of one neuron of a module that `linear_modules` lists."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0]
    if isinstance(module, nn.Linear):
        return module.in_features
    width = module.in_channels
    for size in module.kernel_size:
        width *= size
    return width


def reading(module: Any) -> Hashable:
    """Say how a module takes its inputs from a tensor; modules that say the same have the same inputs of the same."""
    if not isinstance(module, _CONVOLUTIONS):
        return None
    return module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode


def input_vectors(module: Any, tensor: Tensor) -> Tensor:
    """Lay out what a module's weight is multiplied with, (..., inputs): of a convolution its patches, (B, ..., inputs).

    A patch is laid out as a row of the weight is, (channels, *kernel).
    """
    if not isinstance(module, _CONVOLUTIONS):
        return tensor
    axes = len(module.kernel_size)
    if tensor.ndim == axes + 1:
        tensor = tensor[None]
    margins: list[int] = []
    for axis, (size, dilation) in enumerate(zip(module.kernel_size, module.dilation, strict=True)):
        spread = dilation * (size - 1) if module.padding == "same" else 0
        given = 0 if isinstance(module.padding, str) else module.padding[axis]
        margins = [spread // 2 + given, spread - spread // 2 + given, *margins]  # the last axis comes first
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    patches = functional.pad(tensor, margins, mode=mode) if any(margins) else tensor
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        patches = patches.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return patches.movedim(1, 1 + axes).flatten(1 + axes)
