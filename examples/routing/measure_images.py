"""Measure a routed image classifier on the zoo's tasks (examples/zoo/vit.py), and print tables.

    mergekit-neuron route routed.yaml ./routed
    python examples/routing/measure_images.py routed.yaml ./routed ZOO --out-of-domain textures counts

ZOO holds data/TASK/test.parquet. Experts must be called as their tasks. Tasks named out of domain have no expert; there
the routed model is to do as the base does. The zoo's models have one head for all tasks; a task is scored among its own
classes.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification
from twin import TwinMerging
from variants import Material, forward_times, largest_gap, show

from neuron_methods.models.loading import load_processor
from neuron_methods.models.reference import Place
from neuron_methods.routing.route_yaml import read_config
from neuron_methods.routing.static import merge_routed

BATCH = 250
# Static merges: at their defaults, and over a small grid of their scale.
STATIC: list[tuple[str, dict[str, Any]]] = [
    ("neuro_merging", {}),
    *(("neuro_merging", {"lambda_orthogonal": scale}) for scale in (0.5, 1.0, 1.5, 2.0, 3.0)),
    ("min_merging", {}),
    *(("min_merging", {"lambda": scale}) for scale in (0.5, 1.5, 2.0)),
    *(("ties", {"density": 0.2, "weight": 1.0, "lambda": scale}) for scale in (0.5, 1.0, 1.5, 2.0, 3.0)),
    *(("task_arithmetic", {"weight": scale}) for scale in (0.1, 0.2, 0.3, 0.4, 0.6, 1.0)),
]


def read_task(folder: Path, split: str, processor: Any, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read pixels and labels of a task's examples."""
    import datasets
    from PIL import Image

    rows = datasets.load_dataset("parquet", data_files=str(folder / f"{split}.parquet"), split="train")
    rows = rows.cast_column("image", datasets.Image(decode=False)).select(range(min(limit, len(rows))))
    images = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    return processor(images, return_tensors="pt")["pixel_values"], torch.tensor(rows["label"])


@torch.no_grad()
def accuracy(model: Any, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Compute the accuracy of a model on a task, among the task's own classes."""
    classes = labels.unique()
    found = [classes[model(pixel_values=batch).logits[:, classes].argmax(1)] for batch in pixels.split(BATCH)]
    return float((torch.cat(found) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("routed", type=Path)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--out-of-domain", nargs="*", default=[])
    parser.add_argument("--limit", type=int, default=2000, help="test images per task")
    parser.add_argument("--no-static", action="store_true", help="leave out static merges")
    arguments = parser.parse_args()
    material = Material(arguments.config, arguments.routed)
    base = read_config(arguments.config).base_model
    processor = load_processor("AutoImageProcessor", Place(base), base)
    names = material.routed.experts

    def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return read_task(arguments.zoo / "data" / name, "test", processor, arguments.limit)

    tasks = {name: read(name) for name in names}
    strange = {name: read(name) for name in arguments.out_of_domain}

    def score(model: Any) -> dict[str, float]:
        return {name: accuracy(model, *data) for name, data in tasks.items()}

    right = inside = total = 0
    for name, (pixels, _) in tasks.items():
        for batch in pixels.split(BATCH):
            routing = material.routed.route(pixel_values=batch)
            right += int((routing.probabilities.argmax(1) == names.index(name)).sum())
            inside += int(routing.in_domain.sum())
            total += len(batch)
    print(f"router on {total} test images: {right / total:.1%} to their own expert, {inside / total:.1%} in domain\n")

    with material.fixed(material.routed, {}) as base:
        rows = {"base": score(base)}
    for label, model in (("experts, each on its own task", material.plain), ("enhanced experts", material.routed)):
        rows[label] = {}
        for name in names:
            with material.fixed(model, {name: 1.0}) as expert:
                rows[label][name] = accuracy(expert, *tasks[name])
    rows["routed"] = score(material.routed)
    rows["routed, without enhancement"] = score(material.plain)
    with material.redundant(material.routed, "none") as model:
        rows["routed, redundant layers left to the base"] = score(model)
    drawn = []
    for seed in range(3):
        with material.redundant(material.routed, "random", seed) as model:
            drawn.append(score(model))
    rows["routed, redundant layers to a random expert (3 draws)"] = mean_of(drawn)
    drawn = []
    for seed in range(3):
        with material.random_core(seed) as model:
            drawn.append(score(model))
    rows["routed, as many layers redundant at random (3 draws)"] = mean_of(drawn)
    rows["Twin-Merging, scale 0.3, rank 8"] = score(TwinMerging(material).eval())
    best: dict[str, tuple[float, str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method, parameters in [] if arguments.no_static else STATIC:
            path = material.merged(Path(folder), method, **parameters)
            scores = score(AutoModelForImageClassification.from_pretrained(path).eval())
            mean = statistics.mean(scores.values())
            label = f"{method} {parameters or '(defaults)'}"
            print(f"static: {label}: {mean:.1%}", flush=True)
            best[method] = max(best.get(method, (-1.0, "", {})), (mean, label, scores), key=lambda found: found[0])
        if not arguments.no_static:
            merge_routed(arguments.config, Path(folder) / "response")
            merged = AutoModelForImageClassification.from_pretrained(Path(folder) / "response").eval()
            rows["static, neuron_response with inputs"] = score(merged)
    for _, label, scores in sorted(best.values(), key=lambda found: -found[0]):
        rows[f"static, {label}"] = scores
    print(f"\n{show(rows)}\n")
    if strange:
        with material.fixed(material.routed, {}) as base:
            of_base = {name: accuracy(base, *data) for name, data in strange.items()}
        print(
            show(
                {
                    "base": of_base,
                    "routed": {name: accuracy(material.routed, *data) for name, data in strange.items()},
                    "share left to the base": {
                        name: float((~material.routed.route(pixel_values=data[0]).in_domain).float().mean())
                        for name, data in strange.items()
                    },
                }
            )
        )
    mixed = {"pixel_values": torch.cat([pixels[:8] for pixels, _ in (*tasks.values(), *strange.values())])}
    print(
        f"\nmixed batch of {len(mixed['pixel_values'])}: at most {largest_gap(material.routed, mixed):.1e} from alone"
    )
    print_times(forward_times(material, mixed))


def mean_of(scores: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.mean(each[name] for each in scores) for name in scores[0]}


def print_times(times: dict[str, float]) -> None:
    one = times["one adapter"]
    for name, seconds in times.items():
        print(f"forward, {name}: {1000 * seconds:.1f} ms, {seconds / one:.2f} x one adapter")


if __name__ == "__main__":
    main()
