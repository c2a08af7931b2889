"""`mergekit-neuron generate`: answer prompts, or classify images, with a routed model; and tell how it routed."""

from __future__ import annotations

from typing import Any

import click

from neuron_methods.cli.common import PLACE, SEED, Count, debug_option, no_bars_option, say

EPILOG = """\b
Examples:
  mergekit-neuron generate ./routed --prompt "300 + 47 =" --prompt "German: ein rotes Haus"
  mergekit-neuron generate ./routed-t5 --prompt "translate: ..." --max-new-tokens 40
  mergekit-neuron generate ./routed-vit --image photo.png --image other.png
  mergekit-neuron generate org/routed --base-model ./base --prompt "..." --json
"""


@click.command("generate", epilog=EPILOG)
@click.argument("routed")
@click.option("--prompt", "prompts", multiple=True, help="A text; may be repeated, and all are computed in one batch.")
@click.option("--image", "images", multiple=True, type=PLACE, help="A file, for image classifiers.")
@click.option("--max-new-tokens", type=Count(), default=32, show_default=True)
@click.option("--sample", is_flag=True, help="Draw tokens instead of taking the likeliest.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of --sample.")
@click.option("--base-model", help="Another place of the base than the one noted: directory or hub id.")
@click.option("--device", help="cpu, cuda, auto, ...  [default: an accelerator if any]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@no_bars_option
@debug_option
def generate(routed: str, **settings: Any) -> None:
    """Run ROUTED, a directory of `mergekit-neuron route` or a hub id, and print each answer with its routing."""
    from neuron_methods.routing.answering import answer

    if bool(settings["prompts"]) == bool(settings["images"]):
        raise click.UsageError("give --prompt TEXT or --image FILE")
    for line in answer(routed, **settings):
        say(line)
