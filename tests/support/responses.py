"""Merging by response as its formula stands, in float64, and files of random inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_methods.methods.inputs_file import InputsInfo, save_inputs
from neuron_methods.plugin.tensor_places import TensorPlaces
from tests.support.checkpoints import StateDict
from tests.support.tensors import randoms

# What leaves the update as it is, so that one step at a time can be looked at.
PLAIN = {"subspace": "all", "inputs": "update", "ridge": 0.1, "toward": "zero", "embeddings": "mean"}


def response(
    updates: Sequence[Tensor],
    ridge: float = 0.1,
    weights: Sequence[float] | None = None,
    factors: Sequence[Sequence[Tensor]] | None = None,
    toward: str = "zero",
    scaled: bool = True,
) -> Tensor:
    """The formula as it stands in the docstring of kernels/response.py, in float64."""
    updates = [u.double() for u in updates]
    weights = weights or [1.0] * len(updates)
    moments = []
    for update, own in zip(updates, factors or [[u] for u in updates], strict=True):
        parts = [(f.double().T @ f.double()) / f.double().square().sum() for f in own if f.any()]
        moments.append(sum(parts) / len(parts) if parts else torch.zeros(update.shape[1], update.shape[1]).double())
    n = sum(w * u @ c for w, u, c in zip(weights, updates, moments, strict=True))
    s = sum(w * c for w, c in zip(weights, moments, strict=True))
    mean = sum(w * u for w, u in zip(weights, updates, strict=True)) / sum(weights)
    t = {"zero": 0 * mean, "mean": mean, "sum": mean * len(updates)}[toward]
    rho = ridge * s.diagonal().mean()
    merged = (n + rho * t) @ torch.linalg.inv(s + rho * torch.eye(len(s)).double())
    undone = scaled and toward == "zero"
    return merged * ((merged * n).sum() / (merged @ s * merged).sum()) if undone else merged


def near(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert found.shape == expected.shape
    assert float((found.double() - expected.double()).norm()) <= tolerance * float(expected.double().norm())


def profiles(
    folder: Path, config: Any, base: StateDict, experts: Any, change: Callable[[dict[str, Tensor]], Any] | None = None
) -> dict[str, str]:
    """A file of random inputs per expert, for all modules that are linear; returns {expert: path}."""
    places = TensorPlaces(config, list(base))
    found = {}
    for seed, expert in enumerate(experts):
        factors, modules = {}, {}
        for index, name in enumerate(base):
            place = places.of(name)
            if place is None or place.width is None or base[name].ndim < 2:
                continue
            assert place.module is not None
            modules[place.module] = str(index)
            factors[str(index)] = randoms((5, place.width), 1, seed=100 * seed + index)[0]
        if change is not None:
            change(factors)
        info = InputsInfo(
            model=str(expert),
            model_type=config.model_type,
            modules={m: f for m, f in modules.items() if f in factors},
            tokens=dict.fromkeys(factors, 5),
        )
        found[expert] = str(folder / f"{expert}.safetensors")
        save_inputs(found[expert], info, factors)
    return found
