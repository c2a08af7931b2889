"""Where float64 is, on devices that lack it."""

from __future__ import annotations

import torch


def with_float64(device: torch.device | str) -> torch.device:
    """Give the device that takes what is computed in float64 for another: itself, the CPU for Apple's GPUs."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device
