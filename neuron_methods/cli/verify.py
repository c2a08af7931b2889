"""`mergekit-neuron verify`: is a checkpoint, an adapter or a routed model complete?"""

from __future__ import annotations

from pathlib import Path

import click

from neuron_methods.cli.common import PLACE, debug_option, describe_error, say
from neuron_methods.support.errors import UserError

EPILOG = """\b
Examples:
  mergekit-neuron verify ./merged
  mergekit-neuron verify ./adapter
  mergekit-neuron verify ./one ./other --trust-remote-code

\b
The class that config.json names is built without weights, and transformers says what it would make of what is stored,
names converted as it converts them: nothing may be missing, left over, of another shape or dtype. An adapter is held
against its base by peft, as far as the base's config is on this machine. Only headers are read; the network is not
asked. Where a class is not to be had, that is said, and what was checked instead.
Every DIR is looked at; values are not, so that NaN is not found.
Exit codes: 0 all complete, 1 not (one line on stderr for each), 2 wrong usage.
"""


@click.command("verify", epilog=EPILOG)
@click.argument("places", metavar="DIR...", nargs=-1, required=True, type=PLACE)
@click.option("--trust-remote-code", is_flag=True, help="Run the custom code of a model to build its class.")
@debug_option
def verify(places: tuple[Path, ...], trust_remote_code: bool) -> None:
    """Check that transformers or peft would load each DIR whole: a model, an adapter or a routed model."""
    from neuron_methods.sharing.verification import verify_directory

    refused = False
    for place in places:
        try:
            say(f"{place}: {verify_directory(place, trust_remote_code=trust_remote_code)}")
        except UserError as error:
            refused = True
            say(f"error: {describe_error(error)}", err=True)
    if refused:
        click.get_current_context().exit(1)
