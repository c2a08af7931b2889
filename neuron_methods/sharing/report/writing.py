"""The report's files: report.json, report.html and one PNG per figure, in the directory `report` of the output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neuron_methods.sharing.report.drawing import LIGHT, figure
from neuron_methods.sharing.report.pages import draw_figures, html_page, markdown_section
from neuron_methods.support.files import write_json, write_text

FOLDER = "report"


def write_report(document: dict[str, Any], place: Path, title: str) -> str:
    """Draw the figures and write all files.

    Args:
        document: from `neuron_methods.sharing.report.collect.Collector.document`.
        place: the output's directory; `report` is made in it.
        title: what the merge is called.

    Returns:
        The Markdown section for the card.

    Raises:
        UserError: matplotlib is not installed.
    """
    drawn = draw_figures(document)
    folder = place / FOLDER
    folder.mkdir(exist_ok=True)
    write_json(folder / "report.json", document, indent=1)
    for one in drawn:
        (folder / f"{one.spec.name}.png").write_bytes(one.light)
    write_text(folder / "report.html", html_page(document, drawn, title))
    return markdown_section(document, drawn, FOLDER)


def require_matplotlib() -> None:
    """Make sure, before a long merge, that the report can be drawn.

    Raises:
        UserError: matplotlib is not installed.
    """
    with figure(LIGHT):
        pass
