"""`mergekit-neuron report`: what a merge did to the neurons, in figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from neuron_methods.cli.common import FILE, PLACE, Count, debug_option, quiet_option, say

EPILOG = """\b
Examples:
  mergekit-neuron report ./merged
  mergekit-neuron report ./merged --rows 64                      a sample, for large models
  mergekit-neuron report ./merged --evaluation scores.json       scores into the card, too
  mergekit-neuron merge merge.yaml ./merged --report             a sample, measured while merging

\b
Writes OUT/report/: report.html (one page that needs no network), a PNG per figure, report.json with the numbers;
and puts the figures into OUT/README.md, the model card. Needs matplotlib: pip install 'mergekit-neuron[report]'.
"""


@click.command("report", epilog=EPILOG)
@click.argument("out", type=PLACE)
@click.option("--config", type=FILE, help="The YAML that OUT was made with.  [default: OUT/mergekit_config.yml]")
@click.option("--rows", type=Count(), help="Look at this many neurons of each weight.  [default: all]")
@click.option("--evaluation", type=FILE, help="JSON of `mergekit-neuron evaluate`, for the card.")
@click.option("--new-card", is_flag=True, help="Write README.md anew instead of changing its sections.")
@quiet_option()
@debug_option
def report(out: Path, quiet: bool, **settings: Any) -> None:
    """Draw what the merge in OUT did to the neurons, from the models it was made of and what it has written.

    Per layer and kind of weight: parallel and orthogonal parts of the updates, agreement and conflict of the experts,
    what is kept of each, what the merge is closest to, the singular spectrum; and what the method measured.
    """
    from neuron_methods.sharing.publishing import report_directory

    say(report_directory(out, progress=not quiet, **settings))
