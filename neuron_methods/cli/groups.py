"""`mergekit-neuron groups`: the functional group of every MLP neuron, for the method neuron_merge."""

from __future__ import annotations

from pathlib import Path

import click

from neuron_methods.cli.common import FILE, Share, debug_option, say

EPILOG = """\b
Examples:
  mergekit-neuron profile ./base --data math=math.jsonl --data code=code.jsonl -o base.safetensors
  mergekit-neuron groups base.safetensors -o groups.json --threshold 0.7
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
--import takes JSON ({layer: [group, ...]}, {layer: {neuron: group}}, or a list of records), JSON lines, or CSV with
the columns layer, neuron and group. Neurons without a label are general.
"""


@click.command("groups", epilog=EPILOG)
@click.argument("profile", type=FILE)
@click.option("-o", "--output", required=True, type=FILE, metavar="FILE")
@click.option(
    "--threshold",
    type=Share(),
    default=0.6,
    show_default=True,
    help="Share of its top activations that makes a neuron a domain's.",
)
@click.option(
    "--min-firing",
    type=Share(),
    default=0.001,
    show_default=True,
    help="Neurons that fire on a smaller share of their domain's tokens are general.",
)
@click.option("--force", is_flag=True, help="Replace the groups in FILE.")
@click.option("--import", "labels", type=FILE, help="Labels made elsewhere.")
@debug_option
def groups(profile: Path, output: Path, threshold: float, min_firing: float, labels: Path | None, force: bool) -> None:
    """Classify every MLP neuron of the base by the data source of PROFILE that drives it furthest.

    PROFILE is a profile of the base, with one data source per domain. The share of a domain is corrected for how many
    tokens it contributed; a neuron that no domain clearly owns is general.
    """
    from neuron_methods.profiling import NeuronProfile
    from neuron_methods.profiling.grouping import check_place, classify, describe_groups, import_labels
    from neuron_methods.support.runs import claimed

    place = check_place(output, force, profile, labels)
    measured = NeuronProfile.load(profile)
    found = import_labels(measured, labels) if labels else classify(measured, threshold, min_firing)
    with claimed(place, f"-o {output}"):
        found.write(place)
    say("\n".join(describe_groups(found)))
