"""The methods of the leaderboard, each with the same number of parameter settings to be tuned over.

A candidate is merged once per setting of its parameters that shape the update, at scale 1, and tried at several scales:
θ₀ + s (merged − θ₀). For every method here that is what its own `lambda`, `weight` or scaling factor does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import peers
from grouping import ABOUT, merge_by_groups
from responding import merge_by_response
from torch import Tensor

Weights = dict[str, Tensor]
#: From base, experts and parameters to the merged weights at scale 1.
Merger = Callable[[Weights, Mapping[str, Weights], Mapping[str, Any]], Weights]

#: Our methods, which the registry holds too.
OURS = ("neuro_merging", "min_merging", "neuron_merge", "neuron_response")
#: Our methods that need a profile of the zoo's base; it is handed to them among their settings, as ``profile``.
PROFILED = ("neuron_merge",)
#: Rows that are scored on further seeds: ours at defaults, and what stood highest of others on seed 0.
ON_SEEDS = (
    "neuron_response",
    "neuron_response, 40 samples",
    "sce",
    "multislerp",
    "ram",
    "TSV-M",
    "RegMean",
)
#: Points on validation data that every tuned method has.
BUDGET = 8


@dataclass(frozen=True)
class Candidate:
    """A method as the leaderboard runs it.

    Attributes:
        name: of the row.
        origin: ``mergekit``, ``ours`` or ``fusion-bench``.
        method: mergekit's name of it, or a key of `MERGERS`.
        settings: parameters that shape the update.
        scales: factors of the update tried for each of them; (1.0,) with one setting: nothing is tuned.
        note: what is special about the row.
        averages_tokens: it merges token embeddings by the mean of the updates by itself, times its scale.
    """

    name: str
    origin: str
    method: str
    settings: tuple[dict[str, Any], ...] = ({},)
    scales: tuple[float, ...] = (1.0,)
    note: str = field(default="", compare=False)
    averages_tokens: bool = False

    @property
    def points(self) -> int:
        """How many settings are scored on validation data."""
        return len(self.settings) * len(self.scales)

    @property
    def samples(self) -> int:
        """How many samples of every task's training data it sees, beside being tuned."""
        return ABOUT["samples"] if self.method in PROFILED else self.settings[0].get("samples", 0)


_NORM = "density 0.5, λ₂ by the norm of every neuron's update, nothing tuned"
_GROUPS = (
    "its groups come from 1,000 samples of every task's training data: images and prompts without labels, on T5 with "
    "the answers, which its decoder reads"
)
_RECIPE = "for want of validation data, as TIES-Merging (arXiv:2306.01708) compares: λ 0.4; the top 20 %, λ 1"
_ACTMAT = "the closed form of ACTMat (arXiv:2604.01329): loudness own, ridge 0, toward zero, all rows"
_HALVES = "half of the inputs are measured on so many samples of each expert's task, half are its update's"
#: Scales for an update that averages experts.
_MEANS = (0.5, 0.75, 1.0, 1.4, 1.9, 2.5, 3.2, 4.0)


def ablations(experts: int) -> list[Candidate]:
    """List rows of `neuro_merging` with one step changed at a time, λ₂ tuned."""
    sums = tuple(round(x / experts, 4) for x in (0.5, 1.0, 1.5, 2.0, 2.5, 3.5, 5.0, 7.0))

    def row(name: str, scales: tuple[float, ...] = _MEANS, **settings: Any) -> Candidate:
        fixed = {"density": 0.15, "lambda_orthogonal": 1.0, **settings}
        return Candidate(name, "ours", "neuro_merging", (fixed,), scales)

    untouched = {"weight": 1.0, "density": 0.15, "gamma": 0.0}
    return [
        row("the steps as they are"),
        row("trimmed per tensor", trim="tensor"),
        row("density 0.5", density=0.5),
        row("nothing trimmed", density=1.0),
        row("trimmed to the half of the entries in which experts differ most", trim="differing", density=0.5),
        row("trimmed to a quarter of the entries in which experts differ most", trim="differing", density=0.25),
        row("parallel part kept", lambda_parallel=1.0),
        row("half of the singular vectors' energy", rank_energy=0.5),
        row("density 0.5, roots of the update's singular values", density=0.5, spectral_exponent=0.5),
        row("density 0.5, the update's singular values made alike", density=0.5, spectral_exponent=0.0),
        row("summed, not averaged", sums, consensus="sum"),
        row("summed, nothing trimmed", sums, consensus="sum", density=1.0),
        Candidate("no election: trimmed per tensor and added up", "ours", "breadcrumbs", (untouched,), sums),
    ]


def candidates(experts: int) -> list[Candidate]:
    """List all rows for a zoo with so many experts; every tuned one has `BUDGET` points."""
    few = tuple(round(x / experts, 4) for x in (1.0, 1.75, 2.5, 4.0))
    many = tuple(round(x / experts, 4) for x in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0))
    means = (0.8, 1.4, 2.2, 3.2)
    near_one = (0.5, 0.8, 1.1, 1.5)
    fine_means = _MEANS

    def densities(*values: float, **fixed: Any) -> tuple[dict[str, Any], ...]:
        return tuple({"density": value, **fixed} for value in values)

    weighted = {"weight": 1.0}
    mergekit = [
        Candidate("task_arithmetic", "mergekit", "task_arithmetic", (weighted,), many),
        Candidate("ties", "mergekit", "ties", densities(0.2, 0.6, **weighted), near_one),
        Candidate("dare_linear", "mergekit", "dare_linear", densities(0.5, 0.8, **weighted), few),
        Candidate("dare_ties", "mergekit", "dare_ties", densities(0.5, 0.8, **weighted), few),
        Candidate("breadcrumbs", "mergekit", "breadcrumbs", densities(0.4, 0.8, gamma=0.01, **weighted), few),
        Candidate("breadcrumbs_ties", "mergekit", "breadcrumbs_ties", densities(0.4, 0.8, gamma=0.01, **weighted), few),
        Candidate("della", "mergekit", "della", densities(0.4, 0.7, epsilon=0.15, **weighted), near_one),
        Candidate("della_linear", "mergekit", "della_linear", densities(0.4, 0.7, epsilon=0.15, **weighted), few),
        Candidate("sce", "mergekit", "sce", ({"select_topk": 0.5}, {"select_topk": 1.0}), means),
        Candidate("model_stock", "mergekit", "model_stock", ({"filter_wise": False}, {"filter_wise": True}), means),
        Candidate("multislerp", "mergekit", "multislerp", (weighted,), fine_means),
        Candidate("ram", "mergekit", "ram", ({},), fine_means),
        Candidate("ramplus_tl", "mergekit", "ramplus_tl", ({"r": 0.1, "alpha": 0.2}, {"r": 0.3, "alpha": 0.2}), means),
    ]
    one = {"lambda_orthogonal": 1.0}
    both = {"lambda_parallel": 1.0, **one}
    # Beside a mean of all updates (at scale 1 / experts), half an own one or a whole one for the neurons of a task.
    shares = {"threshold": 0.3, "general": 1.0, "out_group": 1.0}
    groups = tuple({"in_group": value, **shares} for value in (experts / 2, float(experts)))
    ours = [
        Candidate("neuro_merging", "ours", "neuro_merging", note="at its defaults: density 0.15, automatic λ₂"),
        Candidate("neuro_merging, density 0.5", "ours", "neuro_merging", densities(0.5), note="automatic λ₂"),
        Candidate("neuro_merging, norm", "ours", "neuro_merging", densities(0.5, lambda_orthogonal="norm"), note=_NORM),
        Candidate(
            "neuro_merging, norm, tuned",
            "ours",
            "neuro_merging",
            densities(0.3, 0.6, lambda_orthogonal="norm"),
            (0.8, 1.0, 1.3, 1.7),
        ),
        Candidate("neuro_merging, λ₂ tuned", "ours", "neuro_merging", densities(0.15, 0.5, **one), means),
        Candidate(
            "neuro_merging, tempered",
            "ours",
            "neuro_merging",
            densities(0.5, 1.0, spectral_exponent=0.5, **one),
            (1.0, 1.5, 2.0, 2.8),
            note="the singular values of every tensor's update replaced by their roots: spectral_exponent 0.5",
        ),
        Candidate(
            "neuro_merging, differing",
            "ours",
            "neuro_merging",
            densities(0.25, 0.5, trim="differing", **one),
            (1.4, 2.1, 3.0, 4.3),
            note="trimmed to the entries in which the experts differ most: trim: differing",
        ),
        Candidate("neuro_merging, sum", "ours", "neuro_merging", densities(0.3, 0.7, consensus="sum", **one), few),
        Candidate("min_merging", "ours", "min_merging", densities(0.3, 0.7, conflict="sum"), few),
        Candidate(
            "neuro_merging, sum, both parts", "ours", "neuro_merging", densities(0.5, 1.0, consensus="sum", **both), few
        ),
        Candidate("neuron_merge", "ours", "neuron_merge", groups, few, note=_GROUPS),
    ]
    return [*responses(), *mergekit, *ours, *fusion_bench(), *untuned()]


def seeds(experts: int) -> list[Candidate]:
    """List rows for several seeds of a zoo with so many experts."""
    return [row for row in candidates(experts) if row.name in ON_SEEDS]


def untuned() -> list[Candidate]:
    """List rows of methods at the values that they were published or come with; `neuro_merging` has its row above."""
    at_once = {"in_group": 1.0, "out_group": 0.0, "general": 0.5, "threshold": 0.6}
    return [
        Candidate("weight average", "mergekit", "linear", ({"weight": 1.0},)),
        Candidate("task_arithmetic, untuned", "mergekit", "task_arithmetic", ({"weight": 1.0},), (0.4,), _RECIPE),
        Candidate("ties, untuned", "mergekit", "ties", ({"weight": 1.0, "density": 0.2},), note=_RECIPE),
        Candidate(
            "neuro_merging, top 10 %",
            "ours",
            "neuro_merging",
            ({"density": 0.1, "lambda_orthogonal": 2.7},),
            note="as a published script has it (Fang et al., eval.sh): the top 10 %, λ₂ 2.7, and 2.9 in a second run",
        ),
        Candidate("min_merging, untuned", "ours", "min_merging", note="at its defaults, which are ours"),
        Candidate("neuron_merge, untuned", "ours", "neuron_merge", (at_once,), note=f"at its defaults; {_GROUPS}"),
        Candidate("TSV-M, untuned", "fusion-bench", "tsv_m", note="at the package's scale of 1"),
        Candidate(
            "RegMean, untuned",
            "fusion-bench",
            "reg_mean",
            ({"reduce_non_diagonal_ratio": 0.1, "samples": 40},),
            note="at the package's ratio of 0.1",
            averages_tokens=True,
        ),
    ]


def responses() -> list[Candidate]:
    """List rows of `neuron_response`."""

    def row(name: str, note: str = "", scales: tuple[float, ...] = (1.0,), **settings: Any) -> Candidate:
        each = settings.pop("each", ({},))
        merges = tuple({**settings, **one} for one in each)
        averages = settings.get("embeddings") != "rows"
        called = f"neuron_response{', ' if name else ''}{name}"
        return Candidate(called, "ours", "neuron_response", merges, scales, note, averages)

    scales = (0.7, 1.0, 1.3, 1.8)
    return [
        row("", "at its defaults"),
        row("tuned", scales=scales, each=({"ridge": "auto"}, {"ridge": 0.03})),
        row("ridge 0.01", ridge=0.01),
        row("ridge 1", ridge=1.0),
        row("toward zero", toward="zero"),
        row("toward sum", toward="sum"),
        row("subspace orthogonal", "without what is parallel to a neuron's base weights", subspace="orthogonal"),
        row("all rows", "of an update stand for its inputs, where others take 3/16 of its rank", rows=0),
        row("loudness own", loudness="own"),
        row("ACTMat", _ACTMAT, loudness="own", ridge=0.0, rows=0, toward="zero"),
        row("embeddings by rows", embeddings="rows"),
        row("40 samples", _HALVES, samples=40),
        row("40 samples, tuned", scales=scales, each=({"ridge": "auto"}, {"ridge": 0.1}), samples=40),
        row("8 samples", samples=8),
        row("40 samples, data alone", samples=40, inputs="profile"),
        row("40 samples, toward sum", samples=40, toward="sum"),
    ]


def fusion_bench() -> list[Candidate]:
    """List rows of FusionBench's methods."""
    sums = (0.3, 0.45, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0)
    means = (0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 1.9, 2.5)
    near_one = (0.7, 1.0, 1.4, 1.9)

    def row(name: str, method: str, scales: tuple[float, ...], *settings: dict[str, Any], note: str = "") -> Candidate:
        return Candidate(name, "fusion-bench", method, settings or ({},), scales, note, method == "reg_mean")

    ratios = ({"reduce_non_diagonal_ratio": value, "samples": 40} for value in (0.6, 0.95))
    return [
        row("TSV-M", "tsv_m", sums),
        row("Iso-C", "iso_c", means),
        row("Iso-CTS", "iso_cts", means, {"common_space_fraction": 0.8}),
        row("WUDI", "wudi", (0.5, 0.65, 0.8, 1.0, 1.2, 1.45, 1.75, 2.1), {"iter_num": 300}),
        row(
            "SVC of task arithmetic",
            "calibrated",
            near_one,
            *({"of": "task_arithmetic", "scaling_factor": 0.3, "alpha": alpha} for alpha in (0.1, 0.3)),
            note="singular values calibrated; scaling factor and an α of 0.1 are the package's",
        ),
        row(
            "SVC of TSV-M",
            "calibrated",
            near_one,
            *({"of": "tsv_m", "scaling_factor": 1.0, "alpha": alpha} for alpha in (0.5, 1.0)),
            note="α of 1 is the package's",
        ),
        row(
            "RegMean",
            "reg_mean",
            near_one,
            *ratios,
            note="its moments are those of the files that neuron_response reads, not of hooks of the package's own",
        ),
    ]


def untried(rows: Sequence[Candidate]) -> list[str]:
    """Find methods of mergekit that take a base and more than two experts and have no row."""
    from mergekit.merge_methods import registered_methods
    from mergekit.merge_methods.base import BasePolicy

    have = {row.method for row in rows}
    found = []
    for method in registered_methods():
        contract = method.spec.contract
        unbounded = contract.max_inputs is None and contract.max_non_base is None
        if contract.base is not BasePolicy.IGNORED and unbounded and method.spec.name not in {*have, *OURS}:
            found.append(method.spec.name)
    return found


def merge(candidate: Candidate, base: Weights, experts: Mapping[str, Weights], settings: Mapping[str, Any]) -> Weights:
    """Merge at scale 1, in float32. Tensors that no expert changed are left out of the merge.

    Args:
        candidate: the row.
        base: θ₀.
        experts: by task.
        settings: one of the candidate's, and what its method is handed.
    """
    changed = [name for name in base if any(not expert[name].equal(base[name]) for expert in experts.values())]
    merged = MERGERS.get(candidate.method, _by_mergekit(candidate.method))(
        {name: base[name] for name in changed},
        {key: {name: expert[name] for name in changed} for key, expert in experts.items()},
        settings,
    )
    return {name: merged.get(name, base[name]) for name in base}


def scaled(base: Weights, merged: Weights, scale: float) -> Weights:
    """Compute θ₀ + scale (merged − θ₀)."""
    return {name: weights + scale * (merged[name] - weights) for name, weights in base.items()}


def tokens_by_mean(weights: Weights, experts: Mapping[str, Weights], tokens: Sequence[str]) -> Weights:
    """Give tables of token embeddings the mean of the experts' updates, at scale 1 whatever the others' scale is."""
    mean = {name: sum(expert[name] for expert in experts.values()) / len(experts) for name in tokens}
    return {**weights, **mean}


def _by_mergekit(method: str) -> Merger:
    def run(base: Weights, experts: Mapping[str, Weights], settings: Mapping[str, Any]) -> Weights:
        import torch
        from mergekit.merge_methods import merge_state_dicts

        torch.manual_seed(0)  # DARE and DELLA draw what they drop
        # Under a name of its own: a task may be called "base".
        models = {"the base": base, **experts}
        if method.startswith("della"):
            # mergekit 0.1.5 ranks entries along axis 1, and divides 0 by 0 where that has one, as in a class token.
            models = {key: {name: _vector_at_least(t) for name, t in one.items()} for key, one in models.items()}
        merged = merge_state_dicts(models, method, base="the base", parameters=dict(settings))
        return {name: tensor.view_as(base[name]) for name, tensor in merged.items()}

    return run


def _vector_at_least(tensor: Tensor) -> Tensor:
    return tensor.flatten() if tensor.ndim > 1 and tensor.shape[1] == 1 else tensor


def _average(base: Weights, experts: Mapping[str, Weights], settings: Mapping[str, Any]) -> Weights:
    """Run mergekit's `linear`, in which the base has no share."""
    from mergekit.merge_methods import merge_state_dicts

    return merge_state_dicts(dict(experts), "linear", parameters=dict(settings))


#: Methods that take more than mergekit's call, or less.
MERGERS: dict[str, Merger] = {
    "linear": _average,
    "tsv_m": peers.tsv_m,
    "iso_c": peers.iso_c,
    "iso_cts": peers.iso_cts,
    "wudi": peers.wudi,
    "calibrated": peers.calibrated,
    "reg_mean": peers.reg_mean,
    "neuron_merge": merge_by_groups,
    "neuron_response": merge_by_response,
}
