"""Twin-Merging as a peer of the routed model: what experts share is merged once, what is each one's own is routed.

The idea (Lu et al., abstract; arXiv:2406.15479): shared and exclusive components, the exclusive ones compressed, and
both merged dynamically by the input. In detail this is ours, for LoRA experts of one rank on one base:

    shared     τ_s = scale · Σ_e τ_e                   task arithmetic
    exclusive  v_t = SVD_rank(τ_t − τ_s)               of every module
    for x      θ₀ + τ_s + Σ_t p_t(x) v_t               with the probabilities p of our router, over all experts

so that the two methods differ in what is merged, and not in who tells the inputs apart.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from variants import Material

from neuron_methods import NeuronRoutedModel
from neuron_methods.adapters.live import factors_of
from neuron_methods.routing import Routing
from neuron_methods.routing.base import load_base
from neuron_methods.routing.experts import load_experts
from neuron_methods.routing.routed_files import RoutedExpert

SHARED = "shared"


class TwinMerging(NeuronRoutedModel):
    """A routed model of the experts of another one, by Twin-Merging."""

    def __init__(self, material: Material, scale: float = 0.3, rank: int = 8) -> None:
        """Split the experts of `material.plain`, whose router it asks."""
        plain = material.plain
        base = load_base(material.config.base_model, "base_model", dtype=material.config.dtype)
        names = [SHARED, *(f"{name}_exclusive" for name in plain.experts)]
        with tempfile.TemporaryDirectory() as folder:
            directories = {name: Path(folder, name) for name in names}
            for number, directory in enumerate(directories.values()):
                _write(directory, plain, number - 1, scale, rank)
            model = load_experts(base, {name: str(place) for name, place in directories.items()}, "twin")
        config = replace(plain.routed_config, experts=tuple(map(RoutedExpert, names)))
        super().__init__(model, plain.router, config, material.config.base_model)
        self._route = plain.route

    @torch.no_grad()
    def route(self, **inputs: Any) -> Routing:
        """Weigh every expert's exclusive part by its probability; the shared one is always there."""
        found = self._route(**inputs)
        weights = torch.cat([torch.ones(len(found), 1), found.probabilities.cpu()], dim=1)
        coefficients = weights.unsqueeze(1).expand(-1, len(self.mixer.layers), -1)
        return Routing(self.experts, weights, weights, found.scores, found.threshold, coefficients)


def _write(directory: Path, plain: NeuronRoutedModel, expert: int, scale: float, rank: int) -> None:
    """Write the shared part (of no expert, -1) or an expert's exclusive part as an adapter in peft's format."""
    tensors: dict[str, Tensor] = {}
    for path, module in plain.mixer.modules.items():
        downs, ups = [], []
        for number, name in enumerate(plain.experts):
            a, b = (part.detach().float() for part in factors_of(module, name))
            share = scale if expert < 0 else float(number == expert) - scale
            downs.append(a)
            ups.append(share * module.scaling[name] * b)
        down, up = torch.cat(downs), torch.cat(ups, dim=1)
        if expert >= 0:
            down, up = _truncated(down, up, rank)
        tensors[f"base_model.model.{path}.lora_A.weight"] = down.contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = up.contiguous()
    rank = len(next(iter(tensors.values())))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(plain.mixer.modules), inference_mode=True)
    directory.mkdir()
    config.save_pretrained(str(directory))
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def _truncated(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of up·down of this rank; the product itself is never formed."""
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(upper @ lower.T)
    return (s[:rank, None] * v[:rank]) @ right.T, left @ u[:, :rank]
