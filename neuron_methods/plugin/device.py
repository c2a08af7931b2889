"""Where to compute: a device by name, checked, or the one accelerate finds."""

from __future__ import annotations

import torch

from neuron_methods.errors import UserError


def resolve_device(name: str) -> str:
    """Turn the value of `--device` into a device that is there.

    Args:
        name: `auto` (what accelerate would use), or a device of torch such as `cpu`, `cuda`, `cuda:1`, `mps`.

    Returns:
        The device as torch spells it.

    Raises:
        UserError: the name is unknown or the device is not there.
    """
    if name == "auto":
        from accelerate import PartialState

        return str(PartialState().device)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {name}: not available here ({reason}); try --device auto") from None
    return str(device)
