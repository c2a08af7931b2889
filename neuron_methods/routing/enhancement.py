"""Stage 1: what of an expert's update helps, found on its own calibration data.

That there is such a stage is MIN-Merging's (Liang, reviews); how it goes is ours. Greedy: from the least important
layer up, a layer's update is dropped; it stays dropped if the calibration loss is not above the original expert's by
more than `tolerance`, and after `patience` refusals the rest is kept. The dropped layers are the expert's *redundant*
ones, the others its *core*. Within the core, the update of the most important neurons is kept, by a `density`. Which
point is chosen, `select` says:

- ``best``: along the greedy path the number of dropped layers with the lowest loss, none included; then the density
  with the lowest loss, of the one that is asked for, three halfway to 1 each time, and 1. So on the data that decides
  an enhanced expert is never worse than the original;
- ``smallest``: the end of the path, and the smallest density that the tolerance allows: never worse by more than that.

The lowest of several losses is low by luck, too. So both experts are measured on calibration data that had no say.
Every step is in the trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neuron_methods.neurons import layer_of
from neuron_methods.routing.data import CalibrationLoss
from neuron_methods.routing.importance import ExpertImportance, factor_masks, measure_importance
from neuron_methods.routing.mixing import AdapterMixer
from neuron_methods.routing.route_yaml import Dropped, Enhancement
from neuron_methods.support.progress import progress_bar

_RESAMPLES = 2000
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
        passed: whether the greedy path went on from there.
    """

    what: str
    loss: float
    kept: bool
    layer: str | None = None
    importance: float | None = None
    density: float | None = None
    passed: bool = False


@dataclass(frozen=True)
class HeldOut:
    """An enhanced expert against the original, on samples that had no say in it.

    Attributes:
        samples: how many.
        original, enhanced: losses, nats.
        low, high: ends of the 95 % interval of their difference, enhanced less original, over samples in pairs.
    """

    samples: int
    original: float
    enhanced: float
    low: float
    high: float

    @classmethod
    def compared(cls, original: Tensor, enhanced: Tensor) -> HeldOut:
        """Compare the losses of the same samples, float64 (samples,) each; the interval is a bootstrap's."""
        differences = enhanced - original
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(differences), (_RESAMPLES, len(differences)), generator=generator)
        low, high = differences[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return cls(len(differences), float(original.mean()), float(enhanced.mean()), low, high)

    @property
    def verdict(self) -> str:
        """Say what the interval tells."""
        return "better" if self.high < 0 else "worse" if self.low > 0 else "no difference that can be told"


@dataclass(frozen=True)
class Enhanced:
    """An enhanced expert; its adapter's factors in memory are masked.

    Attributes:
        expert: its name.
        core, redundant: layers, in the model's order. Layers that the expert never touched are in neither.
        density: share of the core's neurons kept.
        samples: of calibration data.
        trace: every step with its loss.
        held_out: how it compares where it had no say; None: nothing was changed.
    """

    expert: str
    core: tuple[str, ...]
    redundant: tuple[str, ...]
    density: float
    samples: int
    trace: tuple[Step, ...]
    held_out: HeldOut | None = None


def enhance_expert(
    model: Any,
    mixer: AdapterMixer,
    expert: str,
    loss: CalibrationLoss,
    settings: Enhancement,
    held_out: CalibrationLoss | None = None,
) -> Enhanced:
    """Find an expert's core and mask its adapter's factors to the neurons that are kept.

    `model` is the base with the mixer's seam in it, `loss` that on the expert's calibration data, `held_out` that on
    such data as have no say.
    """
    place = mixer.experts.index(expert)
    layers = untouched(mixer, expert).core
    coefficients = mixer.only(expert).clone()

    def measure() -> float:
        with mixer.using(coefficients):
            return loss(model)

    def of_held_out() -> Tensor | None:
        with mixer.using(coefficients):
            return None if held_out is None else held_out.of_samples(model)

    with mixer.using(None):
        trace = [Step("base", loss(model), kept=False)]
    original, before = measure(), of_held_out()
    trace.append(Step("original", original, kept=True))
    limit = original + settings.tolerance
    by_neuron = settings.density < 1
    importance = measure_importance(model, mixer, expert, settings.importance, loss, by_neuron=by_neuron)
    path: list[str] = []
    reached = [original]  # with so many layers of the path dropped
    refusals = 0
    order = sorted(layers, key=lambda key: importance.layers[key])
    for layer in progress_bar(order, what=f"{expert}: layers", unit="layer"):
        if refusals == settings.patience or len(path) == len(layers) - 1:  # an expert keeps one layer at least
            break
        coefficients[0, mixer.layers.index(layer), place] = 0
        measured = measure()
        passed = measured <= limit
        value = importance.layers[layer]
        trace.append(Step("drop", measured, passed, layer, value if value < float("inf") else None, passed=passed))
        if passed:
            path.append(layer)
            reached.append(measured)
        else:
            refusals += 1
            coefficients[0, mixer.layers.index(layer), place] = 1
    best = settings.select == "best"
    dropped = reached.index(min(reached)) if best else len(path)
    redundant = path[:dropped]
    for layer in path[dropped:]:
        coefficients[0, mixer.layers.index(layer), place] = 1
    trace = [replace(step, kept=step.layer in redundant) if step.what == "drop" else step for step in trace]
    tried, density = _try_densities(
        mixer, importance, expert, settings.density, redundant, measure, reached[dropped] if best else limit, best
    )
    trace += [*tried, Step("enhanced", measure(), kept=True, density=density)]
    parts = (tuple(layer for layer in layers if (layer in redundant) == gone) for gone in (False, True))
    after = of_held_out() if redundant or density < 1 else None
    compared = None if before is None or after is None else HeldOut.compared(before, after)
    return Enhanced(expert, *parts, density, loss.samples, tuple(trace), compared)


def _try_densities(
    mixer: AdapterMixer,
    importance: ExpertImportance,
    expert: str,
    density: float,
    redundant: list[str],
    measure: Callable[[], float],
    limit: float,
    best: bool,
) -> tuple[list[Step], float]:
    """Mask an expert's core to its most important neurons; returns what was tried, and the density that is kept.

    Kept is the first density, from the smallest up, whose loss is not above `limit`; with `best`, that of the lowest
    loss below it. Without any, all neurons are.
    """
    steps: list[Step] = []
    for _ in range(_DENSITY_TRIALS if density < 1 else 0):
        before = _mask(mixer, expert, factor_masks(importance, density, mixer), redundant)
        measured = measure()
        kept = measured < limit if best else measured <= limit
        steps.append(Step("density", measured, kept, density=density))
        if kept and not best:
            return steps, density
        for weight, values in before:
            weight.copy_(values)
        density = (1 + density) / 2
    lowest = min((step for step in steps if step.kept), key=lambda step: step.loss, default=None)
    if lowest is None or lowest.density is None:
        return steps, 1.0
    _mask(mixer, expert, factor_masks(importance, lowest.density, mixer), redundant)
    return [replace(step, kept=step is lowest) for step in steps], lowest.density


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
        bias = mixer.biases[expert].get(path)
        if factor == "B" and bias is not None:  # a neuron's own, as the rows of its incoming weights are
            before.append((bias, bias.clone()))
            bias.mul_(mask.to(bias))
    return before


def untouched(mixer: AdapterMixer, expert: str) -> Enhanced:
    """Take an expert as it is, for a routed model without enhancement: every layer it changes is core."""
    return Enhanced(expert, tuple(dict.fromkeys(map(layer_of, mixer.paths_of(expert)))), (), 1.0, 0, ())


def kept_paths(mixer: AdapterMixer, enhanced: Enhanced, dropped: Dropped = "discard") -> list[str]:
    """Name the modules whose updates an enhanced expert still has; with ``keep`` all of them, for others' inputs."""
    paths = mixer.paths_of(enhanced.expert)
    return paths if dropped == "keep" else [path for path in paths if layer_of(path) in enhanced.core]
