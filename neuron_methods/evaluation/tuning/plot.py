"""A figure of a search: score over each parameter, per task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from neuron_methods.evaluation.tuning.recipe import is_number
from neuron_methods.evaluation.tuning.search import Parameter
from neuron_methods.evaluation.tuning.trace import Trial


def can_plot() -> bool:
    """Tell whether matplotlib is there."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def plot_search(
    trials: Sequence[Trial],
    objectives: Sequence[float],
    parameters: Sequence[Parameter],
    objective_name: str,
    output: Path,
) -> None:
    """Draw one panel per parameter, to a PNG.

    A task's line goes through the scores of the best point (by objective) at each value of the parameter; dots are all
    points.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(3 + 4.5 * len(parameters), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(parameters), sharey=True, squeeze=False)[0]
    tasks = list(trials[0].scores)
    best = max(range(len(trials)), key=objectives.__getitem__)
    for axis, parameter in zip(axes, parameters, strict=True):
        values = [trial.point[parameter.name] for trial in trials]
        words = [value for value in dict.fromkeys(values) if not is_number(value)]
        numbers = sorted({float(value) for value in values if is_number(value)})
        step = (numbers[-1] - numbers[0]) / max(len(numbers) - 1, 1) if numbers else 1.0
        # Words stand to the right of the numbers.
        places = {word: (numbers[-1] if numbers else 0.0) + (i + 1) * (step or 1.0) for i, word in enumerate(words)}
        xs = [float(value) if is_number(value) else places[value] for value in values]
        leading: dict[float, int] = {}
        for index, x in enumerate(xs):
            if x not in leading or objectives[index] > objectives[leading[x]]:
                leading[x] = index
        for task in tasks:
            (line,) = axis.plot(
                sorted(leading),
                [trials[leading[x]].scores[task] for x in sorted(leading)],
                marker="o",
                markersize=3,
                linewidth=1.2,
                label=task,
            )
            axis.scatter(xs, [t.scores[task] for t in trials], s=5, alpha=0.25, color=line.get_color())
        axis.plot(
            sorted(leading),
            [objectives[leading[x]] for x in sorted(leading)],
            color="black",
            linewidth=2,
            label=f"objective ({objective_name})",
        )
        axis.axvline(xs[best], color="gray", linestyle=":", linewidth=1)
        if words:
            ticks = [*numbers[:: max(1, len(numbers) // 6)], *places.values()]
            axis.set_xticks(ticks, [*(f"{x:g}" for x in numbers[:: max(1, len(numbers) // 6)]), *map(str, words)])
        axis.set_xlabel(parameter.name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("score on validation data")
    figure.legend(*axes[-1].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a `$` in a name begins no formula
    figure.savefig(output, dpi=120, format="png")
