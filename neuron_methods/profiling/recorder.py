"""Hooks that watch the MLP neurons of a model in memory while it computes.

The activation of a neuron is its input to the down projection, seen by a hook before that module; the gate's
pre-activation by a hook behind the gate's module. All work is done per layer on whole matrices (tokens × neurons).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neuron_methods.data.feeders import Batch, Feeder
from neuron_methods.data.tokens import TokenBatch
from neuron_methods.neurons import MlpLayer, find_modules
from neuron_methods.profiling.exemplars import TopActivations
from neuron_methods.profiling.measured_model import LoadedModel
from neuron_methods.profiling.statistics import NeuronSums
from neuron_methods.support.errors import UserError


class LayerRecord:
    """What is recorded of one MLP: its sums and its exemplars.

    Attributes:
        stream: which of a batch's token streams the layer reads ("encoder", "decoder", ... ; see `feeders`).
    """

    def __init__(self, layer: MlpLayer, stream: str, top: int, width: int, gradients: bool, device: Any) -> None:
        self.layer = layer
        self.stream = stream
        self.device = device
        self.sums = NeuronSums(layer.neurons, gradients, device)
        self.top = TopActivations(layer.neurons, top, width, device)

    def add(self, activations: Tensor, batch: TokenBatch) -> None:
        """Record the activations (B, T, neurons) of a batch."""
        length = activations.shape[-2]
        rows = _pick(activations, batch.valid).float()
        sizes = rows.abs()
        if batch.fresh is None:
            self.top.update(rows, sizes, batch.valid, batch, length)
        else:
            fresh = _pick(activations, batch.fresh).float()
            self.top.update(fresh, fresh.abs(), batch.fresh, batch, length)
        if not self.layer.gated:
            self.sums.add_firing(rows)
        self.sums.add(sizes)

    def add_gate(self, output: Tensor, batch: TokenBatch) -> None:
        """Record where the gate opens; of a fused module the first features are the gate."""
        self.sums.add_firing(_pick(output[..., : self.layer.neurons], batch.valid))

    def add_gradient(self, activations: Tensor, gradient: Tensor, batch: TokenBatch) -> None:
        """Record activation × gradient of the loss, both (B, T, neurons)."""
        self.sums.add_taylor(_pick(activations, batch.valid).float(), _pick(gradient, batch.valid).float())

    def state(self) -> dict[str, Tensor]:
        """Hand out everything recorded so far, to be stored."""
        tokens = torch.tensor(self.sums.tokens)
        return {"tokens": tokens, **self.sums.sums, **self.top.entries}

    def fits(self, state: dict[str, Tensor]) -> bool:
        """Tell whether `state` may have returned this, by shapes and dtypes."""
        return all(
            (state[name].shape, state[name].dtype) == (own.shape, own.dtype) for name, own in self.state().items()
        )

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        self.sums.tokens = int(state["tokens"])
        for fields in (self.sums.sums, self.top.entries):
            for name in fields:
                fields[name] = state[name].to(fields[name].device)


class Recorder:
    """Watches all MLPs of a model; what they compute inside `watching()` goes into `records`, by layer.

    Args:
        loaded: the model; adapters may have been injected.
        feeder: lays out what it reads.
        top: exemplars to keep per neuron.
        gradients: record activation × gradient, too.
    """

    def __init__(self, loaded: LoadedModel, feeder: Feeder, top: int, gradients: bool) -> None:
        self.loaded, self.feeder, self.gradients = loaded, feeder, gradients
        self.records: dict[str, LayerRecord] = {}
        self._modules: list[tuple[LayerRecord, nn.Module, nn.Module | None]] = []
        self._batch: dict[str, TokenBatch] = {}
        for layer in loaded.neurons.layers:
            down, gate = find_modules(loaded.model, layer)
            stream = feeder.stream_of(layer.key)
            device = device_of(down, loaded.model)
            record = LayerRecord(layer, stream, top, feeder.payload_width(stream), gradients, device)
            self.records[layer.key] = record
            self._modules.append((record, down, gate))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the hooks are in place, and `run` records."""
        with ExitStack() as hooks:
            for record, down, gate in self._modules:
                hooks.enter_context(down.register_forward_pre_hook(self._before_down(record), with_kwargs=True))
                if gate is not None:
                    hooks.enter_context(gate.register_forward_hook(self._behind_gate(record)))
            yield

    def check_finite(self, where: str) -> None:
        """Raise UserError, `where` first, if what was summed up over a neuron is NaN or Inf."""
        for key, record in self.records.items():
            if (neuron := record.sums.first_nonfinite()) is not None:
                raise UserError(
                    f"{where}: neuron {neuron} of {key} came out as NaN or Inf, though all weights are finite; compute "
                    "in float32 (dtype), and see whether it still does"
                )

    def run(self, batch: Batch) -> None:
        """Run a forward pass, and with gradients a backward pass."""
        batch = batch.to(self.loaded.device)
        wanted = {(record.stream, record.device) for record in self.records.values() if record.stream in batch.streams}
        self._batch = {(stream, device): batch.streams[stream].to(device) for stream, device in wanted}
        with torch.set_grad_enabled(self.gradients):
            output = self.loaded.forward(batch.inputs, with_head=self.gradients)
            if self.gradients:
                self.feeder.loss(output, batch).backward()

    def _before_down(self, record: LayerRecord) -> Callable[..., Any]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Any]) -> Any:
            activations, *others = arguments
            batch = self._batch[record.stream, record.device]
            seen = activations.detach().to(record.device)
            record.add(seen, batch)
            if not self.gradients:
                return None
            if not activations.requires_grad:  # the first MLP: all weights are frozen, so that the graph begins here
                activations = activations.detach().requires_grad_(True)
            activations.register_hook(lambda gradient: record.add_gradient(seen, gradient.to(record.device), batch))
            return (activations, *others), keywords

        return hook

    def _behind_gate(self, record: LayerRecord) -> Callable[..., None]:
        def hook(_module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
            record.add_gate(output.detach().to(record.device), self._batch[record.stream, record.device])

        return hook


def _pick(values: Tensor, tokens: Tensor | None) -> Tensor:
    """The rows of (B, T, features) that belong to the given tokens, or all: (tokens, features)."""
    rows = values.reshape(-1, values.shape[-1])
    return rows if tokens is None else rows.index_select(0, tokens)


def device_of(module: nn.Module, model: PreTrainedModel) -> torch.device:
    """Where a module computes: its weights may be parked elsewhere by accelerate."""
    hook = getattr(module, "_hf_hook", None)
    execution_device = getattr(hook, "execution_device", None)
    if execution_device is not None:
        return torch.device(execution_device)
    parameter = next(module.parameters(), None)
    return model.device if parameter is None or parameter.device.type == "meta" else parameter.device
