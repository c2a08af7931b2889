"""The plan of a merge in words: what `--dry-run` prints."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from neuron_methods.plugin.preflight import MergePlan
from neuron_methods.support.memory import free_memory
from neuron_methods.support.text import format_bytes

# First match decides; names are those of the checkpoints of the Llama, T5, ViT and CLIP families and their like.
_KINDS = (
    ("norms", r"norm|layrnorm|ln_|\.ln\d?\."),
    ("biases", r"bias$"),
    ("heads", r"lm_head|classifier|^score|text_projection|visual_projection|logit_scale"),
    ("embeddings", r"embed|shared\.weight|wte|wpe|cls_token|distillation_token|relative_attention_bias"),
    ("attention", r"attn|attention"),
    ("MLP", r"mlp|dense|fc\d|feed_forward|intermediate|output|experts|ffn"),
)


def tensor_kind(name: str) -> str:
    """Name the kind of a tensor, by its name: norms, biases, heads, embeddings, attention, MLP or other."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def describe_plan(plan: MergePlan) -> str:
    """Tell what a merge would do.

    Args:
        plan: from `neuron_methods.plugin.merging.plan_merge`.

    Returns:
        Lines of text: tensors by kind, what the parameters resolve to for each (once, where they are the same for
        all), bytes and memory.
    """
    carried = set(plan.carried)
    kinds: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
    for weight, inputs, size in plan.tensors:
        if size or inputs:
            entries = next(iter(inputs.values())).entries
            kind = "copied from the base" if weight.name in carried else tensor_kind(weight.name)
            kinds[kind].append((weight.name, entries, size))
    models = list(dict.fromkeys(model for _, inputs, _ in plan.tensors for model in inputs))
    experts = [model for model in models if model != plan.base]
    base = f" on base {plan.base}" if plan.base else ""
    lines = [f"{plan.method} of {_count(len(experts), 'model')}{base}: {', '.join(map(str, experts))}"]
    resolved = {kind: _resolved(plan, [t[0] for t in tensors]) for kind, tensors in kinds.items()}
    alike = len({tuple(r) for r in resolved.values() if r}) == 1
    for kind, tensors in kinds.items():
        entries, size = sum(t[1] for t in tensors), sum(t[2] for t in tensors)
        lines.append(
            f"  {kind}: {_count(len(tensors), 'tensor')}, {entries:,} parameters, {format_bytes(size)} to write"
        )
        if not alike:
            lines += [f"    {line}" for line in resolved[kind]]
    total = sum(t[1] for tensors in kinds.values() for t in tensors)
    lines.append(f"  in all: {_count(sum(map(len, kinds.values())), 'tensor')}, {total:,} parameters")
    if alike:
        lines.append("  parameters, for all kinds:")
        lines += [f"    {line}" for line in next(r for r in resolved.values() if r)]
    passes = "two passes: measure, merge" if plan.measures else "one pass"
    memory, free = f"at most about {format_bytes(plan.peak_memory)}", free_memory()
    lines += [
        f"  to read: {format_bytes(plan.bytes_to_read)} ({passes})",
        f"  to write: {format_bytes(plan.bytes_to_write)}",
        f"  peak memory: {memory}, of which {format_bytes(plan.mapped_bytes)} are input files that the system may drop "
        f"and {format_bytes(plan.memory.of_process - plan.memory.peak)} the program",
        f"  memory to take: {format_bytes(plan.memory.peak)}" + (f", {format_bytes(free)} are free" if free else ""),
    ]
    lines += [f"  {note}" for note in plan.notes]
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _resolved(plan: MergePlan, names: list[str]) -> list[str]:
    shared: dict[str, list[Any]] = defaultdict(list)
    per_model: dict[Any, dict[str, list[Any]]] = {}
    for name in names:
        if name not in plan.parameters:
            continue
        own, models = plan.parameters[name]
        for key, value in own.items():
            shared[key].append(value)
        for model, values in models.items():
            target = per_model.setdefault(model, defaultdict(list))
            for key, value in values.items():
                target[key].append(value)
    lines = [_assignments(shared)] if shared else []
    return lines + [f"{model}: {_assignments(values)}" for model, values in per_model.items() if values]


def _assignments(parameters: dict[str, list[Any]]) -> str:
    return ", ".join(f"{key}={_span(values)}" for key, values in parameters.items() if _span(values) != "")


def _span(values: list[Any]) -> str:
    distinct = list(dict.fromkeys(values))
    if distinct == [None]:
        return ""  # not given: an inner method's own default holds
    if len(distinct) == 1:
        return f"{distinct[0]:g}" if isinstance(distinct[0], float) else str(distinct[0])
    if all(isinstance(v, (int, float)) for v in distinct):
        return f"{min(distinct):g} to {max(distinct):g}"
    return " or ".join(map(str, distinct))
