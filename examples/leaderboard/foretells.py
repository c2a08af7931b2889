"""Does the response that a merge keeps foretell its score? Rank correlation over all finished rows of a board.

    python examples/leaderboard/foretells.py OUT --zoo DIR [--board full|tokens|lora]

OUT is the directory of a run of the leaderboard. Every row is merged again at the point that was chosen for it, and the
report's number is taken of it: per matrix and expert 1 − ‖(Δ − Δ_t) F_tᵀ‖ / ‖Δ_t F_tᵀ‖, from updates alone, the mean of
all. Spearman's ρ of these and of the test scores is printed, beside that of the distance in weights, which is what one
would look at without: −‖Δ − Δ_t‖ / ‖Δ_t‖.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "zoo"))

import numpy as np
from candidates import Weights, candidates, merge, scaled, tokens_by_mean
from common import mean_score, run_script
from report import unpack
from run import ZooRun

from neuron_methods.sharing.report.collect import Collector


def kept(base: Weights, experts: dict[str, Weights], merged: Weights) -> tuple[float, float]:
    """Compute (mean response kept, − mean relative distance in weights) of a merge."""
    collector = Collector("base", list(experts), None)
    distances = []
    for name, weights in base.items():
        if all(expert[name].equal(weights) for expert in experts.values()):
            continue
        inputs = {"base": weights, **{key: expert[name] for key, expert in experts.items()}}
        collector.add(name, inputs, merged[name])
        for expert in experts.values():
            own = (expert[name] - weights).norm()
            if weights.ndim > 1 and own > 0:
                distances.append(float((merged[name] - expert[name]).norm() / own))
    document = collector.document("", {"base": "base", **{name: name for name in experts}})
    return float(np.mean(document["response_kept"])), -float(np.mean(distances))


def spearman(first: list[float], second: list[float]) -> float:
    """Compute the rank correlation; ties have their mean rank."""

    def ranks(values: list[float]) -> np.ndarray:
        given = np.asarray(values)
        return (given[:, None] > given).sum(axis=1) + ((given[:, None] == given).sum(axis=1) - 1) / 2

    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of the leaderboard's results")
    parser.add_argument("--zoo", type=Path, required=True, help="the zoo that was scored")
    parser.add_argument("--board", default="full", help="full, tokens or lora  [full]")
    arguments = parser.parse_args()
    import neuron_methods

    neuron_methods.register()
    run = ZooRun(arguments.zoo, arguments.out, arguments.board, print)
    found = []
    for candidate in candidates(len(run.references()["experts"])):
        row = run.rows_of(candidate).read(candidate.name, run.key(candidate))
        if row is None:
            continue
        settings, scale = row["chosen"]["settings"], row["chosen"]["scale"]
        models = run.models
        with contextlib.redirect_stdout(io.StringIO()):
            merged = merge(candidate, models.base, models.experts, {**settings, **run.hand(candidate, settings)})
        merged = scaled(models.base, merged, scale)
        if arguments.board == "tokens":
            merged = tokens_by_mean(merged, models.experts, models.tokens)
        answers, distance = kept(models.base, models.experts, merged)
        found.append((candidate.name, 100 * mean_score(unpack(row["test"])), answers, distance))
        print(f"{candidate.name:44} {found[-1][1]:6.1f} %   response kept {100 * answers:6.1f} %", flush=True)
    scores, answers, distances = ([row[i] for row in found] for i in (1, 2, 3))
    print(
        f"{len(found)} rows: ρ of the response kept {spearman(scores, answers):.2f}, of the distance in weights ",
        end="",
    )
    print(f"{spearman(scores, distances):.2f}")


if __name__ == "__main__":
    run_script(main)
