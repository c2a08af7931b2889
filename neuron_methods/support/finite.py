"""NaN and Inf in tensors: found in one read, and said before anything is computed with them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from neuron_methods.support.errors import UserError

#: What to do about an input of a merge that holds NaN or Inf. Whatever plans a merge may say so; one command goes on.
ADVICE = "use a sound checkpoint; mergekit-neuron merge --allow-nonfinite goes on all the same"


def largest(tensor: Tensor) -> float:
    """Find the largest magnitude of a tensor; NaN where it holds one, 0 for integers and where it has no entries."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor.detach())
    return max(-float(low), float(high)) if math.isfinite(low) else float("nan" if low.isnan() else "inf")


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds neither NaN nor Inf, in one read and without a copy."""
    return math.isfinite(largest(tensor))


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Refuse weights that nothing sound can be computed with.

    Args:
        tensors: (name, weights); those on the meta device, which are elsewhere, are left out.
        where: for messages: "model base".

    Raises:
        UserError: naming the first tensor that holds NaN or Inf.
    """
    for name, tensor in tensors:
        if tensor.device.type != "meta" and not is_finite(tensor):
            raise UserError(f"{where}: {name} holds NaN or Inf; use a sound checkpoint")
