"""The figures of every report: each takes the report's JSON and a theme, and comes with a text that tells the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

from neuron_methods.sharing.report.drawing import Document, FigureSpec, LayerAxis, Theme, figure, png, stacked_bars

Entries = Sequence[dict[str, Any]]
# Kinds of weights that layers are made of, in the order they are shown.
KINDS = ("attention", "MLP", "other")


def _in_layers(document: Document) -> list[dict[str, Any]]:
    return [entry for entry in document["places"] if entry["layer"] is not None]


def _by_kind(document: Document) -> list[tuple[str, list[dict[str, Any]]]]:
    """The kinds of weights that the layers have, each with its entries."""
    found = [(kind, [entry for entry in _in_layers(document) if entry["kind"] == kind]) for kind in KINDS]
    return [(kind, entries) for kind, entries in found if entries]


def _has_layers(document: Document) -> bool:
    return bool(_in_layers(document))


def _has_pairs(document: Document) -> bool:
    return _has_layers(document) and len(document["experts"]) > 1


def _pairs(document: Document) -> list[tuple[int, int]]:
    return list(combinations(range(len(document["experts"])), 2))


def _segments(axis: LayerAxis, entries: Entries) -> Iterator[list[dict[str, Any]]]:
    """Entries stack by stack, so that no line runs from one stack to the next."""
    for stack in dict.fromkeys(stack for stack, _ in axis.layers):
        yield [entry for entry in entries if entry["stack"] == stack]


def _line(
    axes: Any, axis: LayerAxis, entries: Entries, value: Callable[[dict[str, Any]], float], label: str, **style: Any
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


def _told(document: Document, chart: str, tell: Callable[[Entries], str], between: str = ". ") -> str:
    """What a figure shows of each kind of weights."""
    return f"{chart} by layer. {between.join(f'{kind}: {tell(entries)}' for kind, entries in _by_kind(document))}."


# Update energy -------------------------------------------------------------------------------------------------------


def draw_energy(document: Document, theme: Theme) -> bytes:
    """Draw the share of the update that is parallel to the neurons, and its size, per layer and kind."""
    kinds, axis = _by_kind(document), LayerAxis.of(_in_layers(document))
    rows = (("parallel_share", "parallel share of update energy, %"), ("relative_update", "size of update, % of base"))
    with figure(theme, 2, len(kinds), height=2.7) as (drawn, axes):
        panels = [(key, title, kind, entries) for key, title in rows for kind, entries in kinds]
        for here, (key, title, kind, entries) in zip(axes, panels, strict=True):
            for index, expert in enumerate(document["experts"]):
                _line(here, axis, entries, lambda e, k=key, i=index: 100 * e[k][i], expert, **theme.line(index))
            _line(here, axis, entries, lambda e, k=key: 100 * e[k][-1], "merge", **theme.merge_line)
            axis.decorate(here, theme)
            here.set_ylim(bottom=0)
            here.set_title(f"{kind}: {title}")
        _legend(drawn, axes[0])
        return png(drawn)


def describe_energy(document: Document) -> str:
    """Tell the ranges of the parallel share and of the sizes."""

    def tell(entries: Entries) -> str:
        experts, sizes = ([v for e in entries for v in e[key][:-1]] for key in ("parallel_share", "relative_update"))
        merge, size = ([e[key][-1] for e in entries] for key in ("parallel_share", "relative_update"))
        return (
            f"parallel share of the experts' update energy {_range(experts, 2)}, of the merge's {_range(merge, 2)}, "
            f"the rest is orthogonal; size of the experts' updates {_range(sizes)} of the base's norm, of the merge's "
            f"{_range(size)}"
        )

    return _told(document, "Line charts", tell)


# Agreement -----------------------------------------------------------------------------------------------------------


def draw_agreement(document: Document, theme: Theme) -> bytes:
    """Draw cosines between experts, and neurons in conflict before and after the merge, per layer and kind."""
    kinds, axis, pairs = _by_kind(document), LayerAxis.of(_in_layers(document)), _pairs(document)
    before = {"color": theme.expert(3), "marker": "s", "markersize": 3.5, "linestyle": "--"}
    with figure(theme, 2, len(kinds), height=2.7) as (drawn, axes):
        for here, below, (kind, entries) in zip(axes, axes[len(kinds) :], kinds, strict=False):
            if len(pairs) > 6:
                _band(here, axis, entries, pairs, theme)
            for index, (a, b) in enumerate(pairs if len(pairs) <= 6 else ()):
                label = f"{document['experts'][a]} · {document['experts'][b]}"
                _line(here, axis, entries, lambda e, a=a, b=b: e["cosines"][a][b], label, **theme.line(index))
            here.axhline(0, color=theme.base, linewidth=1)
            here.set_title(f"{kind}: cosine of task vectors")
            axis.decorate(here, theme)
            label = "before: two experts oppose each other"
            _line(below, axis, entries, lambda e: 100 * e["conflict_before"], label, **before)
            label = "after: merge goes against an expert"
            _line(below, axis, entries, lambda e: 100 * e["conflict_after"], label, **theme.merge_line)
            below.set_ylim(0, 100)
            below.set_title(f"{kind}: neurons with sign conflict, %")
            axis.decorate(below, theme)
        axes[0].legend(loc="best", fontsize=7.5)
        axes[len(kinds)].legend(loc="best", fontsize=7.5)
        return png(drawn)


def _band(axes: Any, axis: LayerAxis, entries: Entries, pairs: Sequence[tuple[int, int]], theme: Theme) -> None:
    """Mean and span over all pairs, where there are too many for lines of their own."""
    for number, part in enumerate(_segments(axis, entries)):
        values = [[e["cosines"][a][b] for a, b in pairs] for e in part]
        places = [axis.place(e) for e in part]
        axes.fill_between(places, [min(v) for v in values], [max(v) for v in values], color=theme.expert(0), alpha=0.25)
        label = f"mean of {len(pairs)} pairs, band: smallest to largest" if not number else "_nolegend_"
        axes.plot(places, [sum(v) / len(v) for v in values], label=label, **theme.line(0))


def describe_agreement(document: Document) -> str:
    """Tell the ranges of cosines and conflicts."""

    def tell(entries: Entries) -> str:
        values = [e["cosines"][a][b] for e in entries for a, b in _pairs(document)]
        return (
            f"cosine between the experts' task vectors {_range(values, 2, percent=False)}; neurons on which two "
            f"experts oppose each other {_range([e['conflict_before'] for e in entries])}, on which the merge goes "
            f"against an expert {_range([e['conflict_after'] for e in entries])}"
        )

    return _told(document, "Line charts", tell)


# Important neurons ---------------------------------------------------------------------------------------------------


def draw_important(document: Document, theme: Theme) -> bytes:
    """Draw the share of each expert's important neurons that the merge keeps, and how far the experts' sets overlap."""
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
        _matrix(right, important["overlap"], experts)
        right.set_title("overlap of important neurons, %")
        return png(drawn)


def _matrix(axes: Any, values: Sequence[Sequence[float]], labels: Sequence[str]) -> None:
    shown = [[100 * value for value in row] for row in values]
    axes.imshow(shown, cmap="cividis", vmin=0, vmax=100)
    axes.grid(False)
    slant = {"rotation": 30, "ha": "right"} if len(labels) > 3 else {"rotation": 0, "ha": "center"}
    axes.set_xticks(range(len(labels)), labels, **slant)
    axes.set_yticks(range(len(labels)), labels)
    for i, row in enumerate(shown):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="black" if value > 55 else "white")


def describe_important(document: Document) -> str:
    """Tell what is kept of each expert, and the overlaps."""
    important, experts = document["important"], document["experts"]
    kept = ", ".join(f"{e} {100 * k:.0f} %" for e, k in zip(experts, important["kept"], strict=True))
    overlaps = ", ".join(
        f"{experts[a]} and {experts[b]} {100 * important['overlap'][a][b]:.0f} %" for a, b in _pairs(document)
    )
    return f"Line chart by layer and a matrix. Important neurons kept over the model: {kept}. Overlap: {overlaps}."


# Responses -----------------------------------------------------------------------------------------------------------


def draw_responses(document: Document, theme: Theme) -> bytes:
    """Draw the share of every expert's response that the merge keeps, per layer and kind."""
    kinds, axis = _by_kind(document), LayerAxis.of(_in_layers(document))
    with figure(theme, 1, len(kinds), height=3.0) as (drawn, axes):
        for here, (kind, entries) in zip(axes, kinds, strict=True):
            for index, expert in enumerate(document["experts"]):
                _line(here, axis, entries, lambda e, i=index: 100 * e["response_kept"][i], expert, **theme.line(index))
            here.axhline(0, color=theme.base, linewidth=1)
            here.set_title(f"{kind}: response kept, %")
            axis.decorate(here, theme)
        _legend(drawn, axes[0])
        return png(drawn)


def describe_responses(document: Document) -> str:
    """Tell what is kept of every expert's response over the model, and the ranges."""
    means = ", ".join(
        f"{e} {100 * k:.0f} %" for e, k in zip(document["experts"], document["response_kept"], strict=True)
    )
    told = _told(document, "Line charts", lambda es: _range([v for e in es for v in e["response_kept"]], 0), "; ")
    return f"{told} Means over the model: {means}."


# Spectrum ------------------------------------------------------------------------------------------------------------


def draw_spectrum(document: Document, theme: Theme) -> bytes:
    """Draw the mean share of each singular direction in the energy of the neurons' orthogonal parts."""
    kinds, axis = _by_kind(document), LayerAxis.of(_in_layers(document))
    parts = [
        (f"direction {i + 1}", theme.expert(i), lambda e, i=i: e["spectrum"][i])
        for i in range(len(document["experts"]))
    ]
    with figure(theme, 1, len(kinds), height=3.0) as (drawn, axes):
        for here, (kind, entries) in zip(axes, kinds, strict=True):
            stacked_bars(here, axis, entries, parts, theme)
            here.set_title(f"{kind}: energy per singular direction, %")
        _legend(drawn, axes[0])
        return png(drawn)


def describe_spectrum(document: Document) -> str:
    """Tell the range of the strongest direction's share."""
    even = 100 / max(1, len(document["experts"]))
    told = _told(
        document,
        "Stacked bars",
        lambda es: f"the strongest direction holds {_range([e['spectrum'][0] for e in es])}",
        "; ",
    )
    return f"{told[:-1]} (experts that agree: 100 %, none like another: {even:.0f} %)."


# Distances -----------------------------------------------------------------------------------------------------------


def _closest(entry: dict[str, Any]) -> int:
    values = entry["distances"]
    return min(range(len(values)), key=values.__getitem__)


def draw_closest(document: Document, theme: Theme) -> bytes:
    """Draw the distance of the merge to the base and to every expert; a strip tells which is closest."""
    kinds, axis = _by_kind(document), LayerAxis.of(_in_layers(document))
    colours = [theme.base, *(theme.expert(i) for i in range(len(document["experts"])))]
    base = {"color": theme.base, "linewidth": 2, "linestyle": "--"}
    with figure(theme, 1, len(kinds), height=3.2) as (drawn, axes):
        for here, (kind, entries) in zip(axes, kinds, strict=True):
            _line(here, axis, entries, lambda e: 100 * e["distances"][0], "base", **base)
            for index, expert in enumerate(document["experts"]):
                _line(here, axis, entries, lambda e, i=index: 100 * e["distances"][i + 1], expert, **theme.line(index))
            values = [100 * value for e in entries for value in e["distances"]]
            span = max(values) - min(values) or max(values) or 1.0
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
    """Tell how often the merge is closest to what."""
    names = ["the base", *document["experts"]]

    def tell(entries: Entries) -> str:
        closest = [_closest(entry) for entry in entries]
        told = ", ".join(f"{name} in {closest.count(i)}" for i, name in enumerate(names) if i in closest)
        return f"of {len(entries)} layers the merge is closest to {told}"

    return _told(document, "Line charts", tell, "; ")


MODEL_FIGURES = (
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
        "responses",
        "How much of every expert's response is kept",
        "How far the merged weights answer an expert's inputs as the expert does: 100 % as the expert, 0 as the base, "
        "below that further away than the base. The rows of its own update stand for its inputs. It tells where "
        "an expert is lost; it does not foretell the merge's score.",
        draw_responses,
        describe_responses,
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
)
