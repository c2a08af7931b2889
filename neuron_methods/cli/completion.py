"""`mergekit-neuron completion`: the script by which a shell completes our command."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from neuron_methods.cli.common import debug_option, say

EPILOG = """\b
Once, and for every new shell:
  mergekit-neuron completion bash > ~/.local/share/bash-completion/completions/mergekit-neuron
  mergekit-neuron completion zsh > "${fpath[1]}/_mergekit-neuron"
  mergekit-neuron completion fish > ~/.config/fish/completions/mergekit-neuron.fish
"""


@click.command("completion", epilog=EPILOG)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@debug_option
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that lets SHELL complete commands, options and their values."""
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"click knows no completion for {shell}")
    say(kind(context.find_root().command, {}, "mergekit-neuron", "_MERGEKIT_NEURON_COMPLETE").source())
