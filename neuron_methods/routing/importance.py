"""How important the layers and neurons of one expert's update are: stage 1's order of trial, and what it keeps.

A neuron is an MLP neuron with all that it owns (`neurons`), or one row of any other module that carries LoRA. These
formulas are ours, as none of MIN-Merging (arXiv:2510.17890) was at hand, in the notation of the static `min_merging`:

- ``magnitude``: ‖τ_n‖ / ‖θ₀_n‖ over all weights that neuron n owns and the expert updates;
- ``activation``: mean |a_n| · ‖outgoing weights of n‖ with the expert's weights, on its calibration data;
- ``taylor``: mean |a_n · ∂L/∂a_n|, likewise.

Rows outside MLPs have no activation of their own: they go by magnitude under every name. A layer counts as much as the
root mean square of its MLP neurons (``magnitude``: ‖τ_l‖ / ‖θ₀_l‖ over all its modules). What lies outside the layers
(embedding, head) is taken to be more important than any layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuron_methods.adapters.live import base_weight
from neuron_methods.kernels.select import keep_threshold, relative_norms
from neuron_methods.models.loading import input_device
from neuron_methods.neurons import MlpLayer, NeuronMap, Ownership, find_modules, layer_of, neuron_map
from neuron_methods.profiling.measured_model import LoadedModel
from neuron_methods.profiling.recorder import Recorder
from neuron_methods.routing.data import CalibrationLoss
from neuron_methods.routing.mixing import AdapterMixer
from neuron_methods.routing.route_yaml import Importance


@dataclass(frozen=True)
class ExpertImportance:
    """What was measured of one expert.

    Attributes:
        layers: layer -> importance; infinite outside the layers proper.
        neurons: layer -> of its MLP neurons, float64 (neurons,); only layers whose MLP the expert updates.
        rows: module path -> of the output features of a module that is no MLP's, float64 (out,).
        owners: module path -> which MLP neurons its slices belong to.
    """

    layers: dict[str, float]
    neurons: dict[str, Tensor]
    rows: dict[str, Tensor]
    owners: dict[str, Ownership]


def neurons_of(model: Any) -> NeuronMap:
    """Map the neurons of a model in memory; raises UserError if its family is unknown."""
    return neuron_map(model.config, type(model).__name__)


@torch.no_grad()
def measure_importance(
    model: Any, mixer: AdapterMixer, expert: str, how: Importance, loss: CalibrationLoss, *, by_neuron: bool
) -> ExpertImportance:
    """Measure one expert on `model`, the base with the mixer's seam in it.

    `loss` is on the expert's calibration data, and read for ``activation`` and ``taylor`` only. Without `by_neuron`
    only layers matter: then no family has to be known, unless `how` asks for activations.

    Raises:
        UserError: the model's family is unknown, and neurons are asked for.
    """
    neurons = neurons_of(model) if by_neuron or how != "magnitude" else None
    statistics: dict[str, Tensor] = {}
    if neurons is not None and how != "magnitude":
        loaded = LoadedModel(model, neurons, input_device(model))
        recorder = Recorder(loaded, loss.feeder, top=0, gradients=how == "taylor")
        with recorder.watching(), mixer.using(mixer.only(expert)):
            for batch in loss.batches:
                recorder.run(batch)
        recorder.check_finite(f"expert {expert}")
        name = "taylor" if how == "taylor" else "mean_abs"
        statistics = {key: record.sums.means()[name].double() for key, record in recorder.records.items()}
    update: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    outgoing: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    owners: dict[str, Ownership] = {}
    mlps: dict[str, MlpLayer] = {}
    squares: dict[str, list[float]] = {}
    for path in mixer.modules:
        delta = mixer.delta(path, expert)
        if delta is None:
            continue
        weight = base_weight(mixer.modules[path])
        layer = layer_of(path)
        totals = squares.setdefault(layer, [0.0, 0.0])
        totals[0] += float(delta.square().sum())
        totals[1] += float(weight.square().sum())
        owner = neurons.owner_of(f"{path}.weight") if neurons is not None else None
        if owner is None:
            axis = 0 if getattr(mixer.modules[path], "fan_in_fan_out", False) else 1
            rows[path] = relative_norms(delta.double().square().sum(axis), weight.double().square().sum(axis)).cpu()
            continue
        owners[path], mlps[layer] = owner, owner.layer
        for sums, tensor in ((update, delta), (base, weight)):
            sums[layer] = sums.get(layer, 0) + _per_neuron(tensor, owner)
        if owner.role == "down":
            outgoing[layer] = _per_neuron(weight + delta, owner).sqrt()
    found = {}
    for layer, mlp in mlps.items():
        if how == "magnitude":
            found[layer] = relative_norms(update[layer], base[layer])
        elif how == "taylor":
            found[layer] = statistics[mlp.key]
        else:
            norms = outgoing[layer] if layer in outgoing else _outgoing(model, mlp)
            found[layer] = statistics[mlp.key] * norms
    layers = {}
    for layer, (changed, there) in squares.items():
        if not layer.rpartition(".")[2].isdigit():
            layers[layer] = float("inf")
        elif how == "magnitude" or layer not in found:
            layers[layer] = (changed / max(there, 1e-30)) ** 0.5
        else:
            layers[layer] = float(found[layer].square().mean().sqrt())
    return ExpertImportance(layers, found, rows, owners)


def keep_masks(importance: ExpertImportance, density: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Choose which neurons of each layer keep their update: the `density` most important ones, ties with them.

    Returns:
        Bool masks: layer -> (neurons,) of MLP neurons, module path -> (out,) of other modules' rows.
    """
    neurons, rows = (
        {key: values >= keep_threshold(values, density) for key, values in of.items()}
        for of in (importance.neurons, importance.rows)
    )
    return neurons, rows


def factor_masks(importance: ExpertImportance, density: float, mixer: AdapterMixer) -> dict[str, tuple[str, Tensor]]:
    """Choose likewise, as masks of LoRA's factors: module path -> ("B", rows kept) or ("A", columns kept).

    A neuron's incoming weights are rows of the update, and so of B; its outgoing weights are columns of the update, and
    so of A: an update of which only some neurons are left is still a product of two factors, of the same rank.
    """
    neurons, rows = keep_masks(importance, density)
    masks = {path: ("B", mask) for path, mask in rows.items()}
    for path, owner in importance.owners.items():
        kept = neurons[layer_of(path)]
        masks[path] = ("A", kept) if owner.role == "down" else ("B", kept.repeat(len(owner.roles)))
    return masks


def _per_neuron(tensor: Tensor, owner: Ownership) -> Tensor:
    """Sum of squares of the slices that each neuron owns, float64 (neurons,) on the CPU."""
    sums = tensor.double().square().sum(1 - owner.axis)
    return sums.view(len(owner.roles), -1).sum(0).cpu()


def _outgoing(model: Any, mlp: MlpLayer) -> Tensor:
    """Norms of a layer's outgoing weights where the expert leaves them as they are, float64 (neurons,)."""
    down = find_modules(model, mlp).down
    axis = next(part.axis for part in mlp.parts if part.role == "down")
    weight = getattr(down, "base_layer", down).weight.detach().double()
    return weight.square().sum(1 - axis).sqrt().cpu()
