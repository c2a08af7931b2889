"""`mergekit-neuron groups`: the functional group of every MLP neuron, for the method neuron_merge."""

from __future__ import annotations

from pathlib import Path

import click

from neuron_methods.cli.common import FILE, Share, debug_option, no_bars_option, say
from neuron_methods.profiling import MIN_FIRING, THRESHOLD

EPILOG = """\b
Examples:
  mergekit-neuron profile ./base --data math=math.jsonl --data code=code.jsonl -o base.safetensors
  mergekit-neuron groups base.safetensors -o groups.json --threshold 0.7
  mergekit-neuron groups base.safetensors -o groups.json --import labels.json --min-confidence 0.5
  mergekit-neuron groups base.safetensors -o groups.json --import atlas.csv

\b
The file is what neuron_merge reads:
  merge_method: neuron_merge
  base_model: ./base
  models:
    - {model: ./math-expert, parameters: {group: math}}
    - {model: ./code-expert, parameters: {group: code}}
  parameters: {groups: groups.json, general: 0.5}

\b
--import takes what `mergekit-neuron describe` writes; JSON ({layer: [group, ...]}, {layer: {neuron: group}}, or a list
of records), JSON lines, or CSV with the columns layer, neuron and group, and if you like confidence and description.
Neurons without a label are general. How often labels and activations agree is said, too.
"""


@click.command("groups", epilog=EPILOG)
@click.argument("profile", type=FILE)
@click.option("-o", "--output", required=True, type=FILE, metavar="FILE")
@click.option(
    "--threshold",
    type=Share(),
    default=THRESHOLD,
    show_default=True,
    help="Share of its top activations that makes a neuron a domain's.",
)
@click.option(
    "--min-firing",
    type=Share(),
    default=MIN_FIRING,
    show_default=True,
    help="Neurons that fire on a smaller share of their domain's tokens are general.",
)
@click.option("--force", is_flag=True, help="Replace the groups in FILE.")
@click.option("--import", "labels", type=FILE, help="Labels of `describe`, or made elsewhere.")
@click.option(
    "--by",
    type=click.Choice(["activations", "labels"]),
    help="What decides.  [default: labels with --import, else activations]",
)
@click.option("--min-confidence", type=Share(), default=0.0, help="Labels of lower confidence make a neuron general.")
@no_bars_option
@debug_option
def groups(
    profile: Path,
    output: Path,
    threshold: float,
    min_firing: float,
    labels: Path | None,
    by: str | None,
    min_confidence: float,
    force: bool,
) -> None:
    """Classify every MLP neuron of the base by the data source of PROFILE that drives it furthest, or by labels.

    PROFILE is a profile of the base, with one data source per domain. The share of a domain is corrected for how many
    tokens it contributed; a neuron that no domain clearly owns is general.
    """
    from neuron_methods.profiling import NeuronProfile
    from neuron_methods.profiling.agreement import by_activations, describe_agreement
    from neuron_methods.profiling.grouping import check_place, classify, describe_groups, groups_of_labels
    from neuron_methods.profiling.labels_file import read_labels
    from neuron_methods.support.runs import claimed

    if labels is None and (by == "labels" or min_confidence):
        raise click.UsageError(f"{'--by labels' if by else '--min-confidence'} needs --import FILE")
    place = check_place(output, force, profile, labels)
    measured = NeuronProfile.load(profile)
    imported = read_labels(measured, labels) if labels else None
    if imported is None or by == "activations":
        found = classify(measured, threshold, min_firing)
    else:
        found = groups_of_labels(measured, imported, min_confidence)
    with claimed(place, f"-o {output}"):
        found.write(place)
    say("\n".join(describe_groups(found)))
    if imported is not None:
        say(describe_agreement(imported, by_activations(measured, imported, threshold, min_firing)))
