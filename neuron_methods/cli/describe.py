"""`mergekit-neuron describe`: let a language model say what makes each MLP neuron fire, and which domain it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from neuron_methods.cli.common import DTYPES, FILE, SEED, Count, debug_option, no_bars_option, places, say

EPILOG = """\b
Examples:
  mergekit-neuron profile ./base --data math=math.jsonl --data code=code.jsonl -o base.safetensors
  mergekit-neuron describe base.safetensors --describer ./instruct --limit 50 -o labels.json
  mergekit-neuron groups base.safetensors --import labels.json -o groups.json

\b
With a model that is served elsewhere; nothing is sent by this command:
  mergekit-neuron describe base.safetensors --describer NAME --export-prompts prompts.jsonl
  mergekit-neuron describe base.safetensors --import-answers answers.jsonl -o labels.json
The prompts hold text of your data. Both files are in the usual batch format: custom_id, method, url and body of a
request to /v1/chat/completions; custom_id and response of an answer. Give the same --layers, --limit and --seed.

\b
The describer answers with one of the names `general` and those of the profile's data sources: how likely it is to
write each is measured. --prior even divides a name's likelihood by its mean over all neurons described, which small
models need, as they like one name better whatever they read; own leaves it, for describers that can be trusted.
The largest share is the label, and its confidence.

\b
Run again after an interruption, it goes on where it was; with --force and another --limit, --layers or --prior it asks
only what was not asked yet. Beside LABELS.json there is LABELS.html, to look at.
"""


@click.command("describe", epilog=EPILOG)
@click.argument("profile", type=FILE)
@click.option(
    "--describer",
    metavar="MODEL",
    shell_complete=places,
    help="A causal model with a chat template: path, hub id, base+adapter.",
)
@click.option("-o", "--output", type=FILE, metavar="LABELS.json")
@click.option("--layers", metavar="LIST", help="Keys, numbers, ranges: 3,7-9.  [default: all]")
@click.option("--limit", type=Count(), help="Neurons of each layer, drawn at random.  [default: all]")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of that draw.")
@click.option("--contexts", type=Count(1, 100), default=8, show_default=True, help="Shown of each neuron.")
@click.option(
    "--choose-by",
    type=click.Choice(["both", "contexts", "description"]),
    default="both",
    show_default=True,
    help="What the describer sees as it chooses a name.",
)
@click.option("--prior", type=click.Choice(["even", "own"]), default="even", show_default=True, help="See below.")
@click.option("--batch-size", type=Count(), default=8, show_default=True, help="Neurons per forward pass.")
@click.option("--device", help="cpu, cuda, auto, ...  [default: an accelerator if any]")
@click.option("--dtype", type=DTYPES, default="auto", show_default=True, help="auto: as stored; float32 on a CPU.")
@click.option("--export-prompts", type=FILE, metavar="FILE", help="Write what would be asked, as JSON lines.")
@click.option("--import-answers", type=FILE, metavar="FILE", help="Read the answers to that.")
@click.option("--allow-missing", is_flag=True, help="--import-answers: leave neurons without an answer out.")
@click.option(
    "--force", is_flag=True, help="Replace the labels in LABELS.json, or the prompts in FILE; nothing is asked twice."
)
@no_bars_option
@debug_option
def describe(
    profile: Path,
    describer: str | None,
    output: Path | None,
    layers: str | None,
    limit: int | None,
    seed: int,
    contexts: int,
    export_prompts: Path | None,
    import_answers: Path | None,
    allow_missing: bool,
    force: bool,
    **settings: Any,
) -> None:
    """Describe the MLP neurons of PROFILE in words, and label each with a domain, by a language model.

    Per neuron the describer reads the texts that drive it furthest, writes one line, and chooses among the names of the
    profile's data sources and `general`. It is told no source. Neurons that never fire are left out. How often the
    labels agree with `mergekit-neuron groups --by activations` is said at the end.
    """
    from neuron_methods.profiling.describing import Selection, describe_neurons

    if export_prompts and (import_answers or output):
        raise click.UsageError("--export-prompts goes without --import-answers and -o")
    if not describer and not import_answers:
        raise click.UsageError("--describer MODEL is missing, or --import-answers FILE")
    if not output and not export_prompts:
        raise click.UsageError("-o LABELS.json is missing, or --export-prompts FILE")
    if allow_missing and not import_answers:
        raise click.UsageError("--allow-missing needs --import-answers")
    if import_answers and describer:
        raise click.UsageError("--describer goes without --import-answers, which tell who gave them")
    context = click.get_current_context()
    for name in settings if export_prompts or import_answers else ():
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} is for a describer that runs here; leave it out")
    selection = Selection(layers, limit, seed, contexts)
    if export_prompts or import_answers:
        from neuron_methods.profiling.batch_files import export, import_into

        if export_prompts:
            export(profile, export_prompts, describer or "", selection, force=force, report=say)
        else:
            import_into(
                profile, import_answers, output, selection, allow_missing=allow_missing, force=force, report=say
            )
        return
    describe_neurons(profile, describer, output, selection, force=force, report=say, **settings)
