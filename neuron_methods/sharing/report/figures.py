"""The figures of a report: each takes the report's JSON and a theme, and comes with a text that tells the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from neuron_methods.sharing.report.drawing import LayerAxis, Theme, figure, png

Document = dict[str, Any]
# Kinds of weights that layers are made of, in the order they are shown.
KINDS = ("attention", "MLP", "other")


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


def in_layers(document: Document, kind: str | None = None) -> list[dict[str, Any]]:
    """Entries of weights in layers, of one kind or all."""
    return [e for e in document["places"] if e["layer"] is not None and kind in (None, e["kind"])]


def kinds_of(document: Document) -> list[str]:
    """The kinds of weights that the layers have."""
    found = {entry["kind"] for entry in in_layers(document)}
    return [kind for kind in KINDS if kind in found]


def _segments(axis: LayerAxis, entries: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Entries stack by stack, so that no line runs from one stack to the next."""
    for stack in dict.fromkeys(stack for stack, _ in axis.layers):
        yield [entry for entry in entries if entry["stack"] == stack]


def _line(
    axes: Any,
    axis: LayerAxis,
    entries: Sequence[dict[str, Any]],
    value: Callable[[dict[str, Any]], float],
    label: str,
    **style: Any,
) -> None:
    for part in _segments(axis, entries):
        if part:
            axes.plot([axis.place(e) for e in part], [value(e) for e in part], label=label, **style)
            label = "_nolegend_"


def _legend(drawn: Any, axes: Any, columns: int = 6) -> None:
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))


def _range(values: Sequence[float], digits: int = 1, percent: bool = True) -> str:
    low, high = (f"{(100 if percent else 1) * v:.{digits}f}" for v in (min(values), max(values)))
    unit = " %" if percent else ""
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


# Update energy -------------------------------------------------------------------------------------------------------


def draw_energy(document: Document, theme: Theme) -> bytes:
    """Share of the update that is parallel to the neurons, and its size, per layer and kind."""
    kinds, axis = kinds_of(document), LayerAxis.of(in_layers(document))
    with figure(theme, 2, len(kinds), height=2.7) as (drawn, axes):
        for row, (key, title) in enumerate(
            (("parallel_share", "parallel share of update energy, %"), ("relative_update", "size of update, % of base"))
        ):
            for column, kind in enumerate(kinds):
                here = axes[row * len(kinds) + column]
                entries = in_layers(document, kind)
                for index, expert in enumerate(document["experts"]):
                    _line(here, axis, entries, lambda e, k=key, i=index: 100 * e[k][i], expert, **theme.line(index))
                _line(here, axis, entries, lambda e, k=key: 100 * e[k][-1], "merge", **theme.merge_line)
                axis.decorate(here, theme)
                here.set_ylim(bottom=0)
                here.set_title(f"{kind}: {title}")
        _legend(drawn, axes[0])
        return png(drawn)


def describe_energy(document: Document) -> str:
    """Ranges of the parallel share and of the sizes."""
    parts = []
    for kind in kinds_of(document):
        entries = in_layers(document, kind)
        experts = [v for e in entries for v in e["parallel_share"][:-1]]
        merge = [e["parallel_share"][-1] for e in entries]
        parts.append(
            f"{kind}: parallel share of the experts' update energy {_range(experts, 2)}, of the merge's "
            f"{_range(merge, 2)}, the rest is orthogonal; size of the experts' updates "
            f"{_range([v for e in entries for v in e['relative_update'][:-1]])} of the base's norm, of the merge's "
            f"{_range([e['relative_update'][-1] for e in entries])}"
        )
    return "Line charts by layer. " + ". ".join(parts) + "."


# Agreement -----------------------------------------------------------------------------------------------------------


def draw_agreement(document: Document, theme: Theme) -> bytes:
    """Cosines between experts, and neurons in conflict before and after the merge, per layer and kind."""
    kinds, axis = kinds_of(document), LayerAxis.of(in_layers(document))
    pairs = list(combinations(range(len(document["experts"])), 2))
    with figure(theme, 2, len(kinds), height=2.7) as (drawn, axes):
        for column, kind in enumerate(kinds):
            entries, here = in_layers(document, kind), axes[column]
            shown = pairs if len(pairs) <= 6 else []
            for index, (a, b) in enumerate(shown):
                label = f"{document['experts'][a]} · {document['experts'][b]}"
                _line(here, axis, entries, lambda e, a=a, b=b: e["cosines"][a][b], label, **theme.line(index))
            if not shown:
                _band(here, axis, entries, pairs, theme)
            here.axhline(0, color=theme.base, linewidth=1)
            here.set_title(f"{kind}: cosine of task vectors")
            axis.decorate(here, theme)
            here = axes[len(kinds) + column]
            _line(
                here,
                axis,
                entries,
                lambda e: 100 * e["conflict_before"],
                "before: two experts oppose each other",
                color=theme.expert(3),
                marker="s",
                markersize=3.5,
                linestyle="--",
            )
            _line(
                here,
                axis,
                entries,
                lambda e: 100 * e["conflict_after"],
                "after: merge goes against an expert",
                **theme.merge_line,
            )
            here.set_ylim(0, 100)
            here.set_title(f"{kind}: neurons with sign conflict, %")
            axis.decorate(here, theme)
        axes[0].legend(loc="best", fontsize=7.5)
        axes[len(kinds)].legend(loc="best", fontsize=7.5)
        return png(drawn)


def _band(
    axes: Any, axis: LayerAxis, entries: Sequence[dict[str, Any]], pairs: Sequence[tuple[int, int]], theme: Theme
) -> None:
    """Mean and span over all pairs, where there are too many for lines of their own."""
    for number, part in enumerate(_segments(axis, entries)):
        values = [[e["cosines"][a][b] for a, b in pairs] for e in part]
        places = [axis.place(e) for e in part]
        axes.fill_between(places, [min(v) for v in values], [max(v) for v in values], color=theme.expert(0), alpha=0.25)
        label = f"mean of {len(pairs)} pairs, band: smallest to largest" if not number else "_nolegend_"
        axes.plot(places, [sum(v) / len(v) for v in values], label=label, **theme.line(0))


def describe_agreement(document: Document) -> str:
    """Ranges of cosines and conflicts."""
    pairs = list(combinations(range(len(document["experts"])), 2))
    parts = []
    for kind in kinds_of(document):
        entries = in_layers(document, kind)
        values = [e["cosines"][a][b] for e in entries for a, b in pairs]
        parts.append(
            f"{kind}: cosine between the experts' task vectors {_range(values, 2, percent=False)}; neurons on which "
            f"two experts oppose each other {_range([e['conflict_before'] for e in entries])}, on which the merge goes "
            f"against an expert {_range([e['conflict_after'] for e in entries])}"
        )
    return "Line charts by layer. " + ". ".join(parts) + "."


# Important neurons ---------------------------------------------------------------------------------------------------


def draw_important(document: Document, theme: Theme) -> bytes:
    """Share of each expert's important neurons that the merge keeps, and how far the experts' sets overlap."""
    important, experts = document["important"], document["experts"]
    entries = [e for e in important["layers"] if e["layer"] is not None]
    axis = LayerAxis.of(entries)
    with figure(theme, 1, 2, height=3.4 if len(experts) < 5 else 4.4) as (drawn, (left, right)):
        for index, expert in enumerate(experts):
            known = [e for e in entries if e["neurons"][index]]
            _line(left, axis, known, lambda e, i=index: 100 * e["kept"][i], expert, **theme.line(index))
        left.set_ylim(0, 105)
        left.set_title("important neurons kept, %")
        axis.decorate(left, theme)
        _legend(drawn, left)
        _matrix(right, important["overlap"], experts, theme)
        right.set_title("overlap of important neurons, %")
        return png(drawn)


def _matrix(axes: Any, values: Sequence[Sequence[float]], labels: Sequence[str], theme: Theme) -> None:
    shown = [[100 * value for value in row] for row in values]
    axes.imshow(shown, cmap="cividis", vmin=0, vmax=100)
    axes.grid(False)
    axes.set_xticks(
        range(len(labels)), labels, rotation=30 if len(labels) > 3 else 0, ha="right" if len(labels) > 3 else "center"
    )
    axes.set_yticks(range(len(labels)), labels)
    for i, row in enumerate(shown):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="black" if value > 55 else "white")


def describe_important(document: Document) -> str:
    """What is kept of each expert, and the overlaps."""
    important, experts = document["important"], document["experts"]
    kept = ", ".join(f"{e} {100 * k:.0f} %" for e, k in zip(experts, important["kept"], strict=True))
    overlaps = ", ".join(
        f"{experts[a]} and {experts[b]} {100 * important['overlap'][a][b]:.0f} %"
        for a, b in combinations(range(len(experts)), 2)
    )
    return f"Line chart by layer and a matrix. Important neurons kept over the model: {kept}. Overlap: {overlaps}."


# Spectrum ------------------------------------------------------------------------------------------------------------


def draw_spectrum(document: Document, theme: Theme) -> bytes:
    """Mean share of each singular direction in the energy of the neurons' orthogonal parts, per layer and kind."""
    kinds, axis = kinds_of(document), LayerAxis.of(in_layers(document))
    with figure(theme, 1, len(kinds), height=3.0) as (drawn, axes):
        for here, kind in zip(axes, kinds, strict=True):
            entries = in_layers(document, kind)
            places = [axis.place(e) for e in entries]
            bottom = [0.0] * len(entries)
            for direction in range(len(document["experts"])):
                heights = [100 * e["spectrum"][direction] for e in entries]
                here.bar(
                    places,
                    heights,
                    bottom=bottom,
                    width=0.9,
                    color=theme.expert(direction),
                    label=f"direction {direction + 1}",
                    edgecolor=theme.background,
                    linewidth=0.4,
                )
                bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
            here.set_ylim(0, 100)
            here.set_title(f"{kind}: energy per singular direction, %")
            axis.decorate(here, theme)
        _legend(drawn, axes[0])
        return png(drawn)


def describe_spectrum(document: Document) -> str:
    """Range of the strongest direction's share."""
    parts = [
        f"{kind}: the strongest direction holds {_range([e['spectrum'][0] for e in in_layers(document, kind)])}"
        for kind in kinds_of(document)
    ]
    even = 100 / max(1, len(document["experts"]))
    return f"Stacked bars by layer. {'; '.join(parts)} (experts that agree: 100 %, none like another: {even:.0f} %)."


# Distances -----------------------------------------------------------------------------------------------------------


def _closest(entry: dict[str, Any]) -> int:
    values = entry["distances"]
    return min(range(len(values)), key=values.__getitem__)


def draw_closest(document: Document, theme: Theme) -> bytes:
    """Distance of the merge to the base and to every expert, per layer and kind; a strip tells which is closest."""
    kinds, axis = kinds_of(document), LayerAxis.of(in_layers(document))
    with figure(theme, 1, len(kinds), height=3.2) as (drawn, axes):
        for here, kind in zip(axes, kinds, strict=True):
            entries = in_layers(document, kind)
            _line(
                here,
                axis,
                entries,
                lambda e: 100 * e["distances"][0],
                "base",
                color=theme.base,
                linewidth=2,
                linestyle="--",
            )
            for index, expert in enumerate(document["experts"]):
                _line(here, axis, entries, lambda e, i=index: 100 * e["distances"][i + 1], expert, **theme.line(index))
            values = [100 * value for e in entries for value in e["distances"]]
            span = max(values) - min(values) or max(values) or 1.0
            colours = [theme.base, *(theme.expert(i) for i in range(len(document["experts"])))]
            for entry in entries:
                place, colour = axis.place(entry), colours[_closest(entry)]
                # Below the lines, in parts of the axes' height.
                here.bar(place, 0.06, bottom=0.01, width=0.95, color=colour, transform=here.get_xaxis_transform())
            here.set_ylim(max(0.0, min(values) - 0.2 * span), max(values) + 0.08 * span)
            here.set_title(f"{kind}: distance of the merge, % of base norm")
            axis.decorate(here, theme)
        _legend(drawn, axes[0])
        return png(drawn)


def describe_closest(document: Document) -> str:
    """How often the merge is closest to what."""
    names = ["the base", *document["experts"]]
    parts = []
    for kind in kinds_of(document):
        entries = in_layers(document, kind)
        counts = [sum(_closest(e) == i for e in entries) for i in range(len(names))]
        told = ", ".join(f"{name} in {count}" for name, count in zip(names, counts, strict=True) if count)
        parts.append(f"{kind}: of {len(entries)} layers the merge is closest to {told}")
    return "Line charts by layer. " + "; ".join(parts) + "."
