"""`mergekit-neuron generate`: answer prompts, or classify images, with any models; a routed one tells how it routed."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from neuron_methods.cli.common import PLACE, SEED, Count, debug_option, no_bars_option, places, say

EPILOG = """\b
Examples:
  mergekit-neuron generate ./routed --prompt "300 + 47 =" --prompt "German: ein rotes Haus"
  mergekit-neuron generate ./routed-t5 --prompt "translate: ..." --max-new-tokens 40
  mergekit-neuron generate ./routed-vit --image photo.png --image other.png
  mergekit-neuron generate ./base ./expert ./merged --prompt "300 + 47 ="       side by side
  mergekit-neuron generate org/routed --base-model ./base --prompt "..." --json
"""


@click.command("generate", epilog=EPILOG)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, shell_complete=places)
@click.option("--prompt", "prompts", multiple=True, help="A text; may be repeated, and all are computed in one batch.")
@click.option("--image", "images", multiple=True, type=PLACE, help="A file, for image classifiers.")
@click.option("--max-new-tokens", type=Count(), default=32, show_default=True)
@click.option("--sample", is_flag=True, help="Draw tokens instead of taking the likeliest.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of --sample.")
@click.option(
    "--base-model", shell_complete=places, help="Another place of the base than the one noted: directory or hub id."
)
@click.option("--device", help="cpu, cuda, auto, ...  [default: an accelerator if any]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@no_bars_option
@debug_option
def generate(models: tuple[str, ...], **settings: Any) -> None:
    """Ask each MODEL, a directory, base+adapter or hub id, and print each answer; of a routed one with its routing.

    A hub id by itself is that of a routed model.
    """
    prompts, images = settings["prompts"], settings["images"]
    if bool(prompts) == bool(images):
        raise click.UsageError("give --prompt TEXT or --image FILE")
    if len(models) == 1 and not is_plain(models[0]):
        from neuron_methods.routing.answering import answer

        for line in answer(models[0], **settings):
            say(line)
        return
    for option in ("sample", "base_model", "device"):
        if settings[option]:
            raise click.UsageError(f"--{option.replace('_', '-')} is for one routed model")
    from neuron_methods.evaluation.answering import answers_of

    for model, asked, said in answers_of(models, prompts, images, settings["max_new_tokens"]):
        told = {"model": model, "input": asked, "answer": said}
        said = said.replace("\n", "\n" + " " * 11)  # below each other
        say(json.dumps(told, ensure_ascii=False) if settings["as_json"] else f"{model}: {asked}\n  answer:  {said}")


def is_plain(model: str) -> bool:
    """Tell whether MODEL is here, and a model or an adapter that is not routed; or base+adapter."""
    if not os.path.isdir(model):
        return "+" in model
    here = os.listdir(model)
    return "routed_config.json" not in here and bool({"config.json", "adapter_config.json"} & {*here})
