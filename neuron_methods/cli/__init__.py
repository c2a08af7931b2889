"""The command `mergekit-neuron`: a table of subcommands, each imported when it is called.

To add a subcommand, write `neuron_methods/cli/NAME.py` with a click command that is a function called NAME
(`-` becomes `_`), decorated with `neuron_methods.cli.common.debug_option`, and add one line to
`SUBCOMMANDS`. This module imports click alone, so that `mergekit-neuron --help` answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import click

from neuron_methods import __version__
from neuron_methods.cli.common import asking_nobody, debug_option, exiting_on_signals, reporting_errors
from neuron_methods.support.starting import importing


class Subcommand(NamedTuple):
    """Where a subcommand lives (a module with a click command named like it) and its line in `--help`."""

    module: str
    help: str


SUBCOMMANDS: dict[str, Subcommand] = {
    "merge": Subcommand("neuron_methods.cli.merge", "Merge models as a mergekit YAML says, and verify."),
    "profile": Subcommand("neuron_methods.cli.profile", "Measure what each MLP neuron does on data; show it."),
    "groups": Subcommand("neuron_methods.cli.groups", "Find the functional group of every MLP neuron."),
    "describe": Subcommand("neuron_methods.cli.describe", "Let a language model say what each MLP neuron is for."),
    "linearity": Subcommand("neuron_methods.cli.linearity", "Measure how linearly outputs follow merged weights."),
    "route": Subcommand("neuron_methods.cli.route", "Make a routed model: a router over adapters."),
    "generate": Subcommand("neuron_methods.cli.generate", "Answer prompts with models, side by side."),
    "recipes": Subcommand("neuron_methods.cli.recipes", "Show merge configurations to start from."),
    "report": Subcommand("neuron_methods.cli.report", "Draw what a merge did to the neurons."),
    "verify": Subcommand("neuron_methods.cli.verify", "Check that a checkpoint or adapter is complete."),
    "push": Subcommand("neuron_methods.cli.push", "Upload a merge to the Hugging Face Hub."),
    "evaluate": Subcommand("neuron_methods.cli.evaluate", "Score a model on tasks, with 95 % intervals."),
    "tune": Subcommand("neuron_methods.cli.tune", "Search merge parameters on validation data."),
    "compare": Subcommand("neuron_methods.cli.compare", "Compare merge methods on one's own models and tasks."),
    "ui": Subcommand("neuron_methods.cli.ui", "Show a page that does what the commands do."),
    "doctor": Subcommand("neuron_methods.cli.doctor", "Look at what merges stand on: versions, devices, Hub."),
    "help": Subcommand("neuron_methods.cli.help", "Explain what an error points to; list the topics."),
    "completion": Subcommand("neuron_methods.cli.completion", "Print the script by which a shell completes this."),
    "demo": Subcommand("neuron_methods.cli.demo", "Train three small experts, merge them, compare."),
}


class LazyGroup(click.Group):
    """A click group whose subcommands come from a table and whose errors end in one line on stderr."""

    def __init__(self, *args: Any, subcommands: dict[str, Subcommand], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.subcommands = subcommands

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order of the table."""
        return list(self.subcommands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of the subcommand `cmd_name` and return its click command."""
        entry = self.subcommands.get(cmd_name)
        if entry is None:
            return None
        with importing():
            return getattr(import_module(entry.module), cmd_name.replace("-", "_"))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the subcommands in the message about an unknown one."""
        if args and args[0] not in self.subcommands and not args[0].startswith("-"):
            known = ", ".join(self.subcommands)
            ctx.fail(f"no such subcommand: {args[0]!r} (there are: {known})")
        name, command, rest = super().resolve_command(ctx, args)
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands from the table alone, without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in self.subcommands.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; see `neuron_methods.cli.common` for what its errors become."""
        with asking_nobody(), exiting_on_signals(), reporting_errors(ctx):
            return super().invoke(ctx)


EPILOG = """\b
Example:
  mergekit-neuron merge merge.yaml ./merged --dry-run    show the plan, write nothing
  mergekit-neuron merge merge.yaml ./merged              merge, verify, move into place

\b
where merge.yaml is an ordinary mergekit configuration:
  merge_method: neuro_merging
  base_model: ./base
  models:
    - model: ./expert-a
    - model: ./expert-b
      parameters: {weight: 0.8}
  dtype: bfloat16

`mergekit-neuron COMMAND --help` explains a command and its options. mergekit's own mergekit-yaml understands
the same files.
"""


@click.group(
    cls=LazyGroup,
    subcommands=SUBCOMMANDS,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="mergekit-neuron")
@debug_option
def main() -> None:
    """Merge fine-tuned models neuron by neuron, with mergekit."""
