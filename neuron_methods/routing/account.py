"""What `mergekit-neuron route` tells: the plan, the trace of every enhancement, and the router's figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from neuron_methods.routing.enhancement import Enhanced, Step
from neuron_methods.routing.route_yaml import RouteConfig, RouterSettings
from neuron_methods.routing.router_training import RouterReport
from neuron_methods.support.text import columns, listed


def _table(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"  {line}" for line in columns(rows))


def describe_enhancement(enhanced: Enhanced) -> str:
    """Describe every step with its loss, and what is left."""
    rows = [("step", "importance", "loss", "outcome")]
    rows += [_describe_step(step) for step in enhanced.trace]
    layers = len(enhanced.core) + len(enhanced.redundant)
    told = (
        f"{enhanced.expert}: {len(enhanced.core)} of {layers} layers are core, density {enhanced.density:g} "
        f"({enhanced.samples} calibration samples)\n{_table(rows)}"
    )
    if (held := enhanced.held_out) is None:
        return told
    return (
        f"{told}\n  on {held.samples} other samples: loss {held.original:.4f} before, {held.enhanced:.4f} after, by "
        f"{held.enhanced - held.original:+.4f} ({held.low:+.4f} to {held.high:+.4f}): {held.verdict}"
    )


def _describe_step(step: Step) -> tuple[str, str, str, str]:
    what = {"drop": f"drop {step.layer}", "density": f"density {step.density}"}.get(step.what, step.what)
    if step.what == "enhanced":
        what = f"enhanced, density {step.density:g}"
    importance = "" if step.importance is None else f"{step.importance:.4g}"
    tried = step.what in ("drop", "density")
    outcome = "refused"
    if step.kept:
        outcome = "kept" if step.what == "density" else "redundant"
    elif step.passed:
        outcome = "given back"
    return what, importance, f"{step.loss:.4f}", outcome if tried else ""


def describe_router(report: RouterReport, names: Iterable[str], settings: RouterSettings, threshold: float) -> str:
    """Describe accuracy by expert and what passes the threshold."""
    rows = [("expert", "held-out accuracy")]
    rows += [(name, f"{accuracy:.1%}") for name, accuracy in zip(names, report.accuracies, strict=True)]
    rows.append(("all", f"{report.accuracy:.1%}"))
    return (
        f"router: {report.training} training inputs, {report.epochs} epochs; {report.held_out} held-out inputs\n"
        f"{_table(rows)}\n"
        f"  out of domain: {settings.ood_score} below {threshold:.4g}; {report.in_domain:.1%} of the held-out inputs "
        f"pass ({100 * settings.in_domain_share:g}% asked for)"
    )


def describe_plan(
    config: RouteConfig,
    layers: Sequence[str],
    counts: Sequence[tuple[int, int]],
    behind: Sequence[int],
    labels: Mapping[str, Sequence[str]],
) -> str:
    """Describe what a run is going to do; `labels` are those of the experts' own heads."""
    rows = [("expert", "training", "calibration")]
    rows += [(e.name, str(train), str(held)) for e, (train, held) in zip(config.experts, counts, strict=True)]
    enhancement = config.enhancement
    first = (
        f"enhancement: {enhancement.select} by {enhancement.importance} over {len(layers)} layers, "
        f"tolerance {enhancement.tolerance:g}, patience {enhancement.patience}, density {enhancement.density:g}, "
        f"{enhancement.samples} samples"
        if enhancement.enabled
        else "enhancement: off"
    )
    router = config.router
    read = ", ".join(map(str, behind))
    return "\n".join(
        (
            f"base: {config.base_model}",
            _table(rows),
            *(f"head of {name}: {_describe_labels(of_head)}" for name, of_head in labels.items()),
            first,
            f"router: {router.pooling} of the hidden states behind {read} layers, {router.hidden} "
            f"hidden units, top {router.top_k}, {router.ood_score} for {100 * router.in_domain_share:g}% in domain",
            f"merging: redundant layers from {config.merging.redundant}, of what is dropped {config.merging.dropped}",
        )
    )


def _describe_labels(labels: Sequence[str]) -> str:
    if labels[0] == "LABEL_0":
        return f"{len(labels)} classes without names (head_labels would name them)"
    return f"{len(labels)} labels: {listed(labels, 10)}"
