"""Every method that merges a base and more than two experts, on the zoos, with one tuning budget; a table and a figure.

    python examples/leaderboard/run.py OUT [--zoo DIR ...] [--board NAME ...] [--only ROW ...]
    python examples/leaderboard/run.py OUT --controls [--zoo DIR ...] [--labels FILE ...]

A method has eight points on validation data; the best is scored once on test data. Without ``--zoo``, the nine zoos
(ViT, T5 and Llama with three seeds each) are made under OUT/zoos first. Finished rows are kept: run it again to resume,
or a second time beside the first, which then share the rows. Methods of FusionBench are scored where its package is
installed (pip install fusion-bench), and named as missing where it is not. The tables have every row that is finished.

A zoo has up to three boards: its full experts; ``tokens``, the same with every method's token embeddings by their mean;
and ``lora``, its adapters.

Writes OUT/results.md, OUT/leaderboard.svg and OUT/results.json; and OUT/orderings.md: which other orderings hold here.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

ZOO = Path(__file__).resolve().parents[1] / "zoo"
sys.path.insert(0, str(ZOO))

import controls  # noqa: E402
import grouping  # noqa: E402
import responding  # noqa: E402
from candidates import (  # noqa: E402
    PROFILED,
    Candidate,
    ablations,
    candidates,
    merge,
    scaled,
    seeds,
    tokens_by_mean,
    untried,
)
from common import MARK, ZooModels, has_adapters, mean_score, run_script  # noqa: E402
from orderings import write_orderings  # noqa: E402
from report import Told, by_seed, compared, unpack, write_report  # noqa: E402
from rows import Busy, Rows, held  # noqa: E402

from neuron_methods.evaluation.comparing import best_point  # noqa: E402
from neuron_methods.support.errors import UserError  # noqa: E402
from neuron_methods.support.text import did_you_mean  # noqa: E402

#: Family and seeds of the zoos that are made where none is named.
ZOOS = tuple((family, seed) for family in ("vit", "t5", "llama") for seed in range(3))
#: A zoo's tables: full experts, the same with token embeddings by their mean, and adapters.
BOARDS = ("full", "tokens", "lora")
#: From a row and its settings to what its method is handed beside them.
Hand = Callable[[Candidate, Mapping[str, Any]], dict[str, Any]]


def make_zoos(out: Path) -> list[Path]:
    """Run the zoo's scripts, each of which keeps what is finished."""
    found = []
    for family, seed in ZOOS:
        directory = out / "zoos" / f"{family}-{seed}"
        with held(directory):
            lora = [] if family == "llama" else ["--lora"]  # which always has adapters
            subprocess.run([sys.executable, ZOO / f"{family}.py", directory, "--seed", str(seed), *lora], check=True)
        found.append(directory)
    return found


def score_candidate(models: ZooModels, candidate: Candidate, hand: Hand, tokens: bool = False) -> dict[str, Any]:
    """Tune on validation data, and score the best point on test data.

    Args:
        models: the zoo's.
        candidate: the row.
        hand: gives a method what it needs.
        tokens: token embeddings are the mean of the experts', at every point.
    """
    started = time.perf_counter()
    trace = []
    merged: dict[int, Any] = {}

    def at(point: Mapping[str, Any]) -> dict[str, Any]:
        weights = scaled(models.base, merged[point["merge"]], point["scale"])
        return tokens_by_mean(weights, models.experts, models.tokens) if tokens else weights

    for index, settings in enumerate(candidate.settings):
        with contextlib.redirect_stdout(io.StringIO()):  # FusionBench's functions print as they go
            merged[index] = merge(candidate, models.base, models.experts, {**settings, **hand(candidate, settings)})
        for scale in candidate.scales:
            point = {"settings": settings, "scale": scale, "merge": index}
            if candidate.points > 1:
                point["validation"] = mean_score(models.outcomes(at(point), "validation"))
            trace.append(point)
    _, chosen = best_point((point.get("validation", 0.0), point) for point in trace)
    outcomes = models.outcomes(at(chosen), "test")
    seconds = round(time.perf_counter() - started, 1)
    return {"chosen": chosen, "trace": trace, "test": pack(outcomes), "seconds": seconds}


def pack(outcomes: dict[str, np.ndarray]) -> dict[str, str]:
    """Write right or wrong per example as a string of ones and zeros per task."""
    return {name: "".join("1" if value else "0" for value in values) for name, values in outcomes.items()}


def score_references(models: ZooModels) -> dict[str, dict[str, str]]:
    """Score the base, and every expert on its own task."""
    own: dict[str, np.ndarray] = {}
    for name in models.names:
        own |= models.outcomes(models.experts[name], "test", [name])
    return {"base": pack(models.outcomes(models.base, "test")), "experts": pack(own)}


def has_fusion_bench() -> bool:
    """Tell whether its package is installed. Once imported it has no spec to find."""
    return "fusion_bench" in sys.modules or importlib.util.find_spec("fusion_bench") is not None


def boards_of(directory: Path) -> list[str]:
    """List the boards that a zoo has."""
    family = json.loads((directory / MARK).read_text(encoding="utf-8"))["family"]
    there = {"full": True, "tokens": family != "vit", "lora": has_adapters(directory)}
    return [board for board in BOARDS if there[board]]


class ZooRun:
    """What the rows of one zoo and board are scored with; models and measurements are made when they are asked for."""

    #: Where its rows are kept.
    folder = "rows"

    def __init__(self, directory: Path, out: Path, board: str, say: Callable[[str], None]) -> None:
        self.directory, self.out, self.board, self.say = directory, out, board, say
        self.mark = json.loads((directory / MARK).read_text(encoding="utf-8"))
        checks = directory / "checks.json"
        scores = json.loads(checks.read_text(encoding="utf-8")) if checks.is_file() else None
        self.stamp = {"zoo": self.mark, "checks": scores}
        self.family = self.mark["family"] + ("" if board == "full" else f"-{board}")
        self.zoo = f"{self.mark['family']}-{self.mark['seed']}"
        self.name = f"{self.family}-{self.mark['seed']}"
        self.kept = self._rows(self.folder, self.family)

    def _rows(self, folder: str, family: str) -> Rows:
        return Rows(self.out / folder / f"{family}-{self.mark['seed']}")

    @cached_property
    def models(self) -> ZooModels:
        """Base and experts in memory."""
        self.say(f"{self.name}: loading {self.directory}")
        return ZooModels(self.directory, adapters=self.board == "lora")

    def rows_of(self, candidate: Candidate) -> Rows:
        """Find where a row is kept: what averages token embeddings by itself, at scale 1, is the same on two boards."""
        same = self.board == "tokens" and candidate.averages_tokens and set(candidate.scales) == {1.0}
        return self._rows(self.folder, self.mark["family"]) if same else self.kept

    def key(self, candidate: Candidate) -> dict[str, Any]:
        """Say what a row is made of."""
        more: dict[str, Any] = {"profile": grouping.ABOUT} if candidate.method in PROFILED else {}
        if candidate.method == responding.NAME:
            more["defaults"] = responding.defaults()
        return {**self.stamp, "candidate": asdict(candidate) | {"note": ""}, **more}

    def score(self, candidate: Candidate) -> dict[str, Any]:
        """Score a row."""
        return score_candidate(self.models, candidate, self.hand, self.board == "tokens")

    def references(self) -> dict[str, Any]:
        """Score base and experts, or wait for another process to do so; those of ``tokens`` are the full experts'."""
        kept = self._rows("rows", self.mark["family"] if self.board == "tokens" else self.family)
        try:
            return kept.make("references", self.stamp, lambda: score_references(self.models), wait=False)
        except Busy:
            self.say(f"{self.name}: waiting for another process to score base and experts")
            return kept.make("references", self.stamp, lambda: score_references(self.models))

    def profile(self) -> str:
        """Measure the profile of the zoo's base, once; gives its file."""
        place = self.out / "profiles" / self.zoo
        with held(place):
            return str(grouping.measure(self.directory, place, self.stamp))

    def hand(self, candidate: Candidate, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Give a method what it needs beside the weights and its settings, measured once."""
        handed: dict[str, Any] = {}
        if candidate.method in PROFILED:
            handed["profile"] = self.profile()
        if candidate.method == responding.NAME:
            handed["models"] = self.models
        if samples := settings.get("samples"):
            lora = self.board == "lora"
            place = self.out / "inputs" / f"{self.zoo}-{'adapters' if lora else 'experts'}-{samples}"
            with held(place):
                handed["measured"] = responding.measure(self.directory, place, self.stamp, samples, adapters=lora)
        return handed


def run_zoo(
    directory: Path,
    out: Path,
    say: Callable[[str], None] = print,
    only: Sequence[str] | None = None,
    rows_for: Callable[[int], list[Candidate]] = candidates,
    board: str = "full",
    kind: type[ZooRun] = ZooRun,
) -> dict[str, Any]:
    """Score all rows of one zoo's board, or those named by `only`, as `kind` does.

    Several processes may do this side by side under the same `out`: a row that one of them is at is left to it.

    Returns:
        ``family``, the board's included, ``seed``, ``references`` and ``rows`` by name, all that are finished, whoever
        scored them; rows of methods whose package is missing are None.
    """
    run = kind(directory, out, board, say)
    references = run.references()
    everyone = rows_for(len(references["experts"]))
    wanted = [candidate for candidate in everyone if only is None or candidate.name in only]
    rows: dict[str, Any] = {}
    for wait in (False, True):  # what another process is at comes last
        for candidate in wanted:
            if candidate.name in rows:
                continue
            kept, key = run.rows_of(candidate), run.key(candidate)
            row = kept.read(candidate.name, key)
            if row is None and candidate.origin == "fusion-bench" and not has_fusion_bench():
                say(f"{run.name}: {candidate.name} left out: pip install fusion-bench")
            elif row is None:
                try:
                    row = kept.make(candidate.name, key, lambda c=candidate: run.score(c), wait)
                except Busy:
                    say(f"{run.name}: {candidate.name}: another process is at it")
                    continue
            rows[candidate.name] = row
            if row is not None:
                share = mean_score(unpack(row["test"]))
                say(f"{run.name}: {candidate.name:34}{100 * share:6.2f}  ({row['seconds']:.0f} s)")
    for candidate in everyone:  # what was scored before, or beside this
        there = rows.get(candidate.name) or run.rows_of(candidate).read(candidate.name, run.key(candidate))
        if there is not None:
            rows[candidate.name] = there
    return {"family": run.family, "seed": run.mark["seed"], "references": references, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of results (and zoos, where none is named)")
    parser.add_argument("--zoo", type=Path, action="append", help="a finished zoo (may be given several times)")
    parser.add_argument(
        "--only", action="append", metavar="ROW", help="score this row only (may be given several times)"
    )
    sheet = parser.add_mutually_exclusive_group()
    sheet.add_argument("--ablation", action="store_true", help="steps of neuro_merging one at a time, into ablation.md")
    sheet.add_argument(
        "--controls", action="store_true", help="neuron_merge with other groups than the tasks', into controls.md"
    )
    sheet.add_argument(
        "--seeds", action="store_true", help="few rows that are worth the time on every seed, into seeds.md"
    )
    parser.add_argument(
        "--labels",
        type=Path,
        action="append",
        metavar="FILE",
        help="with --controls: labels of a zoo's neurons, one file per --zoo and in their order",
    )
    parser.add_argument(
        "--board", action="append", choices=BOARDS, help="this one only (may be given several times; default: all)"
    )
    arguments = parser.parse_args()
    import neuron_methods

    neuron_methods.register()
    if missing := untried(candidates(3)):
        print(f"mergekit has methods that the leaderboard does not know: {', '.join(missing)}")
    sheet = next((name for name in ("ablation", "controls", "seeds") if getattr(arguments, name)), "results")
    rows_for, told = SHEETS[sheet]
    labels = labels_of(arguments.labels, arguments.zoo, sheet)
    everyone = rows_for(3, labels=labels[0]) if labels else rows_for(3)
    check_names(arguments.only or [], everyone)
    zoos = arguments.zoo or make_zoos(arguments.out)
    check_zoos(zoos)
    boards = arguments.board or (["full"] if arguments.ablation else BOARDS)
    found = []
    for directory, file in zip(zoos, labels or [None] * len(zoos), strict=True):
        rows_of_zoo = functools.partial(rows_for, labels=file) if file else rows_for
        for board in boards_of(directory):
            if board in boards:
                found.append(run_zoo(directory, arguments.out, only=arguments.only, rows_for=rows_of_zoo, board=board))
    name = f"{sheet}.md"
    with held(arguments.out / "report"):
        write_report(found, arguments.out, everyone, name, told)
        if sheet == "results":
            write_orderings(found, arguments.out, everyone)
    print((arguments.out / name).read_text(encoding="utf-8"))


#: What the tables are of: the rows for a number of experts, and what is told below.
SHEETS: dict[str, tuple[Callable[..., list[Candidate]], Told]] = {
    "results": (candidates, compared),
    "ablation": (ablations, compared),
    "controls": (controls.controls, controls.against_random),
    "seeds": (seeds, by_seed),
}


def labels_of(given: Sequence[Path] | None, zoos: Sequence[Path] | None, sheet: str) -> Sequence[Path] | None:
    """Check the files of labels; raises UserError where they are not one for each zoo, or not there."""
    if not given:
        return None
    if sheet != "controls":
        raise UserError("--labels: only --controls has rows for them")
    if len(given) != len(zoos or ()):
        raise UserError(f"--labels: {len(given)} given for {len(zoos or ())} --zoo; give one for each, in their order")
    for file in given:
        if not file.is_file():
            raise UserError(f"--labels {file}: not there; give a file that `mergekit-neuron groups --import` takes")
    return given


def check_zoos(zoos: Sequence[Path]) -> None:
    """Raise UserError unless each directory is a zoo."""
    for directory in zoos:
        if not (directory / MARK).is_file():
            raise UserError(f"--zoo {directory}: no {MARK} there; make a zoo with one of the scripts in examples/zoo")


def check_names(only: Sequence[str], rows: Sequence[Candidate]) -> None:
    """Raise UserError unless every name is a row's."""
    names = [row.name for row in rows]
    for name in only:
        if name not in names:
            hint = did_you_mean(name, names) or f"; there are: {'; '.join(names)}"
            raise UserError(f"--only {name!r}: no row has that name{hint}")


if __name__ == "__main__":
    run_script(main)
