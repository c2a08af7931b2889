"""`mergekit-neuron recipes`: merge configurations to start from."""

from __future__ import annotations

import os
from pathlib import Path

import click

from neuron_methods.cli.common import FILE, debug_option, places, say
from neuron_methods.support.files import write_text
from neuron_methods.support.runs import claimed
from neuron_methods.support.targets import beginning_with, check_file
from neuron_methods.support.text import columns

EPILOG = """\b
Examples:
  mergekit-neuron recipes list
  mergekit-neuron recipes show vit/neuro_merging-clip-vit-b-32 > merge.yml
  mergekit-neuron recipes new llama neuro_merging --base ./base --expert ./math --expert ./code -o merge.yml
  mergekit-neuron merge merge.yml ./merged --dry-run
"""


@click.group("recipes", invoke_without_command=True, epilog=EPILOG)
@debug_option
@click.pass_context
def recipes(context: click.Context) -> None:
    """List merge configurations to start from, show one, or fill in your own models."""
    if context.invoked_subcommand is None:
        context.invoke(list_recipes)


@recipes.command("list")
@debug_option
def list_recipes() -> None:
    """List all recipes; those marked * have places for your own models."""
    from neuron_methods.sharing.recipes import all_recipes

    rows = [(recipe.name, " " if recipe.is_filled else "*", recipe.title) for recipe in all_recipes()]
    say("\n".join(columns(rows, left=(0, 1, 2))))


@recipes.command("show")
@click.argument("name")
@debug_option
def show_recipe(name: str) -> None:
    """Print the recipe NAME."""
    from neuron_methods.sharing.recipes import find_recipe

    click.echo(find_recipe(name).text, nl=False)


@recipes.command("new")
@click.argument("family")
@click.argument("method")
@click.option(
    "--base",
    required=True,
    shell_complete=places,
    help="Path or id of the model that the experts were fine-tuned from.",
)
@click.option(
    "--expert",
    "experts",
    multiple=True,
    required=True,
    shell_complete=places,
    help="Path or id of an expert, or base+adapter.",
)
@click.option("-o", "--output", type=FILE, help="Write to this file.")
@click.option("--force", is_flag=True, help="Replace the recipe in this file.")
@debug_option
def new_recipe_command(
    family: str, method: str, base: str, experts: tuple[str, ...], output: Path | None, force: bool
) -> None:
    """Print a recipe for FAMILY (llama, t5, vit) by METHOD, with your models in it."""
    from neuron_methods.sharing.recipes import CALLED, FILLED, new_recipe

    text = new_recipe(family, method, base, experts, str(output or CALLED))
    if output is None:
        click.echo(text, nl=False)
        return
    inputs = [path for model in (base, *experts) for path in (model, *model.split("+")) if os.path.exists(path)]
    place = check_file(output, f"-o {output}", beginning_with(FILLED), force, inputs)
    with claimed(place, f"-o {output}"):
        write_text(place, text)
