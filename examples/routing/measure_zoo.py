"""Measure a routed model of a zoo of text tasks (examples/zoo), one of which no expert saw; and print tables.

    python examples/routing/measure_zoo.py ZOO OUT --unseen reverse

Routes the zoo's adapters but that of the unseen task, with every choice of enhancement and of redundant layers, and
holds them against the experts, Twin-Merging, and static merges. On the unseen task, where all are to do as the base
does, the perplexity of the right answers is told too.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from twin import TwinMerging
from variants import Material, show

from neuron_methods.evaluation import evaluate_model, load_tasks, read_examples
from neuron_methods.models.loading import load_processor, load_weights
from neuron_methods.models.reference import Place
from neuron_methods.routing.build import build_routed_model
from neuron_methods.routing.static import merge_routed

# Enhancement and merging of each routed model; a tolerance of 0.05 drops enough for its filling to matter.
LOOSE = {"select": "smallest", "tolerance": 0.05}
ROUTED: dict[str, dict[str, dict[str, Any]]] = {
    "no enhancement": {"enhancement": {"enabled": False}},
    "best": {},
    "best, tolerance 0.05": {"enhancement": {"tolerance": 0.05}},
    "smallest": {"enhancement": {"select": "smallest"}},
    "smallest, tolerance 0.05": {"enhancement": LOOSE},
    "the same, by the router's weights": {"enhancement": LOOSE, "merging": {"redundant": "router"}},
    "the same, left to the base": {"enhancement": LOOSE, "merging": {"redundant": "none"}},
    "the same, dropped kept for others": {"enhancement": LOOSE, "merging": {"dropped": "keep"}},
}
TWIN = [(0.1, 8), (0.3, 8), (0.3, 4)]
STATIC: list[tuple[str, dict[str, Any]]] = [
    ("min_merging", {}),
    ("ties", {"density": 0.2, "weight": 1.0, "lambda": 1.0}),
    ("task_arithmetic", {"weight": 0.3}),
]


def configuration(zoo: Path, names: list[str], changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write the YAML of a routed model of these experts."""

    def data(name: str, split: str) -> dict[str, Any]:
        columns = {"input": "prompt", "target": "answer"}
        return {"source": str(zoo / "data" / name), "split": split, "columns": columns}

    experts = [
        {
            "name": name,
            "adapter": str(zoo / "adapters" / name),
            "data": data(name, "train"),
            "calibration": data(name, "validation"),
        }
        for name in names
    ]
    enhancement = {"samples": 128, **changes.get("enhancement", {})}
    router = {"in_domain_share": 1.0}
    content = {"base_model": str(zoo / "base"), "experts": experts, "router": router, "check_base": False}
    return {**content, "enhancement": enhancement, "merging": changes.get("merging", {})}


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, examples: Any) -> float:
    """Measure the perplexity of the right answers of a text-to-text task, behind their prompts."""
    loss = count = 0.0
    prompts = [examples.text(i, "input") for i in range(len(examples))]
    targets = [examples.text(i, "target") for i in range(len(examples))]
    for start in range(0, len(prompts), 100):
        read = tokenizer(prompts[start : start + 100], return_tensors="pt", padding=True)
        said = tokenizer(targets[start : start + 100], return_tensors="pt", padding=True)
        labels = said["input_ids"].masked_fill(said["attention_mask"] == 0, -100)
        inputs = {key: read[key] for key in ("input_ids", "attention_mask")}
        real = int((labels != -100).sum())
        loss += float(model(**inputs, labels=labels).loss) * real
        count += real
    return math.exp(loss / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--unseen", required=True, help="task whose expert is left out")
    parser.add_argument("--limit", type=int, default=500, help="test examples per task")
    arguments = parser.parse_args()
    zoo, out = arguments.zoo.resolve(), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    tasks = {task.name: replace(task, limit=arguments.limit) for task in load_tasks(zoo / "tasks.yml")}
    examples = {name: read_examples(task) for name, task in tasks.items()}
    names = [name for name in tasks if name != arguments.unseen]
    tokenizer = load_processor("AutoTokenizer", Place(str(zoo / "base")), "base")
    transformers.logging.set_verbosity_error()

    def score(model: Any, name: str) -> float:
        return evaluate_model(model, tokenizer, tasks[name], examples=examples[name]).score

    seen: dict[str, dict[str, float]] = {}
    unseen: dict[str, tuple[float, float]] = {}
    for label, model in models(zoo, out, names):
        seen[label] = {name: score(model, name) for name in names}
        unseen[label] = (
            score(model, arguments.unseen),
            perplexity(model, tokenizer, examples[arguments.unseen]),
        )
        mean = sum(seen[label].values()) / len(names)
        print(f"{label}: {mean:.1%}; {arguments.unseen}: {unseen[label][0]:.1%}, {unseen[label][1]:.2f}", flush=True)
    for label in ROUTED:
        material = Material(out / f"{label}.yaml", out / label)
        row = {}
        for name in names:
            with material.fixed(material.routed, {name: 1.0}) as expert:
                row[name] = score(expert, name)
        seen[f"experts, each on its own task: {label}"] = row
    print(f"\n{show(seen)}\n\n| unseen: {arguments.unseen} | score | perplexity of the answers |\n|---|---|---|")
    for label, (right, spread) in unseen.items():
        print(f"| {label} | {100 * right:.1f} % | {spread:.2f} |")
    print("\n| expert | enhancement | samples | loss before | after | difference |\n|---|---|---|---|---|---|")
    for label in ROUTED:
        for expert in json.loads((out / label / "enhancement.json").read_text())["experts"]:
            if (held := expert["held_out"]) is not None:
                gap = f"{held['enhanced'] - held['original']:+.4f} ({held['low']:+.4f} to {held['high']:+.4f})"
                losses = f"{held['original']:.4f} | {held['enhanced']:.4f}"
                print(f"| {expert['expert']} | {label} | {held['samples']} | {losses} | {gap} |")


def models(zoo: Path, out: Path, names: list[str]) -> Iterator[tuple[str, Any]]:
    """Make every model in turn, the base first."""
    for label, changes in ROUTED.items():
        config = out / f"{label}.yaml"
        config.write_text(yaml.safe_dump(configuration(zoo, names, changes), sort_keys=False))
        if not (out / label).exists():
            build_routed_model(config, out / label, work_dir=out / "work")
        material = Material(config, out / label)
        if label == next(iter(ROUTED)):
            with material.fixed(material.routed, {}) as base:
                yield "base", base
            for scale, rank in TWIN:
                yield f"Twin-Merging, scale {scale}, rank {rank}", TwinMerging(material, scale, rank).eval()
            for method, parameters in STATIC:
                path = material.merged(out, method, **parameters)
                yield f"static, {method} {parameters or ''}", load_weights(Place(str(path)), method, dtype="float32")
            if not (out / "response").exists():
                merge_routed(config, out / "response")
            yield "static, neuron_response with inputs", load_weights(Place(str(out / "response")), "response")
        yield f"routed, {label}", material.routed


if __name__ == "__main__":
    main()
