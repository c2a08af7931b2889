"""How the report's figures look: colours that the colour-blind tell apart, one theme for light and one for dark pages.

The colours are those of Okabe and Ito (2008) without yellow, which white swallows, then two of Paul Tol's muted ones;
experts also differ in marker.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from neuron_methods.support.errors import UserError

Document = dict[str, Any]
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#882255", "#999933")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Theme:
    """Colours of a page: background, text, faint lines, and what stands for merge and base."""

    name: str
    background: str
    text: str
    faint: str
    merge: str
    base: str

    def expert(self, index: int) -> str:
        """Choose the colour of an expert."""
        return _COLOURS[index % len(_COLOURS)]

    def line(self, index: int) -> dict[str, Any]:
        """Choose how an expert's line looks."""
        return {
            "color": self.expert(index),
            "marker": _MARKERS[index % len(_MARKERS)],
            "linestyle": _STYLES[index // len(_COLOURS) % len(_STYLES)],
            "markersize": 3.5,
            "linewidth": 1.4,
        }

    @property
    def merge_line(self) -> dict[str, Any]:
        """How the merge's line looks."""
        return {"color": self.merge, "linewidth": 2.2, "linestyle": "-"}


LIGHT = Theme("light", "#ffffff", "#1b1f24", "#d0d7de", "#000000", "#6e7781")
DARK = Theme("dark", "#15191f", "#e6e8eb", "#3a424d", "#ffffff", "#9aa4af")


@contextmanager
def figure(theme: Theme, rows: int = 1, columns: int = 1, *, width: float = 10, height: float = 3.6) -> Iterator[Any]:
    """Open a figure with its axes.

    Yields:
        (figure, list of axes, row by row).

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the report needs matplotlib: pip install 'mergekit-neuron[report]'") from None
    of_text = ("axes.labelcolor", "axes.titlecolor", "legend.labelcolor", "text.color", "xtick.color", "ytick.color")
    settings = dict.fromkeys(of_text, theme.text) | {
        "axes.edgecolor": theme.faint,
        "axes.facecolor": theme.background,
        "axes.titlesize": 10,
        "axes.labelsize": 9,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": theme.background,
        "font.size": 9,
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
        "text.parse_math": False,  # a `$` in a name begins no formula
        "legend.frameon": False,
        "legend.fontsize": 8.5,
    }
    with rc_context(settings):
        drawn = Figure(figsize=(width, height * rows), dpi=110, layout="constrained")
        FigureCanvasAgg(drawn)
        axes = drawn.subplots(rows, columns, squeeze=False)
        yield drawn, list(axes.flat)


def png(drawn: Any) -> bytes:
    """Write a figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    # Not savefig, which lays the figure out twice, and that is most of the time.
    drawn.canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


@dataclass(frozen=True)
class LayerAxis:
    """Layers, (stack, layer) in order, of one or several stacks side by side on one axis."""

    layers: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, entries: Sequence[dict[str, Any]]) -> LayerAxis:
        """Find the layers that some entries of the report's JSON are about."""
        found = dict.fromkeys((e["stack"], e["layer"]) for e in entries if e["layer"] is not None)
        return cls(tuple(found))

    def place(self, entry: dict[str, Any]) -> int:
        """Tell where an entry is on the axis."""
        return self.layers.index((entry["stack"], entry["layer"]))

    def decorate(self, axes: Any, theme: Theme) -> None:
        """Label the axis: layer numbers, and where one stack ends and the next begins."""
        step = next(s for s in (1, 2, 4, 5, 10, 20, 50) if len(self.layers) / s <= 16)
        ticks = [i for i, (_, layer) in enumerate(self.layers) if layer % step == 0]
        axes.set_xticks(ticks, [str(self.layers[i][1]) for i in ticks])
        axes.set_xlim(-0.6, len(self.layers) - 0.4)
        axes.grid(axis="x", visible=False)
        stacks = list(dict.fromkeys(stack for stack, _ in self.layers))
        if len(stacks) == 1:
            axes.set_xlabel("layer")
            return
        for stack in stacks:
            places = [i for i, (own, _) in enumerate(self.layers) if own == stack]
            if places[0]:
                axes.axvline(places[0] - 0.5, color=theme.base, linewidth=1)
        axes.set_xlabel("layer of " + ", then ".join(stacks))


@dataclass(frozen=True)
class FigureSpec:
    """One figure.

    Attributes:
        name: of its file.
        title: heading.
        caption: what is to be seen, in a sentence or two.
        draw: (report's JSON, theme) -> PNG.
        describe: report's JSON -> what the picture shows, in words and numbers.
        applies: whether the JSON holds what it needs.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Document, Theme], bytes]
    describe: Callable[[Document], str]
    applies: Callable[[Document], bool]


def stacked_bars(
    axes: Any,
    axis: LayerAxis,
    entries: Sequence[dict[str, Any]],
    parts: Sequence[tuple[str, str, Callable[[dict[str, Any]], float]]],
    theme: Theme,
) -> None:
    """Draw one bar per entry of the report's JSON, in parts that add up to 100 %.

    A part is a label, a colour, and an entry's share between 0 and 1.
    """
    places, bottom = [axis.place(entry) for entry in entries], [0.0] * len(entries)
    look = {"width": 0.9, "edgecolor": theme.background, "linewidth": 0.4}
    for label, colour, share in parts:
        heights = [100 * share(entry) for entry in entries]
        axes.bar(places, heights, bottom=bottom, color=colour, label=label, **look)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set_ylim(0, 100)
    axis.decorate(axes, theme)
