"""`mergekit-neuron merge`: any mergekit configuration, checked before, verified after, complete or absent."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mergekit.common import parse_kmb
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from neuron_methods.cli.common import Count, Share, debug_option, say
from neuron_methods.cli.push import push_and_tell, push_options, pushing
from neuron_methods.support.documents import MOST_YAML, read_text
from neuron_methods.support.errors import UserError
from neuron_methods.support.starting import importing

if TYPE_CHECKING:
    from neuron_methods.models.team import Team

EPILOG = """\b
Examples:
  mergekit-neuron merge merge.yaml ./merged --dry-run
  mergekit-neuron merge merge.yaml ./merged --device auto --profile-out thresholds.json
  mergekit-neuron merge merge.yaml ./merged --force --out-shard-size 1B
  mergekit-neuron merge merge.yaml ./merged --resume
  accelerate launch --multi_gpu --num_processes 4 -m neuron_methods merge merge.yaml ./merged
  mergekit-neuron merge merge.yaml ./merged --head keep
  mergekit-neuron merge merge.yaml ./adapter --as-adapter --energy 0.99
  mergekit-neuron merge merge.yaml ./merged --report --push-to-hub me/my-merge --private

\b
A merge.yaml by neuro_merging, with every parameter at its default:
  merge_method: neuro_merging
  base_model: ./base              # what the experts were fine-tuned from
  models:
    - model: ./expert-a
      parameters: {weight: 1.0, density: 0.15}
    - model: ./expert-b
  parameters:
    trim: model                   # one threshold per expert; tensor: one per tensor; or differing
    lambda_parallel: 0.0
    lambda_orthogonal: auto       # 1 / (1 - sigma)
    lambda_points: orthogonal     # of norms and biases; mean: of both
    rank_energy: 1.0
    spectral_exponent: 1.0
    consensus: mean               # or sum
    embeddings: rows              # or mean: token embeddings averaged
  dtype: bfloat16                 # of the output; differences are always taken in float32

\b
neuro_merging measures one trim threshold per expert over the whole model first.
A file of --profile-out spares that pass in a later merge of the same models:
  parameters: {profile: thresholds.json}

\b
A merge that is killed, interrupted or short of disk space leaves its finished shards in .OUT.unfinished, beside OUT.
The same command with --resume keeps them if models, YAML, options and versions are what they were, and merges what is
missing: the bytes are those of a merge in one run. Without --resume it stops and says so; --force begins anew.

\b
Under accelerate launch every process merges its share of the tensors on its own device (--device auto), and reads no
others; --multi_gpu starts several on a CPU, too. The output is to the last bit that of one process with as many
threads (OMP_NUM_THREADS). Several hosts need the same inputs and packages, and OUT in a directory that they share. On
each of, say, two, with its number as --machine_rank (0 is the one named) and the processes of all:
  accelerate launch --multi_gpu --num_processes 16 --num_machines 2 --machine_rank 0 --main_process_ip HOST
    --main_process_port 29500 -m neuron_methods merge merge.yaml ./merged --device auto
If a process, its launcher or a host fails or dies, all end, and one line names it; --resume goes on, with as many
processes as you like.

\b
Weights are read from safetensors; pickled ones (pytorch_model.bin) only with --lazy-unpickle.
Exit codes: 0 merged and verified, 1 an error (one line on stderr), 2 wrong usage. After an error OUT is as it was.
"""


class _Bytes(click.ParamType):
    """A size such as 5B; mergekit's own type lets a wrong one through as a ValueError."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            size = parse_kmb(value)
        except (ValueError, IndexError):
            size = 0
        if size < 1:
            self.fail(f"{value!r} is no size; give bytes, or 500M, 5B (billions)", param, ctx)
        return size


def _sharpened(command: click.Command) -> click.Command:
    """Let click refuse what mergekit 0.1.5's options pass on, and say what they mean here."""
    for option in command.params:
        if option.name == "out_shard_size":
            option.type = _Bytes()
            option.help = "Bytes per output file; K, M, B: thousands, millions, billions  [default: 5B]"
        elif option.name in ("num_threads", "write_threads"):
            option.type = Count()
        elif option.name == "lazy_unpickle":
            option.help = "Allow weights in pickles (pytorch_model.bin), read tensor by tensor"
        elif option.name == "quiet":
            option.opts = ["-q", *option.opts]
        elif option.name == "device":
            option.help = "Compute on this device: auto, cpu, cuda, cuda:1, mps"
        elif option.name == "async_write":
            option.help = "Not needed: what is merged is written while the next tensor is merged"
        elif option.name == "lora_merge_cache":
            option.help = "Not needed: adapters are applied as they are read"
    return command


@_sharpened
@click.command("merge", cls=PrettyPrintHelp, epilog=EPILOG)
@click.argument("config", type=click.Path(dir_okay=False))
@click.argument("out", type=click.Path())
@click.option("--force", is_flag=True, help="Replace OUT if it exists, once the new output is verified.")
@click.option("--resume", is_flag=True, help="Go on with an unfinished merge of the same plan, where there is one.")
@click.option("--dry-run", is_flag=True, help="Print the plan and what parameters resolve to; write nothing.")
@click.option("--profile-out", type=click.Path(dir_okay=False), help="Write trim thresholds and sigma to this JSON.")
@click.option(
    "--head",
    metavar="base|EXPERT|drop|keep",
    help="Merge the bodies alone; the output has the base's head, an EXPERT's (a model as in CONFIG, or the last part "
    "of its path), or none (drop); keep: none, and each expert's goes into OUT/heads.",
)
@click.option("--allow-nonfinite", is_flag=True, help="Go on where a model holds NaN or Inf; they may reach OUT.")
@click.option("--as-adapter", is_flag=True, help="Write the merged update as a LoRA adapter on base_model.")
@click.option("--rank", type=Count(), help="With --as-adapter: rank of the factors at most.  [default: 64]")
@click.option(
    "--energy",
    type=Share(above_0=True),
    help="With --as-adapter: share of each matrix's squared norm to keep, e.g. 0.99; ranks then differ.",
)
@click.option(
    "--adapter-dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="With --as-adapter: dtype it is written in.  [default: float32]",
)
@click.option("--report", is_flag=True, help="Draw what the merge does to the neurons: OUT/report/report.html.")
@click.option(
    "--evaluation",
    type=click.Path(dir_okay=False, path_type=Path),
    help="JSON of `mergekit-neuron evaluate`, for the card.",
)
@click.option("--push-to-hub", metavar="USER/NAME", help="Upload the result; the token is checked before the merge.")
@push_options
@add_merge_options
@debug_option
def merge(
    merge_options: MergeOptions,
    config: str,
    out: str,
    force: bool,
    resume: bool,
    dry_run: bool,
    profile_out: str | None,
    head: str | None,
    allow_nonfinite: bool,
    as_adapter: bool,
    rank: int | None,
    energy: float | None,
    adapter_dtype: str | None,
    report: bool,
    evaluation: Path | None,
    push_to_hub: str | None,
    **push: Any,
) -> None:
    """Merge models as the mergekit YAML in CONFIG says (-: on stdin); the result is in OUT, complete, or not there.

    Every method of mergekit works, and the methods of this package. Inputs are checked before anything is merged; the
    output is written beside OUT, verified (every tensor of the base, same shapes, finite) and moved into place.
    Models may be LoRA adapters: base+adapter, or an adapter by itself. With --as-adapter the merge is one, too.
    """
    for name, value in (("--rank", rank), ("--energy", energy), ("--adapter-dtype", adapter_dtype)):
        if value is not None and not as_adapter:
            raise click.UsageError(f"{name} goes with --as-adapter")
    if as_adapter and head not in (None, "base"):
        raise click.UsageError(
            f"--head {head} does not go with --as-adapter: an adapter changes the weights of its base, not its class "
            "or its labels; --head base leaves the base's head as it is"
        )
    with importing():
        from neuron_methods.models.team import teamed
        from neuron_methods.plugin.adapter_output import AdapterOutput, adapter_precision
        from neuron_methods.plugin.describe import describe_plan
        from neuron_methods.plugin.merging import merge_to_directory, plan_merge
        from neuron_methods.plugin.output import ModelOutput
        from neuron_methods.sharing.publishing import merge_witness

    with teamed() as team:
        options = _options(merge_options, team)
        source, config = _read(config, team)
        output = AdapterOutput(adapter_precision(rank, energy, adapter_dtype)) if as_adapter else ModelOutput()
        if dry_run:
            if not team.rank:
                plan = plan_merge(source, options=options, config_name=config, head=head, output=output)
                say(describe_plan(plan))
                if isinstance(output, AdapterOutput):
                    rank = output.precision.rank
                    say("  as a LoRA adapter" + (f" of rank {rank} at most" if rank else ""))
            return
        push_to = pushing(push_to_hub, push) if not team.rank else None
        summary = merge_to_directory(
            source,
            out,
            output=output,
            options=options,
            force=force,
            progress=not options.quiet,
            allow_nonfinite=allow_nonfinite,
            profile_out=profile_out,
            config_name=config,
            head=head,
            witness=merge_witness(report, evaluation),
            resume=resume or None,
            team=team,
        )
        if summary is None:
            return
        if not options.quiet:
            say(str(summary))
        else:
            for warning in summary.adapter.warnings if summary.adapter is not None else ():
                say(f"warning: {warning}", err=True)
            for note in summary.notes:
                say(f"note: {note}", err=True)
        if push_to is not None and push_to_hub is not None:
            push_and_tell(Path(out), push_to_hub, push_to, quiet=options.quiet)


def _read(config: str, team: Team) -> tuple[str, str]:
    """Read the YAML; its text, and what messages call it."""
    if config != "-":
        return read_text(config), config
    if team.count > 1:
        raise UserError("CONFIG -: one process alone can read stdin; give a file")
    try:
        return sys.stdin.buffer.read(MOST_YAML + 1).decode(), "the YAML"
    except UnicodeDecodeError:
        raise UserError("the YAML on stdin: cannot be read (not UTF-8)") from None


def _options(merge_options: MergeOptions, team: Team) -> MergeOptions:
    """Apply logging, seed and threads, and find the device."""
    import torch

    from neuron_methods.models.devices import check_multi_gpu, resolve_device

    # mergekit also sets the number of threads between operations, which torch allows once per process.
    merge_options.model_copy(update={"num_threads": None}).apply_global_options()
    # The Hub's client prints its own messages; with the root logger that mergekit sets up each would come twice.
    logging.getLogger("huggingface_hub").propagate = False
    if merge_options.num_threads is not None:
        torch.set_num_threads(merge_options.num_threads)
    asked = click.get_current_context().params["device"]
    if asked is not None:
        device = resolve_device(asked)
    else:
        option = "--gpu-rich" if merge_options.gpu_rich else "--cuda" if merge_options.cuda else "--device"
        device = resolve_device(merge_options.device or "cpu", option)
    if merge_options.multi_gpu:
        check_multi_gpu(team.count)
    return merge_options.model_copy(update={"device": device})
