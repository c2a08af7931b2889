"""`mergekit-neuron route`: make a routed model of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from neuron_methods.cli.common import PLACE, debug_option, no_bars_option, say
from neuron_methods.cli.push import push_and_tell, push_options, pushing

EPILOG = """\b
Example: routed.yaml, whose relative paths are relative to itself
  base_model: ./base
  experts:
    - name: math
      adapter: ./math-lora
      data: {source: math.jsonl, columns: {input: question, target: answer}}
    - name: german
      adapter: ./german-lora
      data: {source: org/german, split: train, columns: {input: de, target: en}}
      calibration: {source: org/german, split: validation, columns: {input: de, target: en}}

\b
  mergekit-neuron route routed.yaml ./routed --dry-run
  mergekit-neuron route routed.yaml ./routed
  mergekit-neuron generate ./routed --prompt "Was kostet ein Haus?"

\b
Sources are json, jsonl, parquet, csv, tsv files, image folders, directories of data sets, and
hub ids. Columns: input and target (or text alone) for text, image and label for images, text
(with a second text as pair) and label for classifiers of texts.
labels: [0, 1, 2] names the classes of an expert's task, if the head has more.

\b
Adapters may have heads of their own (modules_to_save: classifier, score): the head of the first
expert answers, or the base's where no expert claims the input (the nearest expert's where the
base has none). Its labels are those of the expert's data, or
      head_labels: [cat, dog]   under the expert, in the head's order

\b
Further keys, with their defaults
  dtype: auto            of the base; float32, bfloat16, float16
  check_base: true       refuse adapters that name another base
  batch_size: 16
  background: []         sources of inputs that no expert is for (as under data; optional)
  text:
    max_length: 512      tokens of input and target; longer ones are refused
    separator: " "       between a decoder's input and target, as the experts were trained
    end_of_sequence: true
  enhancement:           per expert, on its calibration data
    enabled: true
    select: best         of the points along the way the one of the lowest loss; smallest: the one
                         that drops most within the tolerance
    tolerance: 0.01      rise of the loss, in nats, that dropping may cost in all
    patience: 3          refused layers before dropping ends
    density: 0.5         share of a core layer's neurons that keep their update
    importance: magnitude   or activation, taylor
    samples: 64          that decide; as many more, if there are, tell whether it is better
  router:
    layer: null          reads the hidden states behind so many layers: one number or several;
                         null: 0, a quarter and half of them
    pooling: moments     or mean, first, last
    hidden: 256
    top_k: 2
    temperature: 1.0
    ood_score: combined  or probability, energy, distance
    in_domain_share: 0.95   of calibration inputs that pass as in domain
    ood_margin: 0.0      lowers the threshold by so many times its gap to their median
    samples: 400         of each expert
    holdout: 0.25        share of them for calibration, where none is given
    epochs: 200
    patience: 20
    learning_rate: 0.001
    seed: 0
  merging:
    redundant: others    what layers get that the first expert does without: the other chosen
                         experts, weighed among themselves; router: by the router's weights as
                         they are; random (ablation); none
    dropped: discard     what an expert does without; keep: for inputs of others it stays
    seed: 0              of random

\b
An interrupted run goes on where it was, when it is started again: finished experts are kept
beside OUT, or in --work-dir, where they also serve the next run with other router settings.
"""


@click.command("route", epilog=EPILOG)
@click.argument("config", type=PLACE)
@click.argument("out", type=PLACE)
@click.option("--static", is_flag=True, help="Merge the adapters into one checkpoint instead, by neuron_response.")
@click.option("--dry-run", is_flag=True, help="Load and check everything, show the plan, write nothing.")
@click.option("--force", is_flag=True, help="Replace OUT if a routed model is there.")
@click.option("--device", help="Where to compute: cpu, cuda, cuda:1, auto.  [default: an accelerator if any]")
@click.option("--work-dir", type=PLACE, help="Keep finished stages here.  [default: beside OUT]")
@click.option("--push-to-hub", metavar="USER/NAME", help="Upload OUT; the token is checked first.")
@push_options
@no_bars_option
@debug_option
def route(
    config: Path,
    out: Path,
    static: bool,
    dry_run: bool,
    force: bool,
    device: str | None,
    work_dir: Path | None,
    push_to_hub: str | None,
    **push: Any,
) -> None:
    """Make OUT, a routed model, as the YAML CONFIG says: adapters, a router, layers merged per input.

    Three stages after MIN-Merging, arXiv:2510.17890 (Liang, reviews); their details are ours. Every expert is stripped
    of what its own calibration data do not miss; a router is trained to tell whose an input is; at run time an expert's
    core layers come from it alone, its redundant ones from the other chosen experts, and an input that is nobody's is
    left to the base.

    With --static OUT is one plain checkpoint instead, to see how close it comes: the adapters merged by
    neuron_response, with what each expert's layers are given on 40 samples of its data, which is kept in OUT.inputs.
    """
    if static and (device is not None or work_dir is not None):
        raise click.UsageError(f"{'--device' if device is not None else '--work-dir'} goes without --static")
    push_to = pushing(push_to_hub, push)
    if static:
        from neuron_methods.routing.static import merge_routed
        from neuron_methods.sharing.publishing import merge_witness

        merge_routed(config, out, dry_run=dry_run, force=force, witness=merge_witness(), report=say)
    else:
        if push_to is not None and push_to_hub is not None:
            from neuron_methods.sharing.publishing import check_base_of_route

            check_base_of_route(config, push_to)
        options = {"dry_run": dry_run, "force": force, "device": device, "work_dir": work_dir}
        from neuron_methods.routing.build import build_routed_model

        build_routed_model(config, out, **options, report=say)
    if push_to is not None and push_to_hub is not None and not dry_run:
        push_and_tell(out, push_to_hub, push_to)
