"""`mergekit-neuron push`: upload a merge to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuron_methods.cli.common import PLACE, debug_option, options, quiet_option, say

if TYPE_CHECKING:
    from neuron_methods.sharing.hub import PushOptions

EPILOG = """\b
Examples:
  hf auth login                                    once; or set HF_TOKEN
  mergekit-neuron push ./merged me/my-merge --private
  mergekit-neuron push ./merged me/my-merge --revision v2 --commit-message "Denser trim"
  mergekit-neuron push ./merged org/model --create-pr
  mergekit-neuron push ./merged me/my-merge --include 'samples/*.txt'
  mergekit-neuron push ./adapter me/my-adapter --base-model Qwen/Qwen2.5-0.5B

\b
OUT is verified first and never changed; of it goes what makes the model, and what --include names. Paths of this
machine stay here: only their last component is uploaded. After an interruption the same command goes on where it was.
"""


#: Of an upload, except for where it goes.
push_options = options(
    click.option("--private", is_flag=True, default=None, help="Make a new repository private."),
    click.option("--revision", metavar="BRANCH", help="Commit to this branch; made if it is not there."),
    click.option("--commit-message", metavar="TEXT", help="Of the commit."),
    click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing."),
    click.option("--base-model", metavar="USER/NAME", help="Of an adapter: the id its base has on the Hub."),
    click.option("--include", metavar="PATTERN", multiple=True, help="Upload files that are no part of it, too."),
)


def pushing(repository: str | None, given: dict[str, Any]) -> PushOptions | None:
    """Say what `--push-to-hub` asks of a command that makes something first, the token already checked; None: nothing.

    Raises:
        UserError: the token may not write there.
    """
    if repository is None:
        for name, value in given.items():
            if value:
                raise click.UsageError(f"--{name.replace('_', '-')} goes with --push-to-hub")
        return None
    from neuron_methods.sharing.hub import PushOptions, check_access

    found = PushOptions(**given)
    check_access(repository, found)
    return found


def push_and_tell(out: Path, repository: str, options: PushOptions, *, quiet: bool = False) -> None:
    """Upload, and print notes and the address."""
    from neuron_methods.sharing.hub import push_directory

    pushed = push_directory(out, repository, options, progress=not quiet)
    for note in pushed.notes:
        say(f"note: {note}", err=True)
    say(pushed.url)


@click.command("push", epilog=EPILOG)
@click.argument("out", type=PLACE)
@click.argument("repository", metavar="USER/NAME")
@push_options
@quiet_option("No progress bars; print the address alone.")
@debug_option
def push(out: Path, repository: str, quiet: bool, **given: Any) -> None:
    """Upload OUT, a merge, an adapter or a routed model, to the repository USER/NAME of the Hugging Face Hub."""
    from neuron_methods.sharing.hub import PushOptions

    push_and_tell(out, repository, PushOptions(**given), quiet=quiet)
