"""The leaderboard's table, figure and figures in JSON, from the rows of its zoos."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from candidates import BUDGET, Candidate

from neuron_methods.evaluation.comparing.statistics import paired_difference, spread
from neuron_methods.support.files import write_json, write_text

FAMILIES = {
    "vit": "ViT",
    "t5": "T5",
    "llama": "Llama",
    "t5-tokens": "T5, token embeddings by mean",
    "llama-tokens": "Llama, token embeddings by mean",
    "vit-lora": "ViT, LoRA",
    "t5-lora": "T5, LoRA",
    "llama-lora": "Llama, LoRA",
}
#: Families side by side, and what their table is of.
TABLES = {
    "Full experts, every method as it is": ("vit", "t5", "llama"),
    "Full experts, every method's token embeddings by the mean of the updates": ("t5-tokens", "llama-tokens"),
    "LoRA experts": ("vit-lora", "t5-lora", "llama-lora"),
}
COLOURS = {"mergekit": "#8da0b6", "ours": "#c4462f", "fusion-bench": "#d9b44a"}

#: Right or wrong per example, per task, per seed.
Outcomes = list[dict[str, np.ndarray]]
#: From the rows that are scored on all seeds of a family, all rows, and the family, to lines about it.
Told = Callable[[Sequence["Row"], Sequence["Row"], str], list[str]]
OPENING = (
    "Mean over tasks (and seeds) of the share of right answers in percent, with bootstrap 95 % intervals; test data. "
    f"Every tuned method had {BUDGET} points on validation data. Samples: of each task's training data, that a method "
    "reads to merge."
)


@dataclass(frozen=True)
class Row:
    """One method: its outcomes by family, and the points chosen, per seed."""

    name: str
    origin: str
    points: int
    samples: int
    note: str
    outcomes: dict[str, Outcomes]
    chosen: dict[str, list[dict[str, Any]]]


def collect(
    results: Sequence[Mapping[str, Any]], candidates: Sequence[Candidate]
) -> tuple[list[Row], dict[str, dict[str, Outcomes]]]:
    """Collect rows, and the outcomes of base and experts, by family; seeds of one family side by side."""
    references: dict[str, dict[str, Outcomes]] = {"base": {}, "experts": {}}
    for result in results:
        for name, by_family in references.items():
            by_family.setdefault(result["family"], []).append(unpack(result["references"][name]))
    rows = []
    for candidate in candidates:
        row = Row(candidate.name, candidate.origin, candidate.points, candidate.samples, candidate.note, {}, {})
        for result in results:
            if (found := result["rows"].get(candidate.name)) is not None:
                row.outcomes.setdefault(result["family"], []).append(unpack(found["test"]))
                row.chosen.setdefault(result["family"], []).append(found["chosen"])
        rows.append(row)
    return rows, references


def unpack(packed: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Turn strings of ones and zeros per task into numbers."""
    return {name: np.frombuffer(text.encode(), dtype=np.uint8) - ord("0") for name, text in packed.items()}


def write_report(
    results: Sequence[Mapping[str, Any]],
    out: Path,
    candidates: Sequence[Candidate],
    name: str = "results.md",
    told: Told | None = None,
    opening: str = OPENING,
) -> None:
    """Write the tables under `name`; for ``results.md`` also ``leaderboard.svg`` and ``results.json``.

    Args:
        results: of `run_zoo`.
        out: directory.
        candidates: the rows.
        name: of the file.
        told: what is told of a family below the tables; `compared` where it is not given.
        opening: what scores are of.
    """
    rows, references = collect(results, candidates)
    families = [family for family in FAMILIES if family in references["base"]]
    write_text(out / name, markdown(rows, references, families, told or compared, opening))
    if name != "results.md":
        return
    content = {
        "rows": [
            {
                "name": row.name,
                "origin": row.origin,
                "samples": row.samples,
                "scores": {f: vars(spread(o)) for f, o in row.outcomes.items()},
                "by_task": {
                    f: [{k: round(float(v.mean()), 4) for k, v in o.items()} for o in s]
                    for f, s in row.outcomes.items()
                },
                "chosen": {f: [{k: p[k] for k in ("settings", "scale")} for p in c] for f, c in row.chosen.items()},
            }
            for row in rows
        ],
        "references": {n: {f: vars(spread(o)) for f, o in by.items()} for n, by in references.items()},
    }
    write_json(out / "results.json", content, indent=1)
    draw(rows, references, families, out / "leaderboard.svg")


def markdown(
    rows: Sequence[Row],
    references: dict[str, dict[str, Outcomes]],
    families: Sequence[str],
    told: Told,
    opening: str,
) -> str:
    """Write the tables, and what is told of each family."""
    lines = [opening, ""]
    for title, group in TABLES.items():
        if there := [family for family in group if family in families]:
            lines += [f"## {title}", "", *table(rows, references, there), ""]
    for family in families:
        lines += told(complete(rows, references, family), rows, family)
    notes = [f"- {row.name}: {row.note}." for row in rows if row.note]
    return "\n".join([*lines, *notes]) + "\n"


def table(rows: Sequence[Row], references: dict[str, dict[str, Outcomes]], families: Sequence[str]) -> list[str]:
    """Lay rows out by families, the best on the first of them on top; with what token embeddings by mean change."""
    seeds = {family: len(references["base"][family]) for family in families}
    heads = []
    for family in families:
        heads.append(FAMILIES[family] + (f", {seeds[family]} seeds" if seeds[family] > 1 else ""))
        heads += ["gain"] if family.endswith("-tokens") else []
    lines = [f"| method | from | points | {' | '.join(heads)} |", "|---|---|---|" + "---|" * len(heads)]
    for name, label in (("base", "base"), ("experts", "each expert on its own task")):
        scores = []
        for family in families:
            scores += [str(spread(references[name][family]))] + [""] * family.endswith("-tokens")
        lines.append(f"| *{label}* | | | {' | '.join(scores)} |")

    def height(row: Row) -> tuple[float, ...]:
        return tuple(-spread(row.outcomes[f]).mean if row.outcomes.get(f) else 1.0 for f in families)

    for row in sorted(rows, key=height):
        scores = []
        for family in families:
            scores.append(cell(row.outcomes.get(family, []), seeds[family]))
            if family.endswith("-tokens"):
                scores.append(gain(row, family))
        points = str(row.points) if row.points > 1 else "0"
        samples = f", {row.samples:,} samples" if row.samples else ""
        lines.append(f"| {row.name} | {row.origin} | {points}{samples} | {' | '.join(scores)} |")
    return lines


def gain(row: Row, family: str) -> str:
    """Tell what the mean of token embeddings changes, where both boards have the row on the same seeds."""
    one, other = row.outcomes.get(family, []), row.outcomes.get(family.removesuffix("-tokens"), [])
    return f"{100 * paired_difference(one, other)[0]:+.1f}" if one and len(one) == len(other) else "–"


def compared(whole: Sequence[Row], rows: Sequence[Row], family: str) -> list[str]:
    """Tell how ours stand to the best of others' on a family, of those scored on all seeds: `whole`, out of `rows`."""

    def best(origin: str, data: bool) -> Row | None:
        some = (row for row in whole if row.origin == origin and (row.samples > 0) == data)
        return max(some, key=lambda row: spread(row.outcomes[family]).mean, default=None)

    lines = []
    for data in (False, True):
        peers = {"mergekit's own": best("mergekit", data), "FusionBench's": best("fusion-bench", data)}
        ours = {}
        if not data:
            ours["neuron_response at its defaults"] = next((r for r in whole if r.name == "neuron_response"), None)
        if (top := best("ours", data)) is not None:
            ours[f"the best of ours{' with data' if data else ''}, {top.name},"] = top
        for who, row in ours.items():
            stands = []
            for whose, peer in peers.items():
                if row is None or peer is None:
                    continue
                gap, error = paired_difference(row.outcomes[family], peer.outcomes[family])
                all_of, scored = (
                    sum(r.origin == peer.origin and (r.samples > 0) == data for r in some) for some in (rows, whole)
                )
                only = f" (only {scored} of {all_of} of them were scored)" if scored < all_of else ""
                stands.append(
                    f"{100 * gap:+.1f} points (standard error of the paired difference {100 * error:.1f}) from the "
                    f"best of {whose}, {peer.name}{only}"
                )
            if stands:
                lines.append(f"- {FAMILIES[family]}: {who} is {' and '.join(stands)}.")
    return lines


def by_seed(whole: Sequence[Row], rows: Sequence[Row], family: str) -> list[str]:
    """Tell the scores of `whole` by seed, and how ours with and without data stand to all others of their kind.

    Args:
        whole: rows that are scored on all seeds.
        rows: all; not used.
        family: of `FAMILIES`.
    """
    lines = []
    for row in whole:
        scores = [100 * spread([outcomes]).mean for outcomes in row.outcomes[family]]
        stands = []
        for other in whole:
            if row.origin == "ours" != other.origin and (row.samples > 0) == (other.samples > 0):
                gap, error = paired_difference(row.outcomes[family], other.outcomes[family])
                each = [
                    100 * paired_difference([a], [b])[0]
                    for a, b in zip(row.outcomes[family], other.outcomes[family], strict=True)
                ]
                stands.append(
                    f"{100 * gap:+.1f} points (standard error {100 * error:.1f}; "
                    f"{', '.join(f'{value:+.1f}' for value in each)}) from {other.name}"
                )
        told = f"; {'; '.join(stands)}" if stands else ""
        lines.append(f"- {FAMILIES[family]}, by seed: {row.name} {', '.join(f'{s:.1f}' for s in scores)}{told}.")
    return lines


def complete(rows: Sequence[Row], references: dict[str, dict[str, Outcomes]], family: str) -> list[Row]:
    """Choose the rows that are scored on every seed of a family: only those compare."""
    seeds = len(references["base"][family])
    return [row for row in rows if len(row.outcomes.get(family, [])) == seeds]


def cell(outcomes: Outcomes, seeds: int) -> str:
    """Write a row's score on a family, and how many seeds it is of where that is not all of them."""
    if not outcomes:
        return "–"
    return str(spread(outcomes)) + (f", {len(outcomes)} of {seeds} seeds" if len(outcomes) < seeds else "")


def draw(rows: Sequence[Row], references: dict[str, dict[str, Outcomes]], families: Sequence[str], path: Path) -> None:
    """Draw one panel per family: bars by score of what is scored on all seeds, base and experts as lines."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "leaderboard"  # the same file for the same figures
    from matplotlib import pyplot

    across = min(3, len(families))
    down = -(-len(families) // across)
    height = 1.5 + 0.14 * len(rows)
    figure, panels = pyplot.subplots(down, across, figsize=(4.6 * across, height * down), squeeze=False)
    for panel in panels.flat[len(families) :]:
        panel.set_axis_off()
    for panel, family in zip(panels.flat, families, strict=False):
        scored = [(spread(row.outcomes[family]), row) for row in complete(rows, references, family)]
        scored.sort(key=lambda pair: pair[0].mean)
        means = np.array([100 * score.mean for score, _ in scored])
        errors = np.array([[100 * (s.mean - s.low), 100 * (s.high - s.mean)] for s, _ in scored]).reshape(-1, 2).T
        panel.barh(
            [row.name for _, row in scored],
            means,
            xerr=errors,
            color=[COLOURS[row.origin] for _, row in scored],
            error_kw={"linewidth": 0.8},
        )
        for name, style in (("base", ":"), ("experts", "--")):
            panel.axvline(100 * spread(references[name][family]).mean, color="black", linestyle=style, linewidth=1)
        panel.set_title(f"{FAMILIES[family]} (dotted: base, dashed: experts)", fontsize=9)
        panel.set_xlabel("right answers, %", fontsize=8)
        panel.tick_params(labelsize=7)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, list(COLOURS), loc="lower center", ncols=len(COLOURS), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.24 / (height * down), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
