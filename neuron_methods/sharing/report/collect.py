"""From tensors to the report's JSON: statistics of every weight, summed up by layer and kind."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neuron_methods.kernels.rows import is_points
from neuron_methods.kernels.task_vectors import TaskVector
from neuron_methods.methods.min_merging import PreparedMinMerging
from neuron_methods.methods.neuro_merging import PreparedNeuroMerging, is_packed
from neuron_methods.methods.neuron_merge import PreparedNeuronMerge
from neuron_methods.plugin.describe import tensor_kind
from neuron_methods.sharing.report.weight_statistics import (
    WeightStatistics,
    cosines,
    distances,
    overlap,
    response_kept,
    top_share,
    weight_statistics,
)

FORMAT, VERSION = "mergekit-neuron-report", 1
# Neurons of each weight that are looked at while a merge runs: few enough to take a few per cent of its time.
ROWS_IN_PASSING = 32
# An expert's important neurons: this share of them, by the size of the update relative to the base weights.
IMPORTANT = 0.1
# A neuron counts as kept where the merge holds at least this share of the expert's update along its direction.
KEPT = 0.5

_LAYER = re.compile(r"^(.*?)\.(\d+)\.")
_STACKS = ("vision", "text", "encoder", "decoder")

Place = tuple[str, int | None, str]


def place_of(name: str) -> Place:
    """Tell (stack, layer, kind) of a tensor by its name; the layer is None outside of layers."""
    match = _LAYER.match(name)
    if match is None:
        return "", None, tensor_kind(name)
    stack = next((stack for stack in _STACKS if stack in match.group(1)), "layers")
    return stack, int(match.group(2)), tensor_kind(name)


class Collector:
    """Statistics of a merge, tensor by tensor.

    Attributes:
        base: id of the base among a tensor's inputs.
        experts: ids of the experts, in order.
        limit: neurons looked at per weight; None: all.
    """

    def __init__(self, base: Hashable, experts: Sequence[Hashable], limit: int | None) -> None:
        self.base, self.experts, self.limit = base, list(experts), limit
        self._places: dict[Place, WeightStatistics] = {}

    def look(self, name: str, inputs: Mapping[Hashable, Tensor], merged: Tensor) -> WeightStatistics | None:
        """Look at one tensor; None where it has no rows, is of integers, or some expert lacks it.

        Args:
            name: of the output tensor.
            inputs: {model: tensor or `TaskVector`}.
            merged: what the merge made of them.
        """
        base = inputs.get(self.base)
        given = [inputs.get(expert) for expert in self.experts]
        # Rows are looked at block by block, and an update that is known by its factors has no rows before it is formed.
        experts = [one.dense().as_subclass(TaskVector) if isinstance(one, TaskVector) else one for one in given]
        whole = [tensor for tensor in (base, *experts, merged) if tensor is not None]
        if (
            base is None
            or len(whole) != len(experts) + 2
            or is_points(name, base.ndim)
            or any(tensor.shape != base.shape or not tensor.is_floating_point() for tensor in whole)
        ):
            return None
        plain = merged.detach().as_subclass(Tensor) if isinstance(merged, TaskVector) else merged.detach()
        with torch.no_grad():
            return weight_statistics(base, experts, plain, limit=self.limit, packed=is_packed(name))

    def take(self, name: str, found: WeightStatistics) -> None:
        """Add what was seen of one tensor to what was seen of others at its place."""
        earlier = self._places.get(place := place_of(name))
        self._places[place] = found if earlier is None else earlier + found

    def document(self, method: str, labels: Mapping[Hashable, str], state: Any = None) -> dict[str, Any]:
        """Put the report's JSON together.

        Args:
            method: name in the YAML.
            labels: model -> what it is called.
            state: the merge by a method of ours, measured, for what it tells beside.
        """
        experts = [labels[expert] for expert in self.experts]
        important = self._important()
        return {
            "format": FORMAT,
            "version": VERSION,
            "method": method,
            "base": labels[self.base],
            "experts": experts,
            "rows_per_weight": self.limit,
            "neurons": sum(found.neurons for found in self._places.values()),
            "places": [
                {"stack": stack, "layer": layer, "kind": kind, **_described(found)}
                for (stack, layer, kind), found in sorted(self._places.items(), key=lambda item: _in_order(*item[0]))
            ],
            "important": important,
            "response_kept": self._responses(),
            "trim": _trim(state, labels),
            "selection": _selection(state, labels),
            "groups": _groups(state),
        }

    def _responses(self) -> list[float]:
        """Response kept of every expert over the model, all matrices alike: the mean of what each place keeps."""
        kept = [response_kept(found.answered, found.missed) for found in self._places.values()]
        return _rounded(torch.stack(kept).mean(dim=0)) if kept else []

    def _important(self) -> dict[str, Any]:
        """Which neurons matter most to each expert, over the model, and what became of them."""
        places = sorted(self._places, key=lambda place: _in_order(*place))
        if not places:
            return {"share": IMPORTANT, "kept_from": KEPT, "kept": [], "overlap": [], "layers": []}
        importance = torch.cat([self._places[place].importance for place in places], dim=1)
        kept = torch.cat([self._places[place].kept for place in places], dim=1) >= KEPT
        chosen = torch.stack([top_share(row, IMPORTANT) for row in importance])
        layers: dict[tuple[str, int | None], list[slice]] = {}
        start = 0
        for place in places:
            stop = start + self._places[place].neurons
            layers.setdefault(place[:2], []).append(slice(start, stop))
            start = stop
        return {
            "share": IMPORTANT,
            "kept_from": KEPT,
            "kept": [_share(k[c]) for k, c in zip(kept, chosen, strict=True)],
            "overlap": [[round(overlap(a, b), 6) for b in chosen] for a in chosen],
            "layers": [
                {
                    "stack": stack,
                    "layer": layer,
                    "neurons": [int(sum(c[s].sum() for s in slices)) for c in chosen],
                    "kept": [
                        _share(torch.cat([k[s][c[s]] for s in slices])) for k, c in zip(kept, chosen, strict=True)
                    ],
                }
                for (stack, layer), slices in layers.items()
            ],
        }


def _in_order(stack: str, layer: int | None, kind: str = "") -> tuple[int, int, str]:
    return ("", "layers", *_STACKS).index(stack), -1 if layer is None else layer, kind


def _described(found: WeightStatistics) -> dict[str, Any]:
    energy = found.products.diagonal()
    directions = found.spectrum / max(1, found.with_spectrum)
    return {
        "neurons": found.neurons,
        # Of the experts in their order, then of the merge.
        "parallel_share": _rounded(torch.where(energy > 0, found.parallel / energy.clamp(min=1e-300), 0.0)),
        "relative_update": _rounded((energy / max(found.base, 1e-300)).sqrt()),
        "cosines": [_rounded(row) for row in cosines(found.products)],
        "conflict_before": round(found.conflict_before / max(1, found.pairs), 6),
        "conflict_after": round(found.conflict_after / max(1, found.changes), 6),
        "spectrum": _rounded(directions),
        "response_kept": _rounded(response_kept(found.answered, found.missed)),
        # Of the merge to the base, then to the experts, in units of the base's norm.
        "distances": _rounded(distances(found.products) / max(found.base, 1e-300) ** 0.5),
    }


def _trim(state: Any, labels: Mapping[Hashable, str]) -> dict[str, Any] | None:
    if not isinstance(state, PreparedNeuroMerging) or not state.profile.experts:
        return None
    profile = state.profile
    return {
        "experts": [labels.get(key, found.model) for key, found in profile.experts.items()],
        "density": [found.density for found in profile.experts.values()],
        "threshold": [found.threshold for found in profile.experts.values()],
        "sigma": [round(found.sigma, 6) for found in profile.experts.values()],
        "lambda": round(profile.automatic_lambda("mean"), 6),
    }


def _selection(state: Any, labels: Mapping[Hashable, str]) -> dict[str, Any] | None:
    """Of `min_merging`: which share of each layer's MLP neurons goes to nobody, to one expert, to several."""
    if not isinstance(state, PreparedMinMerging):
        return None
    layers = {}
    for block, coefficients in state.coefficients.items():
        if not any(s.kind == "mlp" and s.block == block for s in state.layout.slices.values()):
            continue
        got, takers = coefficients > 0, (coefficients > 0).sum(dim=0)
        layers[block] = {
            "nobody": _share(takers == 0),
            "alone": [_share(row & (takers == 1)) for row in got],
            "shared": _share(takers > 1),
        }
    kept = {labels[expert]: {"kept": k, "of": n} for expert, (k, n) in state.kept.items()}
    return {"experts": [labels[expert] for expert in state.experts], "kept": kept, "layers": _of_layers(layers)}


def _groups(state: Any) -> dict[str, Any] | None:
    """Of `neuron_merge`: how many neurons of each group every layer has."""
    if not isinstance(state, PreparedNeuronMerge):
        return None
    groups = list(state.groups.groups)
    layers = {key: {"counts": [counts[group] for group in groups]} for key, counts in state.groups.counts().items()}
    return {"groups": groups, "layers": _of_layers(layers)}


def _of_layers(found: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What is known by a layer's name, in the order of the layers."""
    placed = [(place_of(f"{name}.")[:2], entry) for name, entry in found.items()]
    placed.sort(key=lambda item: _in_order(*item[0]))
    return [{"stack": stack, "layer": layer, **entry} for (stack, layer), entry in placed]


def _share(chosen: Tensor) -> float:
    return round(float(chosen.double().mean()), 6) if chosen.numel() else 0.0


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]
