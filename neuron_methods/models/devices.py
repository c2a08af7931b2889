"""Where to compute: a device by name, checked, or the one accelerate finds."""

from __future__ import annotations

import torch

from neuron_methods.support.errors import UserError
from neuron_methods.support.text import first_line


def resolve_device(name: str, option: str = "--device") -> str:
    """Turn the value of `--device` into a device that is there.

    Args:
        name: `auto` (what accelerate would use), or a device of torch such as `cpu`, `cuda`, `cuda:1`, `mps`.
        option: what the user typed to ask for it, for messages.

    Returns:
        The device as torch spells it.

    Raises:
        UserError: the name is unknown or the device is not there.
    """
    if name == "auto":
        from accelerate import PartialState

        return str(PartialState().device)
    asked = f"{option} {name}" if option == "--device" else option
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{asked}: no such kind of device; try auto, cpu, cuda, cuda:0, mps or xpu") from None
    try:
        torch.zeros(1, device=device).item()  # `meta` makes tensors, but they hold nothing
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{asked}: not available here ({first_line(error)}); try --device auto") from None
    return str(device)


def check_multi_gpu(processes: int) -> None:
    """Make sure that mergekit's executor for several accelerators has one.

    Args:
        processes: how many make the merge together.

    Raises:
        UserError: there is none, or each process has one already.
    """
    if processes > 1:
        raise UserError("--multi-gpu: one process uses several GPUs with it, and here each has its own; leave it out")
    if not (torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()):
        raise UserError("--multi-gpu: no accelerator here; leave it out to merge on the CPU")
