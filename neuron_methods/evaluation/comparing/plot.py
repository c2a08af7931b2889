"""The figure of a comparison: score by method and task, and score against the time of a merge."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import Any

from neuron_methods.evaluation.comparing.statistics import spread
from neuron_methods.evaluation.comparing.study import Row

# Of Okabe and Ito (2008), without yellow and black.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_METADATA = ("Date", "Creator", "Format", "Type")
_MARKERS = "os^Dv*PX"


def draw_comparison(rows: Sequence[Row]) -> list[str]:
    """Draw both panels as SVG that takes its text's colour from the page; [] where scores are no means."""
    shown = [row for row in rows if row.paired]
    merges = [row for row in shown if row.kind == "merge"]
    if not merges:
        return []
    return [
        _svg(_by_method(shown), "Mean test score of every model with its interval, and its score on each task"),
        _svg(_by_time(merges), "Mean test score of every merge against the seconds that it takes"),
    ]


def _by_method(rows: Sequence[Row]) -> Any:
    from matplotlib.figure import Figure

    ordered = sorted(rows, key=lambda row: row.mean or 0.0)
    figure = Figure(figsize=(9, 1.6 + 0.32 * len(ordered)), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(ordered):
        found = spread([row.outcomes])
        axis.plot([100 * found.low, 100 * found.high], [place, place], color="gray", linewidth=3, alpha=0.6)
        axis.plot(100 * found.mean, place, "|", color="gray", markersize=14, markeredgewidth=2.5)
    for number, task in enumerate(ordered[0].tasks):
        values = [100 * float(row.outcomes[task["name"]].mean()) for row in ordered]
        style = {"marker": _MARKERS[number % len(_MARKERS)], "color": _COLOURS[number % len(_COLOURS)]}
        axis.plot(values, range(len(ordered)), linestyle="none", markersize=5, label=task["name"], **style)
    axis.set_yticks(range(len(ordered)), [row.name for row in ordered])
    axis.set_xlabel("test score, % (bar: mean over tasks, 95 %)")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=4, fontsize=8, frameon=False)
    return figure


def _by_time(merges: Sequence[Row]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    for number, row in enumerate(merges):
        seconds, score = row.merge_seconds or 0.0, 100 * (row.mean or 0.0)
        axis.plot(seconds, score, _MARKERS[number % len(_MARKERS)], color=_COLOURS[number % len(_COLOURS)])
        axis.annotate(row.name, (seconds, score), textcoords="offset points", xytext=(6, 3), fontsize=8)
    axis.set_xlim(0, 1.3 * max(row.merge_seconds or 0.0 for row in merges) + 0.01)
    axis.set_xlabel("seconds per merge, with loading what it wrote")
    axis.set_ylabel("mean test score, %")
    axis.grid(alpha=0.3)
    return figure


def _svg(figure: Any, described: str) -> str:
    """Write a figure as SVG within a page: text and lines in the page's colour, described for who does not see it."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a `$` in a name begins no formula
    written = io.StringIO()
    with rc_context({"svg.hashsalt": "compare"}):
        figure.savefig(written, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    svg = written.getvalue()
    # What has no colour of its own, as text, is filled with the page's.
    opening = f'<svg role="img" fill="currentColor" aria-label="{html.escape(described, quote=True)}"'
    return re.sub(r"\A.*?<svg", opening, svg, flags=re.S).replace("#000000", "currentColor")
