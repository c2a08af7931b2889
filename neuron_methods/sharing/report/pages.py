"""The report as files: JSON, PNGs, an HTML page that needs nothing else, and a section for the model card."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neuron_methods.sharing.report.collect import FORMAT
from neuron_methods.sharing.report.drawing import DARK, LIGHT, Document, FigureSpec, figure
from neuron_methods.sharing.report.figures import MODEL_FIGURES
from neuron_methods.sharing.report.method_figures import METHOD_FIGURES
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import file_in_place_after, write_json, write_text
from neuron_methods.support.pages import page, table_of_facts
from neuron_methods.support.targets import json_of

FIGURES: tuple[FigureSpec, ...] = (*MODEL_FIGURES, *METHOD_FIGURES)
FOLDER = "report"


@dataclass(frozen=True)
class Drawn:
    """A figure, drawn: as PNG for light pages and those that know no theme, as PNG for dark ones, and in words."""

    spec: FigureSpec
    light: bytes
    dark: bytes
    text: str


def require_matplotlib() -> None:
    """Make sure, before a long merge, that the report can be drawn; raises UserError without matplotlib."""
    with figure(LIGHT):
        pass


def write_report(document: Document, place: Path, title: str) -> str:
    """Draw the figures and write all files into the directory `report` of an output.

    Returns:
        The Markdown section for the card.

    Raises:
        UserError: matplotlib is not installed, or something else is called so.
    """
    drawn = draw_figures(document)
    folder = place / FOLDER
    check_folder(place)
    folder.mkdir(exist_ok=True)
    write_json(folder / "report.json", document, indent=1)
    for one in drawn:
        with file_in_place_after(folder / f"{one.spec.name}.png") as beside:
            beside.write_bytes(one.light)
    write_text(folder / "report.html", html_page(document, drawn, title))
    return markdown_section(document, drawn)


def check_folder(place: Path) -> None:
    """Make sure that `report` in an output is a report of ours, or not there yet; raises UserError if not."""
    folder = place / FOLDER
    if folder.is_symlink() or (os.path.lexists(folder) and not folder.is_dir()):
        raise UserError(f"{folder}: is there and no directory; move it away")
    if folder.is_dir() and any(folder.iterdir()) and not json_of(FORMAT)(folder / "report.json"):
        raise UserError(f"{folder}: holds files that are no report of mergekit-neuron; move it away")


def draw_figures(document: Document) -> list[Drawn]:
    """Draw all figures that the report's JSON has the numbers for; raises UserError without matplotlib."""
    return [
        Drawn(spec, spec.draw(document, LIGHT), spec.draw(document, DARK), spec.describe(document))
        for spec in FIGURES
        if spec.applies(document)
    ]


def measured_on(document: Document) -> str:
    """Say in one sentence which neurons the numbers come from."""
    limit = document["rows_per_weight"]
    of = f"{document['neurons']:,} neurons"
    if limit is None:
        return f"Measured on all {of}: the rows of the weight matrices."
    return f"Measured on {of}: {limit} rows, drawn at random, of every weight matrix."


def markdown_section(document: Document, drawn: Sequence[Drawn]) -> str:
    """Write the section of the card, which links the pictures."""
    lines = [
        "## What the merge does to the neurons",
        "",
        f"{measured_on(document)} The page `{FOLDER}/report.html` shows the same, and needs no network.",
    ]
    for one in drawn:
        text = one.text.replace("[", "(").replace("]", ")").replace("\n", " ")
        lines += ["", f"### {one.spec.title}", "", f"![{text}]({FOLDER}/{one.spec.name}.png)", "", one.spec.caption]
    return "\n".join(lines)


def html_page(document: Document, drawn: Sequence[Drawn], title: str) -> str:
    """Write a page with the pictures in it; light or dark as the reader's system is."""
    facts = {
        "method": document["method"],
        "base": document["base"],
        "experts": ", ".join(document["experts"]),
        "numbers": measured_on(document),
    }
    body = "\n".join((table_of_facts(facts), *map(_html_figure, drawn)))
    return page(f"{title}: what the merge does to the neurons", body)


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
