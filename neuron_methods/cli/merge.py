"""`mergekit-neuron merge`: any mergekit configuration, checked before, verified after, complete or absent."""

from __future__ import annotations

from pathlib import Path

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from neuron_methods.cli.common import debug_option
from neuron_methods.errors import UserError

EPILOG = """\b
Examples:
  mergekit-neuron merge merge.yaml ./merged --dry-run
  mergekit-neuron merge merge.yaml ./merged --device auto --profile-out thresholds.json
  mergekit-neuron merge merge.yaml ./merged --force --out-shard-size 1B

\b
neuro_merging measures one trim threshold per expert over the whole model first.
A file of --profile-out spares that pass in a later merge of the same models:
  parameters: {profile: thresholds.json}
"""


@click.command("merge", cls=PrettyPrintHelp, epilog=EPILOG)
@click.argument("config", type=click.Path(dir_okay=False))
@click.argument("out", type=click.Path())
@click.option("--force", is_flag=True, help="Replace OUT if it exists, once the new output is verified.")
@click.option("--dry-run", is_flag=True, help="Print the plan and what parameters resolve to; write nothing.")
@click.option("--profile-out", type=click.Path(dir_okay=False), help="Write trim thresholds and sigma to this JSON.")
@click.option("--allow-nonfinite", is_flag=True, help="Go on where an input holds NaN or Inf.")
@add_merge_options
@debug_option
def merge(
    merge_options: MergeOptions,
    config: str,
    out: str,
    force: bool,
    dry_run: bool,
    profile_out: str | None,
    allow_nonfinite: bool,
) -> None:
    """Merge models as the mergekit YAML in CONFIG says; the result is in OUT, complete, or not there at all.

    Every method of mergekit works, and the methods of this package: neuro_merging. Inputs are checked before
    anything is merged; the output is written beside OUT, verified (every tensor of the base, same shapes, finite) and
    moved into place.
    """
    from neuron_methods.plugin.describe import describe_plan
    from neuron_methods.plugin.device import resolve_device
    from neuron_methods.plugin.merging import merge_to_directory, plan_merge

    merge_options.apply_global_options()
    device = resolve_device(click.get_current_context().params["device"] or merge_options.device or "cpu")
    options = merge_options.model_copy(update={"device": device})
    try:
        source = Path(config).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{config}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if dry_run:
        click.echo(describe_plan(plan_merge(source, options=options, config_name=config)))
        return
    summary = merge_to_directory(
        source,
        out,
        options=options,
        force=force,
        progress=not merge_options.quiet,
        allow_nonfinite=allow_nonfinite,
        profile_out=profile_out,
        config_name=config,
    )
    click.echo(str(summary))
