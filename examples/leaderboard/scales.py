"""Scales that need no data: what each of them says for a merged update, and what the update's best scale is.

    python examples/leaderboard/scales.py OUT --zoo DIR [--zoo DIR ...]

For every zoo, ψ of `neuro_merging` is formed once per variant and tried at a grid of λ on validation data; every rule's
λ is scored too. A rule that holds up loses little to the best λ on every zoo. Writes OUT/scales.md.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ZOO = Path(__file__).resolve().parents[1] / "zoo"
sys.path.insert(0, str(ZOO))


import torch  # noqa: E402
from candidates import Weights, scaled  # noqa: E402
from common import ZooModels, mean_score  # noqa: E402
from mergekit.merge_methods import merge_state_dicts  # noqa: E402

from neuron_methods.demo.stages import write_text  # noqa: E402
from neuron_methods.kernels.trim import trim_  # noqa: E402

#: Scales tried for every ψ.
GRID = (0.15, 0.25, 0.4, 0.6, 0.8, 1.0, 1.4, 2.0, 2.8, 4.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "mean, density 0.15": {"density": 0.15},
    "mean, density 0.5": {"density": 0.5},
    "sum, density 0.15": {"density": 0.15, "consensus": "sum"},
    "sum, density 0.5": {"density": 0.5, "consensus": "sum"},
}


def flat(weights: Weights, base: Weights) -> torch.Tensor:
    """θ − θ₀ as one vector."""
    return torch.cat([(weights[name] - base[name]).flatten() for name in base])


def trimmed(task_vector: torch.Tensor, density: float) -> torch.Tensor:
    """The task vector without its smallest entries."""
    rank = max(1, math.floor(len(task_vector) * (1 - density)))
    threshold = task_vector.abs().kthvalue(rank).values.item() if density < 1 else 0.0
    return trim_(task_vector.clone(), threshold)


def rules(psi: torch.Tensor, task_vectors: list[torch.Tensor], density: float) -> dict[str, float]:
    """λ by each rule, from ψ, the task vectors and their trimmed forms."""
    kept = [trimmed(tau, density) for tau in task_vectors]
    count = len(kept)
    sigma = max(1 - (k.abs().sum() / t.abs().sum()).item() for k, t in zip(kept, task_vectors, strict=True))
    norm = psi.norm().item()
    whole = [t.norm().item() for t in task_vectors]
    parts = [k.norm().item() for k in kept]
    projection = sum((psi @ t).item() / (t @ t).item() for t in task_vectors) / count
    rms = math.sqrt(sum(x * x for x in whole) / count)
    return {
        "published: 1 / (1 - sigma)": 1 / (1 - sigma),
        "norm of ψ = mean norm of trimmed": sum(parts) / count / norm,
        "norm of ψ = mean norm of τ": sum(whole) / count / norm,
        "norm of ψ = rms norm / sqrt(2)": rms / math.sqrt(2) / norm,
        "norm of ψ = norm of mean of τ": (sum(task_vectors) / count).norm().item() / norm,
        "mean projection on τ = 1 / T": 1 / count / projection,
        "mean projection on τ = 2 / T": 2 / count / projection,
        "mean projection on τ = 1 / sqrt(T)": 1 / math.sqrt(count) / projection,
    }


def matched(merged: Weights, models: ZooModels, density: float, neurons: bool) -> Weights:
    """Updates scaled to the mean norm of the experts' (trimmed) updates, tensor by tensor or neuron by neuron."""
    kept = []
    for expert in models.experts.values():
        pieces = trimmed(flat(expert, models.base), density).split([w.numel() for w in models.base.values()])
        kept.append(dict(zip(models.base, pieces, strict=True)))
    found = {}
    for name, weights in models.base.items():
        rows = len(weights) if neurons and weights.ndim > 1 else 1
        psi = (merged[name] - weights).view(rows, -1)
        wanted = sum(one[name].view(rows, -1).norm(dim=1, keepdim=True) for one in kept) / len(kept)
        found[name] = weights + (psi * (wanted / psi.norm(dim=1, keepdim=True)).nan_to_num(0, 0, 0)).view_as(weights)
    return found


def explore(models: ZooModels, say: Callable[[str], None]) -> dict[str, Any]:
    """Scores on validation data of every variant at every scale and rule."""
    task_vectors = [flat(expert, models.base) for expert in models.experts.values()]
    found = {}
    for name, settings in VARIANTS.items():
        merged = merge_state_dicts(
            {"the base": models.base, **models.experts},
            "neuro_merging",
            base="the base",
            parameters={"lambda_orthogonal": 1.0, **settings},
        )

        def score(scale: float, merged: Weights = merged) -> float:
            return mean_score(models.outcomes(scaled(models.base, merged, scale), "validation"))

        scales = rules(flat(merged, models.base), task_vectors, settings["density"])
        curve = {scale: score(scale) for scale in GRID}
        ruled = {rule: (scale, interpolate(curve, scale)) for rule, scale in scales.items()}
        for whole, of in ((True, "τ"), (False, "trimmed")):
            for unit in ("tensor", "neuron"):
                weights = matched(merged, models, 1.0 if whole else settings["density"], unit == "neuron")
                score_of_it = mean_score(models.outcomes(weights, "validation"))
                ruled[f"norm of ψ = mean norm of {of}, per {unit}"] = (math.nan, score_of_it)
        best = max(curve, key=curve.__getitem__)
        found[name] = {"best": (best, curve[best]), "rules": ruled, "curve": curve}
        say(f"  {name}: best λ {best} scores {100 * curve[best]:.1f}")
    return found


def interpolate(curve: Mapping[float, float], scale: float) -> float:
    """The curve's value at a scale, in a line between its points, constant outside of them."""
    points = sorted(curve.items())
    if scale <= points[0][0]:
        return points[0][1]
    for (low, below), (high, above) in itertools.pairwise(points):
        if scale <= high:
            return below + (above - below) * (scale - low) / (high - low)
    return points[-1][1]


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Rules by zoos and variants: λ, and what it loses to the best λ of the grid."""
    columns = [(zoo, variant) for zoo, variants in found.items() for variant in variants]
    heads = [f"{zoo}: {variant}" for zoo, variant in columns]
    lines = [f"| λ₂ by | {' | '.join(heads)} | mean loss |", "|---|" + "---|" * (len(columns) + 1)]
    bests = [found[zoo][variant]["best"] for zoo, variant in columns]
    lines.append(f"| best of the grid | {' | '.join(f'{scale:.2f}: {100 * score:.1f}' for scale, score in bests)} | |")
    for rule in found[columns[0][0]][columns[0][1]]["rules"]:
        cells, losses = [], []
        for (zoo, variant), (_, top) in zip(columns, bests, strict=True):
            scale, score = found[zoo][variant]["rules"][rule]
            losses.append(top - score)
            shown = "" if math.isnan(scale) else f"{scale:.2f}: "
            cells.append(f"{shown}{100 * (score - top):+.1f}")
        lines.append(f"| {rule} | {' | '.join(cells)} | {100 * sum(losses) / len(losses):.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of scales.md")
    parser.add_argument("--zoo", type=Path, action="append", required=True, help="a finished zoo")
    arguments = parser.parse_args()
    import neuron_methods

    neuron_methods.register()
    found = {}
    for directory in arguments.zoo:
        print(directory.name)
        found[directory.name] = explore(ZooModels(directory, ["validation"]), print)
        write_text(arguments.out / "scales.md", table(found))
    print(table(found))


if __name__ == "__main__":
    main()
