"""`mergekit-neuron doctor`: look at what a merge stands on."""

from __future__ import annotations

import sys

import click

from neuron_methods.cli.common import debug_option, say

EPILOG = """\b
Looked at: versions against those that are needed, whether mergekit's own commands know our methods,
devices, memory and disk, the Hub's cache, whether the Hub answers, and whose the token is (which is
never shown). The exit code is 1 where something is wrong.
"""


@click.command("doctor", epilog=EPILOG)
@click.option("--no-hub", is_flag=True, help="Do not ask the Hub.")
@debug_option
def doctor(no_hub: bool) -> None:
    """Look at what merges stand on, a line each; say what is wrong and what to do."""
    from neuron_methods.sharing.doctor import BAD, GOOD, examine

    wrong = 0
    for finding in examine(ask_hub=not no_hub):
        mark = "" if finding.state == GOOD else f"{finding.state}: "
        say(f"{finding.name:18}{mark}{finding.found}")
        wrong += finding.state == BAD
    say("all is well" if not wrong else f"{wrong} of these {'is' if wrong == 1 else 'are'} wrong")
    if wrong:
        sys.exit(1)
