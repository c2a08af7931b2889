"""The one seam on peft's LoRA layers: every sample of a batch gets its own mixture of the loaded adapters.

peft computes base(x) alone (its adapters are switched off), and a forward hook on each of its LoRA layers adds

    Σ_e c[b, l, e] · s_e · B_e A_e x        for sample b, in layer l

with the coefficients c that are in force. The adapters' A are stacked into one matrix and their B into another, so that
a layer costs two products whatever the number of experts; experts that no sample of the batch needs are left out.
Where experts trained biases, Σ_e c[b, l, e] · β_e is added likewise, with β_e what e adds to the bias: the output is
linear in the bias, so this is what the merged bias gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from neuron_methods.adapters.live import layer_update
from neuron_methods.neurons import layer_of
from neuron_methods.support.errors import UserError


class _Mixture:
    """Coefficients in force, and what was made of them for each LoRA layer."""

    def __init__(self, coefficients: Tensor) -> None:
        self.coefficients = coefficients.detach().float().cpu()
        self.used = self.coefficients.any(dim=0).tolist()  # [layer][expert]
        self.prepared: dict[str, tuple[Tensor, Tensor, Tensor] | None] = {}


class AdapterMixer:
    """Puts the seam into a model that carries the adapters, and keeps the coefficients in force.

    Attributes:
        experts: names of the adapters, in the order of the coefficients' last axis.
        layers: keys of the layers that carry LoRA, in the model's order: the coefficients' middle axis.
        modules: path in the model -> peft's LoRA layer.
        layer_index: path in the model -> index of its layer, along the coefficients' middle axis.
        biases: expert -> path of a module -> float32 (out,), what it adds to the bias.
    """

    def __init__(
        self, peft_model: Any, experts: Sequence[str], biases: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> None:
        """Switch the mixing of what `experts.load_experts` made off, and put the hooks in."""
        from peft.tuners.lora import LoraLayer

        self.experts = tuple(experts)
        self.biases = {name: dict((biases or {}).get(name, {})) for name in self.experts}
        biased = {path for of_expert in self.biases.values() for path in of_expert}
        self.modules: dict[str, Any] = {
            path: module
            for path, module in peft_model.get_base_model().named_modules()
            if isinstance(module, LoraLayer) and any(name in module.lora_A for name in self.experts)
        }
        mixed = {p: m for p, m in peft_model.get_base_model().named_modules() if p in self.modules or p in biased}
        self.layers = tuple(dict.fromkeys(map(layer_of, mixed)))
        self.layer_index = {path: self.layers.index(layer_of(path)) for path in mixed}
        # A context variable: two threads that generate with one model do not mix up their samples.
        self._mixture: ContextVar[_Mixture | None] = ContextVar("mixture", default=None)
        peft_model.base_model.disable_adapter_layers()
        for path, module in self.modules.items():
            module.register_forward_hook(self._hook(path), with_kwargs=True)
        for path in biased:
            mixed[path].register_forward_hook(self._bias_hook(path, isinstance(mixed[path], nn.Conv2d)))

    @contextmanager
    def using(self, coefficients: Tensor | None) -> Iterator[None]:
        """Inside, the model computes with these coefficients.

        Args:
            coefficients: float (B, L, E) for batches of B samples, or of a multiple of B whose samples stand in B
                equal runs (beams, several sequences per prompt, flattened tokens). None: the base model alone.
        """
        token = self._mixture.set(None if coefficients is None else _Mixture(coefficients))
        try:
            yield
        finally:
            self._mixture.reset(token)

    def uniform(self, weights: Tensor) -> Tensor:
        """Make coefficients (1, L, E) that give every layer the same `weights`, (E,)."""
        return weights.float().expand(1, len(self.layers), -1)

    def only(self, expert: str) -> Tensor:
        """Make coefficients (1, L, E) of one expert as it is."""
        return self.uniform(torch.tensor([float(name == expert) for name in self.experts]))

    def paths_of(self, expert: str) -> list[str]:
        """List the modules that an expert has an update of."""
        return [path for path, module in self.modules.items() if expert in module.lora_A]

    def delta(self, path: str, expert: str) -> Tensor | None:
        """Form an expert's update s·B·A of one module in float32, arranged like its weight; None where it has none."""
        return layer_update(self.modules[path], expert)

    def _hook(self, path: str) -> Any:
        # A closure and no bound method: copying the model must not copy the mixer.
        def add_updates(module: nn.Module, inputs: tuple[Any, ...], _keywords: Any, output: Tensor) -> Tensor:
            mixture = self._mixture.get()
            if mixture is None:
                return output
            if path not in mixture.prepared:
                mixture.prepared[path] = self._prepare(path, mixture)
            prepared = mixture.prepared[path]
            if prepared is None:
                return output
            down, up, scales = prepared
            x = inputs[0].to(down.device, down.dtype)
            inner = functional.linear(x, down)
            inner = inner * _rows_for(scales, inner)
            return output + functional.linear(inner, up).to(output.device, output.dtype)

        return add_updates

    def _bias_hook(self, path: str, channels_first: bool) -> Any:
        def add_biases(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            mixture = self._mixture.get()
            if mixture is None:
                return output
            layer = self.layer_index[path]
            having = [(e, self.biases[name][path]) for e, name in enumerate(self.experts) if path in self.biases[name]]
            shares = mixture.coefficients[:, layer, [e for e, _ in having]]
            shift = (shares @ torch.stack([bias for _, bias in having])).to(output.device, output.dtype)
            rows = output.transpose(1, -1) if channels_first else output
            rows = rows + _rows_for(shift, rows)
            return rows.transpose(1, -1) if channels_first else rows

        return add_biases

    def _prepare(self, path: str, mixture: _Mixture) -> tuple[Tensor, Tensor, Tensor] | None:
        """Stacked A (R, in), stacked B (out, R) and scales (B, R) of the experts that some sample needs here."""
        module, layer = self.modules[path], self.layer_index[path]
        needed = [
            (e, name)
            for e, name in enumerate(self.experts)
            if mixture.used[layer][e] and name in module.lora_A  # an expert may leave a layer alone
        ]
        if not needed:
            return None
        downs = [module.lora_A[name].weight for _, name in needed]
        ups = [module.lora_B[name].weight for _, name in needed]
        scales = [
            (mixture.coefficients[:, layer, e] * module.scaling[name]).unsqueeze(1).expand(-1, len(down))
            for (e, name), down in zip(needed, downs, strict=True)
        ]
        stacked = torch.cat(scales, dim=1).to(downs[0].device, downs[0].dtype)
        if len(needed) == 1:
            return downs[0], ups[0], stacked
        return torch.cat(downs), torch.cat(ups, dim=1), stacked


def _rows_for(scales: Tensor, inner: Tensor) -> Tensor:
    """The scales (B, R) laid out for `inner` (n·B, …, R), the samples in B runs of n."""
    samples, rows = len(scales), len(inner)
    if samples not in (1, rows):
        if rows % samples:
            raise UserError(f"the routing is of {samples} samples, but a batch of {rows} came through the model")
        scales = scales.repeat_interleave(rows // samples, dim=0)
    return scales.view(len(scales), *[1] * (inner.ndim - 2), -1)
