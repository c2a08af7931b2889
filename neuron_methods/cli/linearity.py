"""`mergekit-neuron linearity`: how linearly the outputs of a merge's MLPs follow its weights."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from neuron_methods.cli.common import FILE, SEED, Count, debug_option, no_bars_option, say

EPILOG = """\b
Examples:
  mergekit-neuron linearity merge.yaml
  mergekit-neuron linearity merge.yaml --data math=math.jsonl:question --data code=code.txt -o linearity.json

\b
SOURCE is as in `mergekit-neuron profile --help`.
"""


@click.command("linearity", epilog=EPILOG)
@click.argument("config", type=FILE)
@click.option("--data", multiple=True, metavar="NAME=SOURCE", help="What the base reads; noise without. Repeatable.")
@click.option("--samples", type=Count(), default=16, show_default=True, help="Of each source.")
@click.option("--tokens", type=Count(), default=512, show_default=True, help="Inputs per layer.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of noise and of the order of samples.")
@click.option("-o", "--output", type=FILE, metavar="FILE", help="Write JSON, too.")
@click.option("--force", is_flag=True, help="Replace the figures in FILE.")
@no_bars_option
@debug_option
def linearity(config: Path, data: tuple[str, ...], output: Path | None, force: bool, **settings: Any) -> None:
    """Measure, per layer, how far the change of the MLP's output is from linear in the change of its weights.

    For every expert of the mergekit YAML in CONFIG, for plain task arithmetic, for the merge that CONFIG asks for
    (neuron_merge groups neurons by function), and for task arithmetic scaled to the size of that merge's update. The
    error is that of interpolating outputs between the base and the updated model, relative to how far these differ.
    """
    from neuron_methods.plugin.updates import plan_updates
    from neuron_methods.profiling.linearity import IS_LINEARITY, data_files, measure_linearity
    from neuron_methods.support.documents import read_text
    from neuron_methods.support.runs import claimed
    from neuron_methods.support.targets import check_file

    updates = plan_updates(read_text(config), str(config))
    place = output
    if output is not None:
        place = check_file(output, f"-o {output}", IS_LINEARITY, force, [*updates.inputs, *data_files(data)])
    with nullcontext() if place is None else claimed(place, f"-o {output}"):
        report = measure_linearity(updates, data, **settings)
        if place is not None:
            report.write(place)
    say("\n".join(report.lines()))
