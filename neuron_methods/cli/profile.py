"""`mergekit-neuron profile`: measure neurons, or with --inputs what they are given; `profile show`: read the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from neuron_methods.cli.common import DTYPES, PLACE, SEED, Count, debug_option, no_bars_option, places, say

EPILOG = """\b
`mergekit-neuron profile show FILE [--layer L [--neuron N]]` prints a profile; see its own --help.

\b
SOURCE is one of
  LOCAL[:[SPLIT:]COLUMNS]          a json, jsonl, parquet, csv, tsv or txt file (.gz, too),
                                   a folder of images, a folder with the files of a data set
  HUB-ID[@CONFIG]:SPLIT[:COLUMNS]  a data set of the hub
COLUMNS is one column, or two with a comma between: input,target for text-to-text models and
instruction data (one sequence for a decoder, the loss is over the target), image,label for
classifiers, image,text for CLIP. By default the columns are called so, and text for a decoder.

\b
Examples:
  mergekit-neuron profile ./base --data math=math.jsonl:question,answer --data code=code.txt \\
      -o base.safetensors
  mergekit-neuron profile ./base+./adapter --data math=openai/gsm8k@main:train:question,answer \\
      --gradients -o expert.safetensors
  mergekit-neuron profile ./vit --data digits=./photos -o vit.safetensors
  accelerate launch --multi_gpu --num_processes 4 -m neuron_methods profile ./base \\
      --data math=math.jsonl -o base.safetensors
  mergekit-neuron profile show base.safetensors --layer 3 --neuron 17
  mergekit-neuron profile ./base+./adapter --data math=math.jsonl:question,answer \
      --inputs -o math.inputs.safetensors

\b
--inputs writes another kind of file, which the method neuron_response reads (inputs: profile, or
both): for every linear layer and convolution, heads included, a factor F with FᵀF = the mean of
x xᵀ over all inputs x that it is given. Measure each expert on data of its own task; 16 to 64
samples are enough, and prompts without answers are: --generate 32 lets the expert answer them.
How much disk and memory it takes is said before it starts. Rows of F are the inputs themselves
until they are more than --rows, or than a layer is wide. Then layers no wider than --rows lose
nothing (F is R of the QR decomposition), and of wider ones the strongest directions are kept
(frequent directions): FᵀF falls short by ‖F‖²/(rows + 1) at most in any direction. Padding never counts. Left out are
experts stacked in one tensor and convolutions in groups.

\b
Run again after an interruption: finished data sources are skipped, an unfinished one goes on
where it last saved its state. Beside FILE.safetensors there is FILE.exemplars.jsonl with the
tokens that drive the neurons furthest.
"""


_OF_NEURONS = ("gradients", "top", "context")
_OF_INPUTS = ("rows", "generate", "answers_only")


class ProfileCommand(click.Command):
    """`profile MODEL ...`, but for `profile show ...`, which is a command of its own."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Hand over to `show` if that is the first word; a model directory of this name is `./show`."""
        if args[:1] == ["show"]:
            return show.make_context(f"{info_name} show", args[1:], parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)


@click.command("profile", cls=ProfileCommand, epilog=EPILOG)
@click.argument("model", shell_complete=places)
@click.option("--data", multiple=True, required=True, metavar="NAME=SOURCE", help="A data source; may be repeated.")
@click.option("-o", "--output", required=True, type=PLACE, metavar="FILE", help="*.safetensors")
@click.option("--samples", type=Count(0), help="Of each source; 0: all.  [default: 1000, with --inputs 64]")
@click.option("--max-length", type=Count(), default=512, show_default=True, help="Tokens per text.")
@click.option("--batch-size", type=Count(), default=8, show_default=True, help="Samples per forward pass.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the order in which samples are drawn.")
@click.option("--gradients", is_flag=True, help="Measure activation × gradient of the loss (taylor), too.")
@click.option("--top", type=Count(0, 1000), default=10, show_default=True, help="Exemplars per neuron.")
@click.option("--context", type=Count(0, 1000), default=8, show_default=True, help="Tokens around an exemplar.")
@click.option(
    "--separator",
    default="\n",
    help="Joins two columns for a decoder; spaces go with the second.  [default: a line break]",
)
@click.option("--dtype", type=DTYPES, default="auto", show_default=True)
@click.option("--inputs", is_flag=True, help="Measure what every linear layer is given instead of its neurons.")
@click.option("--rows", type=Count(), default=1024, show_default=True, help="--inputs: of a factor at most.")
@click.option(
    "--generate",
    type=Count(),
    is_flag=False,
    flag_value=32,
    metavar="[N]",
    help="--inputs: MODEL answers the first column by itself, with N tokens at most.  [N by default: 32]",
)
@click.option("--answers-only", is_flag=True, help="--inputs: of a decoder, only tokens that say the answer count.")
@click.option("--force", is_flag=True, help="Forget the profile in FILE and start anew.")
@no_bars_option
@debug_option
def profile(
    model: str,
    data: tuple[str, ...],
    output: Path,
    inputs: bool,
    force: bool,
    **settings: Any,
) -> None:
    """Measure the MLP neurons of MODEL on data: a path, a hub id, an adapter, or base+adapter.

    Per source and neuron: mean |activation|, second moment, firing rate and the tokens that drive it furthest; with
    --gradients also mean |activation × gradient of the loss|. Every model family in neuron_methods/neurons can be
    measured: Llama and other decoders, T5, ViT, DeiT, CLIP. With --inputs instead: what every linear layer of an expert
    is given, for merging by neuron_response.
    """
    for name in _OF_NEURONS if inputs else _OF_INPUTS:
        if click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} goes without --inputs" if inputs else f"{option} needs --inputs")
        del settings[name]
    if settings["samples"] is None:
        del settings["samples"]
    if inputs:
        from neuron_methods.profiling import InputSettings, measure_inputs

        measure_inputs(model, data, output, InputSettings(**settings), force=force, report=say)
    else:
        from neuron_methods.profiling import Settings, measure_profile

        measure_profile(model, data, output, Settings(**settings), force=force, report=say)


@click.command("show")
@click.argument("file", type=PLACE)
@click.option("--layer", help="Key as the overview names it, or its number.")
@click.option("--neuron", type=Count(0), help="Index of a neuron of that layer.")
@debug_option
def show(file: Path, layer: str | None, neuron: int | None) -> None:
    """Print a profile: an overview, with --layer its most active neurons, with --neuron what drives one.

    A file of inputs has an overview only: its factors, and which modules each belongs to.
    """
    from neuron_methods.profiling import NeuronProfile
    from neuron_methods.profiling.show import (
        describe_inputs,
        describe_layer,
        describe_neuron,
        describe_profile,
        opened_inputs,
    )

    if neuron is not None and layer is None:
        raise click.UsageError("--neuron needs --layer")
    measured_inputs = opened_inputs(file)
    if measured_inputs is not None:
        if layer is not None:
            raise click.UsageError(f"{file} holds inputs of modules, which have no --layer")
        click.echo("\n".join(describe_inputs(measured_inputs)))
        return
    measured = NeuronProfile.load(file)
    if layer is None:
        lines = describe_profile(measured)
    elif neuron is None:
        lines = describe_layer(measured, layer)
    else:
        lines = describe_neuron(measured, layer, neuron)
    say("\n".join(lines))
