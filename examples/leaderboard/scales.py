"""Scales that need no data: what each of them says for a merged update, and what the update's best scale is.

    python examples/leaderboard/scales.py OUT --zoo DIR [--zoo DIR ...] [--adapters]

For every zoo, ψ of `neuro_merging` is formed once per variant and tried at a grid of λ on validation data; every rule's
λ is scored too. A rule that holds up loses little to the best λ on every zoo. With ``--adapters`` the experts are the
zoo's LoRA adapters instead of its full ones. Writes OUT/scales.md, or OUT/scales-adapters.md.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ZOO = Path(__file__).resolve().parents[1] / "zoo"
sys.path.insert(0, str(ZOO))


import torch  # noqa: E402
from candidates import Weights, scaled  # noqa: E402
from common import ZooModels, mean_score, run_script  # noqa: E402
from mergekit.merge_methods import merge_state_dicts  # noqa: E402

from neuron_methods.kernels.rows import neuron_rows  # noqa: E402
from neuron_methods.kernels.trim import trim_  # noqa: E402
from neuron_methods.support.files import write_text  # noqa: E402

#: Scales tried for every ψ.
GRID = (0.06, 0.1, 0.15, 0.25, 0.4, 0.6, 0.8, 1.0, 1.4, 2.0, 2.8, 4.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "mean, density 0.15": {"density": 0.15},
    "mean, density 0.5": {"density": 0.5},
    "sum, density 0.15": {"density": 0.15, "consensus": "sum"},
    "sum, density 0.5": {"density": 0.5, "consensus": "sum"},
}


#: The rule that `neuro_merging` has by the name of ``auto``, and the one it has by the name of ``norm``.
AUTO = "auto: 1 / (1 - sigma)"
NORM = "norm of ψ = mean norm of τ, per neuron"


def changed_by(experts: Mapping[str, Weights], base: Weights) -> list[str]:
    """Name the tensors that an expert changed; the others take no part in a merge."""
    return [name for name in base if any(not expert[name].equal(base[name]) for expert in experts.values())]


def flat(weights: Weights, base: Weights) -> torch.Tensor:
    """Lay θ − θ₀ out as one vector."""
    return torch.cat([(weights[name] - base[name]).flatten() for name in base])


def trimmed(task_vector: torch.Tensor, density: float) -> torch.Tensor:
    """Trim the smallest entries of a task vector."""
    rank = max(1, math.floor(len(task_vector) * (1 - density)))
    threshold = task_vector.abs().kthvalue(rank).values.item() if density < 1 else 0.0
    return trim_(task_vector.clone(), threshold)


def rules(psi: torch.Tensor, task_vectors: list[torch.Tensor], density: float) -> dict[str, float]:
    """Compute λ by each rule, from ψ, the task vectors and their trimmed forms."""
    kept = [trimmed(tau, density) for tau in task_vectors]
    count = len(kept)
    sigma = max(1 - (k.abs().sum() / t.abs().sum()).item() for k, t in zip(kept, task_vectors, strict=True))
    norm = psi.norm().item()
    whole = [t.norm().item() for t in task_vectors]
    parts = [k.norm().item() for k in kept]
    projection = sum((psi @ t).item() / (t @ t).item() for t in task_vectors) / count
    rms = math.sqrt(sum(x * x for x in whole) / count)
    return {
        AUTO: 1 / (1 - sigma),
        "norm of ψ = mean norm of trimmed": sum(parts) / count / norm,
        "norm of ψ = mean norm of τ": sum(whole) / count / norm,
        "norm of ψ = rms norm / sqrt(2)": rms / math.sqrt(2) / norm,
        "norm of ψ = norm of mean of τ": (sum(task_vectors) / count).norm().item() / norm,
        "mean projection on τ = 1 / T": 1 / count / projection,
        "mean projection on τ = 2 / T": 2 / count / projection,
        "mean projection on τ = 1 / sqrt(T)": 1 / math.sqrt(count) / projection,
    }


def matched(merged: Weights, base: Weights, experts: Mapping[str, Weights], density: float, neurons: bool) -> Weights:
    """Scale updates to the mean norm of the experts' (trimmed) updates, tensor by tensor or neuron by neuron."""
    kept = []
    for expert in experts.values():
        pieces = trimmed(flat(expert, base), density).split([w.numel() for w in base.values()])
        kept.append({name: piece.view_as(base[name]) for name, piece in zip(base, pieces, strict=True)})

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return neuron_rows(tensor) if neurons and tensor.ndim > 1 else tensor.reshape(1, -1)

    found = {}
    for name, weights in base.items():
        psi = rows(merged[name] - weights)
        wanted = sum(rows(one[name]).norm(dim=1, keepdim=True) for one in kept) / len(kept)
        found[name] = weights + (psi * (wanted / psi.norm(dim=1, keepdim=True)).nan_to_num(0, 0, 0)).view_as(weights)
    return found


def explore(models: ZooModels, say: Callable[[str], None]) -> dict[str, Any]:
    """Score every variant at every scale and rule on validation data, and the base; measure the updates' length.

    Returns:
        ``variants`` by name, ``base``, and ``length``: the mean of ‖τ‖ / ‖θ₀‖, of the tensors that are merged.
    """
    names = changed_by(models.experts, models.base)
    base = {name: models.base[name] for name in names}
    changed = {task: {name: expert[name] for name in names} for task, expert in models.experts.items()}
    task_vectors = [flat(expert, base) for expert in changed.values()]

    def score(weights: Weights) -> float:
        return mean_score(models.outcomes({**models.base, **weights}, "validation"))

    found = {}
    for name, settings in VARIANTS.items():
        merged = merge_state_dicts(
            {"the base": base, **changed},
            "neuro_merging",
            base="the base",
            parameters={"lambda_orthogonal": 1.0, **settings},
        )
        curve = {scale: score(scaled(base, merged, scale)) for scale in GRID}
        scales = rules(flat(merged, base), task_vectors, settings["density"])
        ruled = {rule: (scale, interpolate(curve, scale)) for rule, scale in scales.items()}
        ruled[AUTO] = (scales[AUTO], score(scaled(base, merged, scales[AUTO])))
        for whole, of in ((True, "τ"), (False, "trimmed")):
            for unit in ("tensor", "neuron"):
                weights = matched(merged, base, changed, 1.0 if whole else settings["density"], unit == "neuron")
                ruled[f"norm of ψ = mean norm of {of}, per {unit}"] = (math.nan, score(weights))
        best = max(curve, key=curve.__getitem__)
        found[name] = {"best": (best, curve[best]), "rules": ruled, "curve": curve}
        say(
            f"  {name}: best λ {best} scores {100 * curve[best]:.1f}, the automatic {scales[AUTO]:.2f} "
            f"{100 * ruled[AUTO][1]:.1f}, norm {100 * ruled[NORM][1]:.1f}"
        )
    size = torch.cat([weights.flatten() for weights in base.values()]).norm().item()
    length = sum(tau.norm().item() for tau in task_vectors) / len(task_vectors) / size
    return {"variants": found, "base": score(base), "length": length}


def interpolate(curve: Mapping[float, float], scale: float) -> float:
    """Compute the curve's value at a scale, in a line between its points, constant outside of them."""
    points = sorted(curve.items())
    if scale <= points[0][0]:
        return points[0][1]
    for (low, below), (high, above) in itertools.pairwise(points):
        if scale <= high:
            return below + (above - below) * (scale - low) / (high - low)
    return points[-1][1]


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Write rules by zoos and variants: λ, and what it loses to the best λ of the grid."""
    columns = [(zoo, variant) for zoo, about in found.items() for variant in about["variants"]]
    heads = [f"{zoo}: {variant}" for zoo, variant in columns]
    lines = [f"| λ₂ by | {' | '.join(heads)} | mean loss |", "|---|" + "---|" * (len(columns) + 1)]
    bests = [found[zoo]["variants"][variant]["best"] for zoo, variant in columns]
    lines.append(f"| best of the grid | {' | '.join(f'{scale:.2f}: {100 * score:.1f}' for scale, score in bests)} | |")
    losses = [found[zoo]["base"] - top for (zoo, _), (_, top) in zip(columns, bests, strict=True)]
    lines.append(f"| 0: the base | {' | '.join(f'{100 * loss:+.1f}' for loss in losses)} | {_mean(losses)} |")
    for rule in next(iter(next(iter(found.values()))["variants"].values()))["rules"]:
        cells, losses = [], []
        for (zoo, variant), (_, top) in zip(columns, bests, strict=True):
            scale, score = found[zoo]["variants"][variant]["rules"][rule]
            losses.append(score - top)
            shown = "" if math.isnan(scale) else f"{scale:.2f}: "
            cells.append(f"{shown}{100 * (score - top):+.1f}")
        name = f"{rule} (`norm`)" if rule == NORM else rule
        lines.append(f"| {name} | {' | '.join(cells)} | {_mean(losses)} |")
    lengths = ", ".join(f"{zoo} {100 * about['length']:.1f} %" for zoo, about in found.items())
    return "\n".join([*lines, "", f"Mean norm of τ, as a share of the norm of θ₀: {lengths}."]) + "\n"


def _mean(losses: Sequence[float]) -> str:
    return f"{-100 * sum(losses) / len(losses):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of the table")
    parser.add_argument("--zoo", type=Path, action="append", required=True, help="a finished zoo")
    parser.add_argument("--adapters", action="store_true", help="the experts are the zoo's LoRA adapters")
    arguments = parser.parse_args()
    import neuron_methods

    neuron_methods.register()
    found = {}
    for directory in arguments.zoo:
        name = f"{directory.name}, adapters" if arguments.adapters else directory.name
        print(name)
        models = ZooModels(directory, ["validation"], adapters=arguments.adapters)
        found[name] = explore(models, print)
        write_text(arguments.out / ("scales-adapters.md" if arguments.adapters else "scales.md"), table(found))
    print(table(found))


if __name__ == "__main__":
    run_script(main)
