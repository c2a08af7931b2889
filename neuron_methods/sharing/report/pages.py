"""The report as pages: one HTML file that needs nothing else, and a Markdown section for the model card."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neuron_methods.sharing.report.drawing import DARK, LIGHT
from neuron_methods.sharing.report.figures import (
    FigureSpec,
    describe_agreement,
    describe_closest,
    describe_energy,
    describe_important,
    describe_spectrum,
    draw_agreement,
    draw_closest,
    draw_energy,
    draw_important,
    draw_spectrum,
    in_layers,
)
from neuron_methods.sharing.report.method_figures import (
    describe_groups,
    describe_selection,
    describe_trim,
    draw_groups,
    draw_selection,
    draw_trim,
)

Document = dict[str, Any]


def _has_layers(document: Document) -> bool:
    return bool(in_layers(document))


def _has_pairs(document: Document) -> bool:
    return _has_layers(document) and len(document["experts"]) > 1


FIGURES: tuple[FigureSpec, ...] = (
    FigureSpec(
        "energy",
        "Parallel and orthogonal parts of the updates",
        "The parallel part of an update makes a neuron more or less sensitive to what it already reads, the orthogonal "
        "part makes it read something new. Above the parallel share of the squared norm, below the size of the update.",
        draw_energy,
        describe_energy,
        _has_layers,
    ),
    FigureSpec(
        "agreement",
        "Do the experts agree?",
        "Above, the cosine between the experts' updates. Below, the neurons with a sign conflict: before the merge, "
        "where two experts pull the neuron opposite ways, averaged over the pairs of experts (unrelated updates do so "
        "in half of the neurons); after it, where the merge moves the neuron against an expert, averaged over them.",
        draw_agreement,
        describe_agreement,
        _has_pairs,
    ),
    FigureSpec(
        "important",
        "What is kept of each expert",
        "An expert's important neurons are the tenth that it changed most, relative to the base weights. One is kept "
        "where the merge holds at least half of the expert's update along its direction.",
        draw_important,
        describe_important,
        _has_layers,
    ),
    FigureSpec(
        "closest",
        "What the merge is closest to",
        "Distance in weight space from the merge to the base and to each expert. The strip at the bottom has the "
        "colour of the closest.",
        draw_closest,
        describe_closest,
        _has_layers,
    ),
    FigureSpec(
        "spectrum",
        "Singular spectrum of the orthogonal parts",
        "Per neuron, the experts' orthogonal updates span as many directions as there are experts. The more of their "
        "energy the first one holds, the more alike they are.",
        draw_spectrum,
        describe_spectrum,
        _has_pairs,
    ),
    FigureSpec(
        "trim",
        "Trimming",
        "Entries of an update below the threshold are dropped; σ is the share of its L1 norm that goes with them.",
        draw_trim,
        describe_trim,
        lambda document: document["trim"] is not None,
    ),
    FigureSpec(
        "selection",
        "Selected neurons",
        "Every expert keeps its most important MLP neurons; those that several keep are shared out.",
        draw_selection,
        describe_selection,
        lambda document: bool(document["selection"] and document["selection"]["layers"]),
    ),
    FigureSpec(
        "groups",
        "Functional groups",
        "What makes each MLP neuron of the base fire decides which experts it takes part of.",
        draw_groups,
        describe_groups,
        lambda document: bool(document["groups"] and document["groups"]["layers"]),
    ),
)


@dataclass(frozen=True)
class Drawn:
    """A figure, drawn.

    Attributes:
        spec: which one.
        light: PNG for light pages, and for pages that know no theme.
        dark: PNG for dark pages.
        text: what it shows, in words.
    """

    spec: FigureSpec
    light: bytes
    dark: bytes
    text: str


def draw_figures(document: Document) -> list[Drawn]:
    """All figures that the report's JSON has the numbers for.

    Raises:
        UserError: matplotlib is not installed.
    """
    return [
        Drawn(spec, spec.draw(document, LIGHT), spec.draw(document, DARK), spec.describe(document))
        for spec in FIGURES
        if spec.applies(document)
    ]


def measured_on(document: Document) -> str:
    """One sentence on which neurons the numbers come from."""
    limit = document["rows_per_weight"]
    of = f"{document['neurons']:,} neurons"
    if limit is None:
        return f"Measured on all {of}: the rows of the weight matrices."
    return f"Measured on {of}: {limit} rows, drawn at random, of every weight matrix."


def markdown_section(document: Document, drawn: Sequence[Drawn], folder: str = "report") -> str:
    """The section of the card; pictures are linked in `folder` beside it."""
    lines = [
        "## What the merge does to the neurons",
        "",
        f"{measured_on(document)} The page `{folder}/report.html` shows the same, and needs no network.",
    ]
    for one in drawn:
        text = one.text.replace("[", "(").replace("]", ")").replace("\n", " ")
        lines += ["", f"### {one.spec.title}", "", f"![{text}]({folder}/{one.spec.name}.png)", "", one.spec.caption]
    return "\n".join(lines)


_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #57606a; --page: #ffffff; --line: #d0d7de; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --soft: #9aa4af; --page: #15191f; --line: #3a424d; } }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; font: 16px/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--page); }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
figure { margin: 0; } img { max-width: 100%; height: auto; display: block; }
figcaption { max-width: 46rem; color: var(--text); margin-top: .5rem; }
details { color: var(--soft); margin-top: .25rem; max-width: 46rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .25rem 1rem .25rem 0;
  border-bottom: 1px solid var(--line); font-weight: normal; vertical-align: top; } th { color: var(--soft); }
"""


def html_page(document: Document, drawn: Sequence[Drawn], title: str) -> str:
    """A page with the pictures in it; light or dark as the reader's system is."""
    facts = {
        "method": document["method"],
        "base": document["base"],
        "experts": ", ".join(document["experts"]),
        "numbers": measured_on(document),
    }
    rows = "\n".join(f"<tr><th scope=row>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    figures = "\n".join(map(_html_figure, drawn))
    shown = html.escape(title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{shown}: what the merge does to the neurons</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{shown}: what the merge does to the neurons</h1>
<table>
{rows}
</table>
{figures}
</main>
</body>
</html>
"""


def _html_figure(one: Drawn) -> str:
    text = html.escape(one.text, quote=True)
    return f"""<section>
<h2>{html.escape(one.spec.title)}</h2>
<figure>
<picture>
<source media="(prefers-color-scheme: dark)" srcset="{_data(one.dark)}">
<img src="{_data(one.light)}" alt="{text}">
</picture>
<figcaption>{html.escape(one.spec.caption)}</figcaption>
</figure>
<details><summary>The same in words</summary><p>{text}</p></details>
</section>"""


def _data(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")
