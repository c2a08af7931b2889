"""`mergekit-neuron compare`: which method for these models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from neuron_methods.cli.common import FILE, PLACE, Count, debug_option, say
from neuron_methods.cli.evaluate import head_option, task_options

EPILOG = """\b
CONFIG is a mergekit YAML with base_model and models. Compared are it as it is, and on its base and
experts: average, task_arithmetic, ties, neuro_merging, min_merging and neuron_response, at once and
tuned. What the configuration sets per model is of its own row alone.

\b
More methods, any of mergekit's; what has several values is tuned:
  --method dare_ties:density=0.5
  --method "ties:density=0.2,0.4,0.6;lambda=0.5:1.5:0.25"
  --method neuron_response:profile=inputs.safetensors

\b
Every task needs validation data that is not its test data (see mergekit-neuron tune --help): points
and the best method are chosen on validation data, and every method's best point is scored on test
data once. Differences to the best are paired, with their standard errors.

\b
Examples:
  mergekit-neuron compare merge.yaml --task tasks.yml --limit 20 -o first-look
  mergekit-neuron compare merge.yaml --task tasks.yml -o compared
  mergekit-neuron merge compared/best.yml ./merged
  accelerate launch --multi_gpu --num_processes 4 -m neuron_methods compare merge.yaml \\
      --task tasks.yml -o compared

\b
OUT holds best.yml and yamls/ (for mergekit-yaml, too), compare.json, compare.md (a section for the
card), compare.html (the page with the figure), and rows/. Run again to go on: finished rows are kept.
"""


@click.command("compare", epilog=EPILOG)
@click.argument("config", type=FILE)
@task_options
@click.option("-o", "--output", "out", required=True, type=PLACE, metavar="OUT", help="Directory.")
@click.option("--method", "methods", multiple=True, metavar="NAME[:PARAMETER=VALUES]", help="May be repeated.")
@click.option("--no-defaults", is_flag=True, help="Compare CONFIG and what --method names alone.")
@click.option("--budget", type=Count(), default=8, show_default=True, help="Points of each tuned method at most.")
@click.option("--objective", type=click.Choice(["mean", "minimum"]), default="mean", show_default=True)
@head_option
@click.option("--allow-same-split", is_flag=True, help="Let validation data be test data.")
@click.option("--force", is_flag=True, help="Forget the rows in OUT and start anew.")
@debug_option
def compare(
    config: Path,
    tasks: Path,
    out: Path,
    methods: tuple[str, ...],
    only: tuple[str, ...],
    batch_size: int | None,
    allow_code_execution: bool,
    head: str | None,
    no_defaults: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Compare merge methods on the base and experts of CONFIG: tuned alike, scored on test data."""
    from neuron_methods.evaluation.comparing import CompareSettings
    from neuron_methods.evaluation.comparing import compare as compare_methods
    from neuron_methods.evaluation.comparing.outcome import BEST, PAGE, table, write_comparison
    from neuron_methods.evaluation.task_file import choose_tasks, load_tasks
    from neuron_methods.models.team import teamed
    from neuron_methods.plugin.recorded import with_head
    from neuron_methods.support.documents import read_text

    with teamed() as team:
        found = compare_methods(
            with_head(read_text(config), head),
            choose_tasks(load_tasks(tasks), only, batch_size, allow_code_execution),
            out,
            methods,
            CompareSettings(defaults=not no_defaults, progress=not quiet, **settings),
            config_name=str(config),
            say=(lambda line: None) if quiet else say,
        )
        if team.rank:
            return
        notes = write_comparison(found, out)
    say("\n".join([*table(found), *notes, f"written: {out / BEST}, {out / PAGE}"]))
