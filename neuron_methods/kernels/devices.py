"""What differs between devices: where float64 is, and how much is best worked on at a time."""

from __future__ import annotations

import torch

# On an accelerator, where every operation is a launch of its own, and memory is fast throughout.
_LAUNCHED = 1 << 28


def with_float64(device: torch.device | str) -> torch.device:
    """Give the device that takes what is computed in float64 for another: itself, the CPU for Apple's GPUs."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def bytes_at_once(cached: int, device: torch.device | None) -> int:
    """Give how much is worked on at a time: `cached`, which stays in a CPU's cache, or what fills an accelerator."""
    return cached if device is None or device.type == "cpu" else max(cached, _LAUNCHED)
