"""`mergekit-neuron tune`: search parameters of a merge on validation data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from neuron_methods.cli.common import FILE, PLACE, Count, debug_option, say
from neuron_methods.cli.evaluate import head_option, task_options

EPILOG = """\b
--search says what is searched and where:
  lambda_orthogonal=0.5:4:0.25     from, to, step
  lambda_orthogonal=0.5:4          a range, for random and cma
  density=0.1,0.2,0.3              values
  trim=model,tensor                words
  merge_method=ties,neuro_merging  of the top level: merge_method, dtype, out_dtype
  weight@german=0.5:1.5:0.25       one expert's: by its number in models, or a part of its path

\b
Examples:
  mergekit-neuron tune merge.yaml --task tasks.yml --search lambda_orthogonal=0.5:4:0.25 -o tuned
  mergekit-neuron tune merge.yaml --task tasks.yml --search lambda_parallel=-1:1 \\
      --search lambda_orthogonal=0.5:4 --strategy cma --budget 60 --objective relative --test -o tuned
  mergekit-yaml tuned/best.yml ./merged
  accelerate launch --multi_gpu --num_processes 4 -m neuron_methods tune merge.yaml \\
      --task tasks.yml --search lambda=0.5:1.5:0.25 -o tuned

\b
Every task needs validation data that is not its test data:
  data: {source: data/sums, split: test, validation_split: validation}   # a folder or a hub id
  data: {source: sums.jsonl, split: '[:200]', validation_split: '[200:]'}  # rows of a file
  data: {source: test.jsonl, validation_source: dev.jsonl}

\b
Parameters that enter linearly (every lambda; in neuron_merge without a method within groups also
general, in_group, out_group; weights there and in task_arithmetic) cost no merge per point: the
parts are merged once, in float32, held to one more merge, and recombined in memory. Where the merge
turns out not to be linear in them, that is said, and every point is merged.

\b
Of neuron_response, ridge costs no new solve: from three points on that differ in ridge or lambda
alone, each matrix's system is decomposed once, and kept in memory. That takes 4 bytes x (n k + k d +
n d) for a matrix of n x d and k inputs, at most d, and half of what is free for all of them together;
matrices beyond that are solved anew at every point, and that is said.

\b
Merges stay in memory; where they do not fit, that is said, and each is on disk until it is scored.
OUT holds best.yml, trace.jsonl (every point with its scores), tune.json, and scores.png (with the
extra report). Run again to go on: points in the trace are not tried again.
"""


@click.command("tune", epilog=EPILOG)
@click.argument("config", type=FILE)
@task_options
@click.option("--search", multiple=True, required=True, metavar="NAME=RANGE", help="May be repeated.")
@click.option("-o", "--output", "out", required=True, type=PLACE, metavar="OUT", help="Directory.")
@click.option("--strategy", type=click.Choice(["grid", "random", "cma"]), default="grid", show_default=True)
@click.option("--budget", type=Count(), help="Points at most.  [default: the whole grid, else 40]")
@click.option(
    "--objective",
    type=click.Choice(["mean", "relative", "minimum"]),
    default="mean",
    show_default=True,
    help="Over the tasks' scores; relative: mean share of the experts' own.",
)
@head_option
@click.option("--test", is_flag=True, help="Score the best point on test data, once, at the end.")
@click.option("--allow-same-split", is_flag=True, help="Let validation data be test data.")
@click.option("--merge-every-point", is_flag=True, help="Recombine and keep nothing.")
@click.option("--force", is_flag=True, help="Forget the search in OUT and start anew.")
@debug_option
def tune(
    config: Path,
    tasks: Path,
    search: tuple[str, ...],
    out: Path,
    only: tuple[str, ...],
    batch_size: int | None,
    allow_code_execution: bool,
    head: str | None,
    merge_every_point: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Search parameters of the merge in CONFIG for the best scores on the validation data of tasks."""
    from neuron_methods.evaluation.task_file import choose_tasks, load_tasks
    from neuron_methods.evaluation.tuning.study import TuneSettings, report_lines
    from neuron_methods.evaluation.tuning.study import tune as search_best
    from neuron_methods.models.team import teamed
    from neuron_methods.plugin.recorded import with_head
    from neuron_methods.support.documents import read_text

    with teamed() as team:
        chosen = choose_tasks(load_tasks(tasks), only, batch_size, allow_code_execution)
        result = search_best(
            with_head(read_text(config), head),
            chosen,
            search,
            out,
            TuneSettings(shortcut=not merge_every_point, progress=not quiet, **settings),
            config_name=str(config),
            say=say,
        )
        if team.rank:
            return
    metrics = {task.name: task.metric for task in chosen}
    lines = report_lines(result, out, metrics, settings["objective"])
    say("\n".join([*lines, f"written: {out / 'best.yml'}"]))
