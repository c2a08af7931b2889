"""Figures of what one method alone knows: trim thresholds, selected neurons, functional groups."""

from __future__ import annotations

from typing import Any

from neuron_methods.sharing.report.drawing import Document, FigureSpec, LayerAxis, Theme, figure, png, stacked_bars


def draw_trim(document: Document, theme: Theme) -> bytes:
    """Draw trim threshold and σ of every expert (NeuroMerging)."""
    trim = document["trim"]
    places = range(len(trim["experts"]))
    colours = [theme.expert(i) for i in places]
    with figure(theme, 1, 2, height=max(1.6, 0.9 + 0.35 * len(places))) as (drawn, (left, right)):
        per_tensor = any(value is None for value in trim["threshold"])
        thresholds = [0.0 if value is None else value for value in trim["threshold"]]
        for axes, values, title, shown in (
            (left, thresholds, "trim threshold, magnitude", lambda v: "per tensor" if per_tensor else f"{v:.3g}"),
            (right, trim["sigma"], "σ: share of the update trimmed away", lambda v: f"{100 * v:.1f} %"),
        ):
            axes.barh(places, values, color=colours, height=0.6)
            axes.set_yticks(places, trim["experts"])
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            axes.set_xlim(0, 1.2 * max([*values, 1e-30]))
            axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 3))
            for place, value in zip(places, values, strict=True):
                axes.text(value, place, f" {shown(value)}", va="center")
            axes.set_title(title)
        return png(drawn)


def describe_trim(document: Document) -> str:
    """Tell thresholds, σ and the automatic λ₂."""
    trim = document["trim"]
    told = [
        f"{expert} threshold {'per tensor' if threshold is None else f'{threshold:.3g}'}, σ {sigma:.3f}"
        for expert, threshold, sigma in zip(trim["experts"], trim["threshold"], trim["sigma"], strict=True)
    ]
    return f"Bars. {'; '.join(told)}. Automatic λ₂ = 1 / (1 − largest σ) = {trim['lambda']:.3f}."


def draw_selection(document: Document, theme: Theme) -> bytes:
    """Draw which experts get the MLP neurons of every layer (MIN-Merging)."""
    selection = document["selection"]
    parts = [
        *((f"{e} alone", theme.expert(i), lambda x, i=i: x["alone"][i]) for i, e in enumerate(selection["experts"])),
        ("several, shared out", theme.base, lambda x: x["shared"]),
        ("nobody: the base's", theme.faint, lambda x: x["nobody"]),
    ]
    return _stacked_layers(selection["layers"], parts, "who gets the MLP neurons, %", theme)


def describe_selection(document: Document) -> str:
    """Tell how many neurons every expert keeps."""
    selection = document["selection"]
    kept = ", ".join(f"{e} {v['kept']} of {v['of']}" for e, v in selection["kept"].items())
    shared = [layer["shared"] for layer in selection["layers"]] or [0.0]
    return (
        f"Stacked bars by layer. MLP neurons kept: {kept}. Wanted by several experts: "
        f"{100 * min(shared):.0f} to {100 * max(shared):.0f} % of a layer's neurons."
    )


def draw_groups(document: Document, theme: Theme) -> bytes:
    """Draw the functional groups of every layer's MLP neurons (NeuronMerge)."""
    groups = document["groups"]
    parts = []
    for index, name in enumerate(groups["groups"]):
        colour = theme.faint if name == "general" else theme.expert(index - 1)
        parts.append((name, colour, lambda x, i=index: x["counts"][i] / max(1, sum(x["counts"]))))
    # The large general group on top, so that the others start from one line.
    return _stacked_layers(groups["layers"], [*parts[1:], parts[0]], "functional groups of MLP neurons, %", theme)


def describe_groups(document: Document) -> str:
    """Tell the size of every group over the model."""
    groups = document["groups"]
    totals = [sum(layer["counts"][i] for layer in groups["layers"]) for i in range(len(groups["groups"]))]
    told = ", ".join(
        f"{n} {t} ({100 * t / max(1, sum(totals)):.0f} %)" for n, t in zip(groups["groups"], totals, strict=True)
    )
    return f"Stacked bars by layer. Neurons over the model: {told}."


def _stacked_layers(
    entries: list[dict[str, Any]], parts: list[tuple[str, str, Any]], title: str, theme: Theme
) -> bytes:
    with figure(theme, height=3.0) as (drawn, (axes,)):
        stacked_bars(axes, LayerAxis.of(entries), entries, parts, theme)
        axes.set_title(title)
        drawn.legend(loc="outside right upper", reverse=True)
        return png(drawn)


METHOD_FIGURES = (
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
