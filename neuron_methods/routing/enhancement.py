"""Stage 1 of MIN-Merging: what of an expert's update helps, found on its own calibration data.

Greedy: from the least important layer up, a layer's update is dropped; it stays dropped if the calibration loss is not
above the original expert's by more than `tolerance`, and after `patience` refusals the rest is kept. The dropped layers
are the expert's *redundant* ones, the others its *core*. Within the core, the update of the `density` most important
neurons is kept; where the loss does not allow that, a larger density is tried, up to all of them. So an enhanced expert
is never worse than the original by more than `tolerance` on its calibration data. Every step is in the trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from neuron_methods.neurons import layer_of
from neuron_methods.routing.data import CalibrationLoss
from neuron_methods.routing.importance import factor_masks, measure_importance
from neuron_methods.routing.mixing import AdapterMixer
from neuron_methods.routing.route_yaml import Enhancement
from neuron_methods.support.progress import progress_bar

_DENSITY_TRIALS = 4  # halving the distance to 1 each time, before all neurons are kept


@dataclass(frozen=True)
class Step:
    """One thing that was tried.

    Attributes:
        what: ``base``, ``original``, ``drop``, ``density``, or ``enhanced`` for the outcome.
        layer: which one was dropped.
        importance: of that layer; None outside the layers, and where nothing was dropped.
        density: share of the core's neurons kept.
        loss: on the calibration data, nats.
        kept: whether what was tried stays.
    """

    what: str
    loss: float
    kept: bool
    layer: str | None = None
    importance: float | None = None
    density: float | None = None


@dataclass(frozen=True)
class Enhanced:
    """An enhanced expert; its adapter's factors in memory are masked.

    Attributes:
        expert: its name.
        core, redundant: layers, in the model's order. Layers that the expert never touched are in neither.
        density: share of the core's neurons kept.
        samples: of calibration data.
        trace: every step with its loss.
    """

    expert: str
    core: tuple[str, ...]
    redundant: tuple[str, ...]
    density: float
    samples: int
    trace: tuple[Step, ...]


def enhance_expert(
    model: Any,
    mixer: AdapterMixer,
    expert: str,
    loss: CalibrationLoss,
    settings: Enhancement,
) -> Enhanced:
    """Find an expert's core and mask its adapter's factors to the neurons that are kept.

    `model` is the base with the mixer's seam in it, `loss` that on the expert's calibration data.
    """
    place = mixer.experts.index(expert)
    layers = untouched(mixer, expert).core
    coefficients = mixer.only(expert).clone()

    def measure() -> float:
        with mixer.using(coefficients):
            return loss(model)

    with mixer.using(None):
        trace = [Step("base", loss(model), kept=False)]
    limit = measure()
    trace.append(Step("original", limit, kept=True))
    limit += settings.tolerance
    by_neuron = settings.density < 1
    importance = measure_importance(model, mixer, expert, settings.importance, loss, by_neuron=by_neuron)
    redundant: list[str] = []
    refusals = 0
    order = sorted(layers, key=lambda key: importance.layers[key])
    for layer in progress_bar(order, what=f"{expert}: layers", unit="layer"):
        if refusals == settings.patience or len(redundant) == len(layers) - 1:  # an expert keeps one layer at least
            break
        coefficients[0, mixer.layers.index(layer), place] = 0
        measured = measure()
        kept = measured <= limit
        value = importance.layers[layer]
        trace.append(Step("drop", measured, kept, layer, value if value < float("inf") else None))
        if kept:
            redundant.append(layer)
        else:
            refusals += 1
            coefficients[0, mixer.layers.index(layer), place] = 1
    density = settings.density
    for _ in range(_DENSITY_TRIALS):
        if density >= 1:
            break
        before = _mask(mixer, expert, factor_masks(importance, density, mixer), redundant)
        measured = measure()
        kept = measured <= limit
        trace.append(Step("density", measured, kept, density=density))
        if kept:
            break
        for weight, values in before:
            weight.copy_(values)
        density = (1 + density) / 2
    else:
        density = 1.0
    trace.append(Step("enhanced", measure(), kept=True, density=density))
    parts = (tuple(layer for layer in layers if (layer in redundant) == dropped) for dropped in (False, True))
    return Enhanced(expert, *parts, density, loss.samples, tuple(trace))


def _mask(
    mixer: AdapterMixer, expert: str, masks: dict[str, tuple[str, Tensor]], redundant: list[str]
) -> list[tuple[Tensor, Tensor]]:
    """Mask an expert's factors outside its redundant layers; returns them with the values they had."""
    before = []
    for path, (factor, mask) in masks.items():
        if layer_of(path) in redundant:
            continue
        module = mixer.modules[path]
        weight = (module.lora_B if factor == "B" else module.lora_A)[expert].weight.data
        before.append((weight, weight.clone()))
        weight.mul_(mask.to(weight).unsqueeze(1 if factor == "B" else 0))
    return before


def untouched(mixer: AdapterMixer, expert: str) -> Enhanced:
    """Take an expert as it is, for a routed model without enhancement: every layer it changes is core."""
    return Enhanced(expert, tuple(dict.fromkeys(map(layer_of, mixer.paths_of(expert)))), (), 1.0, 0, ())


def kept_paths(mixer: AdapterMixer, enhanced: Enhanced) -> list[str]:
    """Name the modules whose updates an enhanced expert still has."""
    return [path for path in mixer.paths_of(enhanced.expert) if layer_of(path) in enhanced.core]
