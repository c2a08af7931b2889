"""What a routed model is measured against, all in one process: the experts themselves, ablations, static merges."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from neuron_methods import NeuronRoutedModel
from neuron_methods.plugin.merging import merge_to_directory
from neuron_methods.routing.base import load_base
from neuron_methods.routing.experts import adapter_directories, load_experts
from neuron_methods.routing.route_yaml import RouteConfig, read_config
from neuron_methods.routing.routed_files import RoutedExpert


class Material:
    """A routed model, and the experts it was made from.

    Attributes:
        routed: as `mergekit-neuron route` made it.
        plain: the same router on the experts as they were: the routed model without enhancement.
    """

    def __init__(self, configuration: Path, routed: Path) -> None:
        self.config: RouteConfig = read_config(configuration)
        self.routed = NeuronRoutedModel.from_pretrained(routed, dtype=self.config.dtype)
        self.adapters = adapter_directories({expert.name: expert.adapter for expert in self.config.experts})
        base = load_base(self.config.base_model, "base_model", dtype=self.config.dtype)
        stored = self.routed.routed_config
        whole = replace(stored, experts=tuple(RoutedExpert(e.name) for e in stored.experts))
        experts = load_experts(base, self.adapters, "measuring")
        self.plain = NeuronRoutedModel(experts, self.routed.router, whole, self.config.base_model).eval()

    @contextmanager
    def redundant(self, model: NeuronRoutedModel, kind: str, seed: int = 0) -> Iterator[NeuronRoutedModel]:
        """Fill redundant layers otherwise while the block lasts."""
        before = model.routed_config
        model.routed_config = replace(before, redundant=kind, seed=seed)
        try:
            yield model
        finally:
            model.routed_config = before

    @contextmanager
    def random_core(self, seed: int) -> Iterator[NeuronRoutedModel]:
        """Give `plain` as many redundant layers as enhancement found, drawn at random, while the block lasts."""
        model, before = self.plain, self.plain._core
        drawn = torch.ones_like(before)
        generator = torch.Generator().manual_seed(seed)
        for number, expert in enumerate(self.routed.routed_config.experts):
            count = len(expert.redundant_layers)
            drawn[torch.randperm(len(drawn), generator=generator)[:count], number] = False
        model._core = drawn
        try:
            yield model
        finally:
            model._core = before

    @contextmanager
    def fixed(self, model: NeuronRoutedModel, weights: dict[str, float]) -> Iterator[Any]:
        """Let the base compute with the same coefficients for every input while the block lasts: task arithmetic."""
        coefficients = model.mixer.uniform(torch.tensor([weights.get(name, 0.0) for name in model.experts]))
        with model.mixer.using(coefficients):
            yield model.base

    def merged(self, folder: Path, method: str, **parameters: Any) -> Path:
        """Merge the experts statically, by any method of mergekit or ours."""
        name = "-".join([method, *(f"{key}={value}" for key, value in parameters.items())])
        base = self.config.base_model
        content = {
            "merge_method": method,
            "base_model": base,
            "models": [{"model": f"{base}+{adapter}"} for adapter in self.adapters.values()],
            "parameters": parameters,
            "dtype": "float32",
        }
        out = folder / name
        if not out.exists():
            merge_to_directory(yaml.safe_dump(content), str(out), progress=False)
        return out


def largest_gap(model: NeuronRoutedModel, inputs: dict[str, Tensor]) -> float:
    """Measure the largest gap of a mixed batch's logits to what each sample gives alone, at real tokens."""
    gap = 0.0
    mask = inputs.get("attention_mask")
    with torch.no_grad():
        together = model(**inputs).logits
        for i in range(len(together)):
            one = {key: value[i : i + 1] for key, value in inputs.items()}
            mine, alone = together[i], model(**one).logits[0]
            if mask is not None:
                real = mask[i].bool()
                mine, alone = mine[real], alone[real]
            gap = max(gap, float((mine - alone).abs().max()))
    return gap


def unpadded_gap(model: NeuronRoutedModel, inputs: dict[str, Tensor]) -> float:
    """Measure as `largest_gap`, each sample alone without its padding (which stands on the right)."""
    gap = 0.0
    with torch.no_grad():
        together = model(**inputs).logits
        for i, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            one = {key: value[i : i + 1, :length] for key, value in inputs.items()}
            gap = max(gap, float((together[i, :length] - model(**one).logits[0]).abs().max()))
    return gap


def forward_times(material: Material, inputs: dict[str, Tensor], repeats: int = 9) -> dict[str, float]:
    """Median seconds of interleaved passes: peft's own with one adapter, routed with a routing made before, routing."""
    routed, plain = material.routed, material.plain
    expert = plain.experts[0]
    names = ("one adapter", "routed", "routed, all experts everywhere", "routing")
    times: dict[str, list[float]] = {name: [] for name in names}
    routing = routed.route(**inputs)
    spread = plain.mixer.uniform(torch.full((len(plain.experts),), 0.5)).expand(len(routing), -1, -1)

    def one_adapter() -> None:
        plain.peft_model.base_model.enable_adapter_layers()
        plain.peft_model.set_adapter(expert)
        started = time.perf_counter()
        plain.base(**inputs)
        times["one adapter"].append(time.perf_counter() - started)
        plain.peft_model.base_model.disable_adapter_layers()

    def timed(name: str, call: Callable[[], Any]) -> None:
        started = time.perf_counter()
        call()
        times[name].append(time.perf_counter() - started)

    def everywhere() -> None:
        with plain.mixer.using(spread):
            plain.base(**inputs)

    with torch.no_grad():
        for _ in range(repeats + 1):
            one_adapter()
            timed("routed", lambda: routed(**inputs, routing=routing))
            timed("routed, all experts everywhere", everywhere)
            timed("routing", lambda: routed.route(**inputs))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def show(rows: dict[str, dict[str, float]]) -> str:
    """Write scores in percent as a table of Markdown, with their mean."""
    columns = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(columns)} | mean |", "|---" * (len(columns) + 2) + "|"]
    for name, scores in rows.items():
        cells = [f"{100 * scores[column]:.1f} %" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * statistics.mean(scores.values()):.1f} % |")
    return "\n".join(lines)
