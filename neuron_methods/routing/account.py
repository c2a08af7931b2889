"""What `mergekit-neuron route` tells: the plan, the trace of every enhancement, and the router's figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from neuron_methods.routing.enhancement import Enhanced, Step
from neuron_methods.routing.route_yaml import RouteConfig
from neuron_methods.routing.router_training import RouterReport


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows with columns under each other; all but the first column to the right."""
    rows = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def describe_enhancement(enhanced: Enhanced) -> str:
    """Every step with its loss, and what is left."""
    rows = [("step", "importance", "loss", "outcome")]
    rows += [_describe_step(step) for step in enhanced.trace]
    layers = len(enhanced.core) + len(enhanced.redundant)
    return (
        f"{enhanced.expert}: {len(enhanced.core)} of {layers} layers are core, density {enhanced.density:g} "
        f"({enhanced.samples} calibration samples)\n{table(rows)}"
    )


def _describe_step(step: Step) -> tuple[str, str, str, str]:
    what = {"drop": f"drop {step.layer}", "density": f"density {step.density}"}.get(step.what, step.what)
    if step.what == "enhanced":
        what = f"enhanced, density {step.density:g}"
    importance = "" if step.importance is None else f"{step.importance:.4g}"
    tried = step.what in ("drop", "density")
    outcome = ("kept" if step.what == "density" else "redundant") if step.kept else "refused"
    return what, importance, f"{step.loss:.4f}", outcome if tried else ""


def describe_router(report: RouterReport, names: Sequence[str], ood_score: str, threshold: float, share: float) -> str:
    """Accuracy by expert and what passes the threshold."""
    rows = [("expert", "held-out accuracy")]
    rows += [(name, f"{accuracy:.1%}") for name, accuracy in zip(names, report.accuracies, strict=True)]
    rows.append(("all", f"{report.accuracy:.1%}"))
    return (
        f"router: {report.training} training inputs, {report.epochs} epochs; {report.held_out} held-out inputs\n"
        f"{table(rows)}\n"
        f"  out of domain: {ood_score} below {threshold:.4g}; {report.in_domain:.1%} of the held-out inputs pass "
        f"({100 * share:g}% asked for)"
    )


def describe_plan(
    config: RouteConfig, layers: Sequence[str], counts: Sequence[tuple[int, int]], behind: Sequence[int]
) -> str:
    """What a run is going to do."""
    rows = [("expert", "training", "calibration")]
    rows += [(e.name, str(train), str(held)) for e, (train, held) in zip(config.experts, counts, strict=True)]
    enhancement = config.enhancement
    first = (
        f"enhancement: by {enhancement.importance} over {len(layers)} layers, tolerance {enhancement.tolerance:g}, "
        f"patience {enhancement.patience}, density {enhancement.density:g}, {enhancement.samples} samples"
        if enhancement.enabled
        else "enhancement: off"
    )
    router = config.router
    read = ", ".join(map(str, behind))
    return "\n".join(
        (
            f"base: {config.base_model}",
            table(rows),
            first,
            f"router: {router.pooling} of the hidden states behind {read} layers, {router.hidden} "
            f"hidden units, top {router.top_k}, {router.ood_score} for {100 * router.in_domain_share:g}% in domain",
            f"merging: redundant layers from {config.merging.redundant}",
        )
    )
