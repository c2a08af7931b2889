"""Measure how linearly the MLPs of a zoo follow its merge: neurons grouped by function, at random, and not at all.

    python examples/figures/linearity.py OUT --zoo DIR [--zoo DIR ...] [--draws N] [--tokens N]

OUT is the directory of a run of the leaderboard, whose profiles of the bases are used, or made there. `neuron_merge` at
its defaults is measured as `mergekit-neuron linearity` does, on training data of the zoo's tasks: an MLP's error is
that of interpolating its outputs, not its weights, between base and merge. As errors grow with the size of an update,
each is divided by the error of plain task arithmetic, scaled to the same size in the same layer: below 1, groups help.

Writes OUT/linearity.md and OUT/linearity.svg.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES / "leaderboard"), str(EXAMPLES / "zoo")]

from common import MARK, run_script  # noqa: E402
from grouping import READS, make_groups  # noqa: E402
from report import FAMILIES  # noqa: E402
from run import ZooRun, check_zoos  # noqa: E402

from neuron_methods.evaluation import load_tasks  # noqa: E402
from neuron_methods.plugin.updates import plan_updates  # noqa: E402
from neuron_methods.profiling.linearity import SAME_SIZE, measure_linearity  # noqa: E402
from neuron_methods.support.files import write_text  # noqa: E402

#: The default of `mergekit-neuron groups`.
THRESHOLD = 0.6


@dataclass(frozen=True)
class Measured:
    """Errors of one zoo's merges, by layer, each as a share of that of task arithmetic of its size.

    Attributes:
        family: the zoo's.
        layers: their keys.
        grouped: neurons grouped by the task that drives them furthest.
        drawn: random groups of the same sizes, an array per draw.
        plain: error of task arithmetic of the size of the grouped merge, in percent.
        grouped_neurons: share of the neurons that are of a task's group, in percent.
    """

    family: str
    layers: list[str]
    grouped: np.ndarray
    drawn: list[np.ndarray]
    plain: np.ndarray
    grouped_neurons: float


def measure(zoo: Path, profile: str, draws: int, tokens: int) -> Measured:
    """Measure a zoo's merges by its groups and by random ones, on what the base reads."""
    tasks = load_tasks(zoo / "tasks.yml")
    columns = {task.name: ",".join(task.columns[role] for role in READS[task.kind]) for task in tasks}
    data = [f"{name}={zoo / 'data' / name / 'train'}.parquet:{own}" for name, own in columns.items()]
    found = {}
    for by in ("activations", *(f"random {draw}" for draw in range(draws))):
        with tempfile.TemporaryDirectory() as directory:
            groups = make_groups(profile, THRESHOLD, by)
            groups.write(place := Path(directory) / "groups.json")
            models = [{"model": str(zoo / "experts" / n), "parameters": {"group": n}} for n in columns]
            recipe = {"merge_method": "neuron_merge", "base_model": str(zoo / "base"), "models": models}
            recipe |= {"parameters": {"groups": str(place)}, "dtype": "float32"}
            planned = plan_updates(yaml.safe_dump(recipe), str(zoo))
            found[by] = measure_linearity(planned, data, tokens=tokens).errors
        if by == "activations":
            totals = groups.totals()
            share = 100 * (1 - totals[groups.groups[0]] / sum(totals.values()))
    layers = list(found["activations"])

    def ratios(errors: Mapping[str, Mapping[str, float]]) -> np.ndarray:
        return np.array([errors[layer]["merge by neuron_merge"] / errors[layer][SAME_SIZE] for layer in layers])

    plain = np.array([100 * found["activations"][layer][SAME_SIZE] for layer in layers])
    grouped, *drawn = (ratios(errors) for errors in found.values())
    family = json.loads((zoo / MARK).read_text(encoding="utf-8"))["family"]
    return Measured(family, layers, grouped, drawn, plain, share)


def table(results: Sequence[Measured]) -> str:
    """Lay out every layer, and what comes out over all layers."""
    lines = [
        "Error of interpolating an MLP's outputs, of `neuron_merge` at its defaults, as a share of the error of task "
        "arithmetic of the same size in the same layer; of random groups the mean of all draws, least and largest.",
    ]
    for one in results:
        drawn = np.array(one.drawn)
        rows = [
            f"| {layer} | {plain:.2f} | {own:.3f} | {others.mean():.3f} ({others.min():.3f}–{others.max():.3f}) |"
            for layer, plain, own, others in zip(one.layers, one.plain, one.grouped, drawn.T, strict=True)
        ]
        means = drawn.mean(axis=1)
        lines += [
            "",
            f"## {FAMILIES[one.family]}",
            "",
            f"{one.grouped_neurons:.0f} % of the neurons are of a task's group.",
            "",
            f"| layer | task arithmetic, error in % | grouped by function | random groups, {len(drawn)} draws |",
            "|---|---|---|---|",
            *rows,
            f"| mean | {one.plain.mean():.2f} | {one.grouped.mean():.3f} | {means.mean():.3f} "
            f"({means.min():.3f}–{means.max():.3f}) |",
            "",
            f"Grouped by function, {(one.grouped < 1).sum()} of {len(one.layers)} layers are more linear than task "
            f"arithmetic of the same size, {(one.grouped < drawn.mean(axis=0)).sum()} more than random groups are on "
            f"average, and {(one.grouped < drawn.min(axis=0)).sum()} more than every draw of them.",
        ]
    return "\n".join(lines) + "\n"


def draw(results: Sequence[Measured], path: Path) -> None:
    """Draw a panel per zoo: a point per layer."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "linearity"  # the same file for the same figures
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(results), figsize=(4.6 * len(results), 3.2), squeeze=False)
    for panel, one in zip(panels.flat, results, strict=True):
        places = np.arange(len(one.layers))
        for index, own in enumerate(one.drawn):
            panel.plot(
                places, own, color="#9a9a9a", linewidth=0.8, marker=".", label=None if index else "random groups"
            )
        panel.plot(places, one.grouped, color="#c4462f", marker="o", markersize=4, label="grouped by function")
        panel.axhline(1.0, color="#0f83c4", linestyle="--", linewidth=1, label="not grouped")
        panel.set_title(FAMILIES[one.family], fontsize=9)
        panel.set_xlabel("MLP layer", fontsize=8)
        panel.set_ylabel("error, not grouped = 1", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of the leaderboard's results")
    parser.add_argument("--zoo", type=Path, action="append", required=True, help="a finished zoo (repeatable)")
    parser.add_argument("--draws", type=int, default=5, help="of random groups  [5]")
    parser.add_argument("--tokens", type=int, default=256, help="inputs per layer  [256]")
    arguments = parser.parse_args()
    import neuron_methods

    neuron_methods.register()
    check_zoos(arguments.zoo)
    results = []
    for zoo in arguments.zoo:
        profile = ZooRun(zoo, arguments.out, "full", print).profile()
        results.append(measure(zoo, profile, arguments.draws, arguments.tokens))
    write_text(arguments.out / "linearity.md", table(results))
    draw(results, arguments.out / "linearity.svg")
    print((arguments.out / "linearity.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_script(main)
