"""`mergekit-neuron help`: what errors point to, the sections of the recipes' document, without a network."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from neuron_methods.cli.common import debug_option, say

EPILOG = """\b
Examples:
  mergekit-neuron help              the topics
  mergekit-neuron help adapters     what is known of one
  mergekit-neuron help merge        the same as mergekit-neuron merge --help
"""


def _complete(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    from neuron_methods.sharing.topics import topics

    return [CompletionItem(topic.name) for topic in topics() if topic.name.startswith(typed)]


@click.command("help", epilog=EPILOG)
@click.argument("topic", required=False, shell_complete=_complete)
@debug_option
@click.pass_context
def help(context: click.Context, topic: str | None) -> None:
    """Explain TOPIC: show a section of the documents, or the help of a command; without one, list the topics."""
    from neuron_methods.sharing.topics import find_topic, topics
    from neuron_methods.support.text import columns

    root = context.find_root()
    command = root.command.get_command(root, topic) if topic and isinstance(root.command, click.Group) else None
    if command is not None:
        say(command.get_help(click.Context(command, info_name=topic, parent=root)))
    elif topic is None:
        say("\n".join(columns([("topic", "section"), *((one.name, one.title) for one in topics())], left=(0, 1))))
    else:
        say(find_topic(topic).text)
