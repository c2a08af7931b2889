"""On paper: what a merge of 70 or 405 billion parameters takes, from its own plan and from rows that were measured.

`scale.py --plan 70b --rows rows.json` prints it. Bytes and memory are those of the plan that `merge --dry-run` makes of
checkpoints of these shapes, which are headers without data here. Times are of processors like those of the rows, as no
GPU was at hand: the processor time of the largest measured model, for each entry of each expert; and the bytes at the
slowest disk's speed of these rows, of which each host is taken to have one for itself, and which a GPU does not change.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from scale import METHODS, Row, configuration, planned
from scale_models import SHAPES, write_hollow

EXPERTS, PROCESSES = 8, 8
HOSTS = (1, 4)
# What starting takes of a processor, in seconds: interpreter, packages, plan.
_START = 4.0

#: Multiplications and additions for each entry of the model, by t experts, as the methods are written. `ties` compares
#: rather than multiplies. `neuro_merging` forms all inner products of t updates and the base, and one combination of
#: them. `neuron_response` multiplies every update with, and every answer by, 512 rows that stand for its inputs.
FLOPS: dict[str, Callable[[int], float]] = {
    "linear": lambda t: 2 * t,
    "ties": lambda t: 6 * t,
    "neuro_merging": lambda t: 2 * (t + 1) ** 2 + 2 * (t + 1) + t,
    "neuron_response": lambda t: 4 * 512 * t,
}


def plan_table(size: str, rows: list[Row]) -> str:
    """Show, for every method, what a merge of eight experts takes on one host and on four, eight processes on each.

    Args:
        size: `70b` or `405b`.
        rows: measured ones; of a method without any no time is told.
    """
    lines = [
        f"| {size}, {EXPERTS} experts | read | written | operations | memory of a process, mapped files | "
        + " | ".join(f"{hosts} host{'s' * (hosts > 1)}: processors, disks" for hosts in HOSTS)
        + " |",
        "|" + "---|" * (5 + len(HOSTS)),
    ]
    shape = SHAPES[size]
    found = [row for method in METHODS if (row := _largest(rows, method)) is not None]
    read_speed = min((row.read_speed for row in found), default=1.0)
    write_speed = min((row.write_speed for row in found), default=1.0)
    with tempfile.TemporaryDirectory(prefix="neuron-plan-") as folder:
        base, experts = write_hollow(Path(folder), shape, EXPERTS)
        for method in METHODS:
            config = Path(folder) / f"{method}.yml"
            config.write_text(configuration(method, base, experts))
            plan = planned(config)
            measured = _largest(rows, method)
            disks = plan.bytes_to_read / read_speed + plan.bytes_to_write / write_speed if measured else 0.0
            times = [_times(measured, shape.parameters, disks, hosts) for hosts in HOSTS]
            lines.append(
                f"| `{method}` | {plan.bytes_to_read / 1e12:.2f} TB | {plan.bytes_to_write / 1e12:.2f} TB | "
                f"{shape.parameters * FLOPS[method](EXPERTS):.1e} | {plan.memory.of_process / 1e9:.1f} GB, "
                f"{plan.mapped_bytes / 1e9:.1f} GB | " + " | ".join(times) + " |"
            )
    return "\n".join(lines)


def _largest(rows: list[Row], method: str) -> Row | None:
    alike = ("full", 1, "cpu")
    found = [row for row in rows if row.method == method and (row.kind, row.processes, row.device) == alike]
    return max(found, key=lambda row: SHAPES[row.size].parameters, default=None)


def _times(row: Row | None, parameters: int, disks: float, hosts: int) -> str:
    if row is None:
        return "not measured"
    of_entry = max(row.cpu_seconds - _START, 0) / (SHAPES[row.size].parameters * row.experts)
    processors = of_entry * parameters * EXPERTS / (hosts * PROCESSES)
    return f"{processors / 60:.0f} min, {disks / hosts / 60:.0f} min"
