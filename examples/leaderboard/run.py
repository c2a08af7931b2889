"""Every method that merges a base and more than two experts, on the zoos, with one tuning budget; a table and a figure.

    python examples/leaderboard/run.py OUT [--zoo DIR ...] [--only ROW ...]

A method has eight points on validation data; the best is scored once on test data. Without ``--zoo``, the five zoos
(ViT with three seeds, T5, Llama) are made under OUT/zoos first. Finished rows are kept: run it again to resume, or a
second time beside the first, which then share the rows. Methods of FusionBench are scored where its package is
installed (pip install fusion-bench), and named as missing where it is not. The table has every row that is finished.

Writes OUT/results.md, OUT/leaderboard.svg and OUT/results.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

ZOO = Path(__file__).resolve().parents[1] / "zoo"
sys.path.insert(0, str(ZOO))

from candidates import PROFILED, Candidate, ablations, candidates, merge, scaled, untried  # noqa: E402
from common import MARK, ZooModels, mean_score, run_script  # noqa: E402
from grouping import ABOUT, measure  # noqa: E402
from report import unpack, write_report  # noqa: E402
from rows import Busy, Rows, held  # noqa: E402

from neuron_methods.support.errors import UserError  # noqa: E402
from neuron_methods.support.text import did_you_mean  # noqa: E402

#: Family and seeds of the zoos that are made where none is named.
ZOOS = (("vit", 0), ("vit", 1), ("vit", 2), ("t5", 0), ("llama", 0))


def make_zoos(out: Path) -> list[Path]:
    """Run the zoo's scripts, each of which keeps what is finished."""
    found = []
    for family, seed in ZOOS:
        directory = out / "zoos" / f"{family}-{seed}"
        with held(directory):
            subprocess.run([sys.executable, ZOO / f"{family}.py", directory, "--seed", str(seed)], check=True)
        found.append(directory)
    return found


def score_candidate(models: ZooModels, candidate: Candidate, profile: Path | None = None) -> dict[str, Any]:
    """Tune on validation data, and score the best point on test data.

    Args:
        models: the zoo's.
        candidate: the row.
        profile: of the zoo's base, for a method that needs one.
    """
    handed = {} if profile is None else {"profile": str(profile)}
    started = time.perf_counter()
    trace = []
    best: tuple[float, dict[str, Any]] | None = None
    merged: dict[int, Any] = {}
    for index, settings in enumerate(candidate.settings):
        with contextlib.redirect_stdout(io.StringIO()):  # FusionBench's functions print as they go
            merged[index] = merge(candidate, models.base, models.experts, {**settings, **handed})
        for scale in candidate.scales:
            point = {"settings": settings, "scale": scale, "merge": index}
            if candidate.points > 1:
                weights = scaled(models.base, merged[index], scale)
                point["validation"] = mean_score(models.outcomes(weights, "validation"))
            trace.append(point)
            if best is None or point.get("validation", 0.0) > best[0]:
                best = (point.get("validation", 0.0), point)
    assert best is not None
    point = best[1]
    outcomes = models.outcomes(scaled(models.base, merged[point["merge"]], point["scale"]), "test")
    return {"chosen": point, "trace": trace, "test": pack(outcomes), "seconds": round(time.perf_counter() - started, 1)}


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


def run_zoo(
    directory: Path,
    out: Path,
    say: Callable[[str], None] = print,
    only: Sequence[str] | None = None,
    rows_for: Callable[[int], list[Candidate]] = candidates,
) -> dict[str, Any]:
    """Score all rows of one zoo, or those named by `only`.

    Several processes may do this side by side under the same `out`: a row that one of them is at is left to it.

    Returns:
        ``family``, ``seed``, ``references`` and ``rows`` by name, all that are finished, whoever scored them; rows of
        methods whose package is missing are None.
    """
    mark = json.loads((directory / MARK).read_text(encoding="utf-8"))
    checks = directory / "checks.json"
    stamp = {"zoo": mark, "checks": json.loads(checks.read_text(encoding="utf-8")) if checks.is_file() else None}
    zoo = f"{mark['family']}-{mark['seed']}"
    kept = Rows(out / "rows" / zoo)
    loaded: list[ZooModels] = []

    def models() -> ZooModels:
        if not loaded:
            say(f"{zoo}: loading {directory}")
            loaded.append(ZooModels(directory))
        return loaded[0]

    def profile() -> Path:
        place = out / "profiles" / zoo
        with held(place):
            return measure(directory, place, stamp)

    def key(candidate: Candidate) -> dict[str, Any]:
        profiled = {"profile": ABOUT} if candidate.method in PROFILED else {}
        return {**stamp, "candidate": asdict(candidate) | {"note": ""}, **profiled}

    def score(candidate: Candidate) -> dict[str, Any]:
        return score_candidate(models(), candidate, profile() if candidate.method in PROFILED else None)

    try:
        references = kept.make("references", stamp, lambda: score_references(models()), wait=False)
    except Busy:
        say(f"{zoo}: waiting for another process to score base and experts")
        references = kept.make("references", stamp, lambda: score_references(models()))
    everyone = rows_for(len(references["experts"]))
    wanted = [candidate for candidate in everyone if only is None or candidate.name in only]
    rows: dict[str, Any] = {}
    for wait in (False, True):  # what another process is at comes last
        for candidate in wanted:
            if candidate.name in rows:
                continue
            row = kept.read(candidate.name, key(candidate))
            if row is None and candidate.origin == "fusion-bench" and not has_fusion_bench():
                say(f"{zoo}: {candidate.name} left out: pip install fusion-bench")
            elif row is None:
                try:
                    row = kept.make(candidate.name, key(candidate), lambda c=candidate: score(c), wait)
                except Busy:
                    say(f"{zoo}: {candidate.name}: another process is at it")
                    continue
            rows[candidate.name] = row
            if row is not None:
                share = mean_score(unpack(row["test"]))
                say(f"{zoo}: {candidate.name:34}{100 * share:6.2f}  ({row['seconds']:.0f} s)")
    for candidate in everyone:  # what was scored before, or beside this
        if rows.get(candidate.name) is None and (row := kept.read(candidate.name, key(candidate))) is not None:
            rows[candidate.name] = row
    return {**mark, "references": references, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of results (and zoos, where none is named)")
    parser.add_argument("--zoo", type=Path, action="append", help="a finished zoo (may be given several times)")
    parser.add_argument(
        "--only", action="append", metavar="ROW", help="score this row only (may be given several times)"
    )
    parser.add_argument(
        "--ablation", action="store_true", help="steps of neuro_merging one at a time, into ablation.md"
    )
    arguments = parser.parse_args()
    import neuron_methods

    neuron_methods.register()
    if missing := untried(candidates(3)):
        print(f"mergekit has methods that the leaderboard does not know: {', '.join(missing)}")
    rows_for = ablations if arguments.ablation else candidates
    check_names(arguments.only or [], rows_for(3))
    zoos = arguments.zoo or make_zoos(arguments.out)
    for directory in zoos:
        if not (directory / MARK).is_file():
            raise UserError(f"--zoo {directory}: no {MARK} there; make a zoo with one of the scripts in examples/zoo")
    found = [run_zoo(directory, arguments.out, only=arguments.only, rows_for=rows_for) for directory in zoos]
    name = "ablation.md" if arguments.ablation else "results.md"
    with held(arguments.out / "report"):
        write_report(found, arguments.out, rows_for(3), name)
    print((arguments.out / name).read_text(encoding="utf-8"))


def check_names(only: Sequence[str], rows: Sequence[Candidate]) -> None:
    """Raise UserError unless every name is a row's."""
    names = [row.name for row in rows]
    for name in only:
        if name not in names:
            hint = did_you_mean(name, names) or f"; there are: {'; '.join(names)}"
            raise UserError(f"--only {name!r}: no row has that name{hint}")


if __name__ == "__main__":
    run_script(main)
