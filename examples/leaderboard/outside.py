"""What merges do to tasks whose experts are not in them: every task is scored on the merge of all other experts.

    python examples/leaderboard/outside.py OUT --zoo DIR [--zoo DIR ...] [--board NAME ...] [--only ROW ...]

OUT is the directory of a run of the leaderboard, whose references and measured inputs are used. Methods are as they
come, nothing is tuned. Writes OUT/outside.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "zoo"))

from candidates import Candidate, candidates, merge, scaled, tokens_by_mean
from report import FAMILIES, Row, write_report
from run import BOARDS, ZooRun, boards_of, check_names, check_zoos, pack, run_script, run_zoo

from neuron_methods.evaluation.comparing.statistics import paired_difference

#: Rows of the leaderboard, all without tuning; none that sorts neurons by the task that is left out.
NAMES = (
    "weight average",
    "task_arithmetic, untuned",
    "ties, untuned",
    "neuro_merging",
    "min_merging, untuned",
    "neuron_response",
    "neuron_response, 40 samples",
    "TSV-M, untuned",
    "RegMean, untuned",
)
_OPENING = (
    "Mean over tasks (and seeds) of the share of right answers in percent, each task on the merge of all experts but "
    "its own; bootstrap 95 % intervals; test data. Nothing is tuned. Samples: of each other task's training data."
)


def outside(experts: int) -> list[Candidate]:
    """List the rows for a zoo with so many experts, one of which is left out."""
    return [row for row in candidates(experts - 1) if row.name in NAMES]


class OutsideRun(ZooRun):
    """Rows whose every task is scored without its expert."""

    folder = "outside"

    def score(self, candidate: Candidate) -> dict[str, Any]:
        """Merge once per task that is left out."""
        started = time.perf_counter()
        models, (settings,), (scale,) = self.models, candidate.settings, candidate.scales
        outcomes = {}
        for name in models.names:
            others = {key: expert for key, expert in models.experts.items() if key != name}
            with contextlib.redirect_stdout(io.StringIO()):  # FusionBench's functions print as they go
                merged = merge(candidate, models.base, others, {**settings, **self.hand(candidate, settings)})
            weights = scaled(models.base, merged, scale)
            if self.board == "tokens":
                weights = tokens_by_mean(weights, others, models.tokens)
            outcomes |= models.outcomes(weights, "test", [name])
        point = {"settings": settings, "scale": scale}
        seconds = round(time.perf_counter() - started, 1)
        return {"chosen": point, "trace": [], "test": pack(outcomes), "seconds": seconds}


def against_average(rows: Sequence[Row], everyone: Sequence[Row], family: str) -> list[str]:
    """Tell how methods stand to the weight average on a family; `everyone` is not used."""
    average = next((row for row in rows if row.name == "weight average"), None)
    lines = []
    for row in rows:
        if average is not None and row is not average:
            gap, error = paired_difference(row.outcomes[family], average.outcomes[family])
            low, high = 100 * (gap - 1.96 * error), 100 * (gap + 1.96 * error)
            lines.append(
                f"- {FAMILIES[family]}: {row.name} {100 * gap:+.1f} points ({low:+.1f} to {high:+.1f}) from the weight "
                "average."
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of the leaderboard's results")
    parser.add_argument("--zoo", type=Path, action="append", required=True, help="a finished zoo (repeatable)")
    parser.add_argument("--only", action="append", metavar="ROW", help="score this row only (repeatable)")
    parser.add_argument("--board", action="append", choices=BOARDS, help="this one only (repeatable; default: all)")
    arguments = parser.parse_args()
    import neuron_methods

    neuron_methods.register()
    check_names(arguments.only or [], outside(4))
    check_zoos(arguments.zoo)
    found = [
        run_zoo(directory, arguments.out, only=arguments.only, rows_for=outside, board=board, kind=OutsideRun)
        for directory in arguments.zoo
        for board in boards_of(directory)
        if board in (arguments.board or BOARDS)
    ]
    write_report(found, arguments.out, outside(4), "outside.md", against_average, _OPENING)
    print((arguments.out / "outside.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_script(main)
