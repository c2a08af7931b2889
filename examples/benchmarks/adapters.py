"""Adapters as experts: `neuro_merging` reading them lazily against mergekit's own way, in one run.

    python examples/benchmarks/adapters.py

SmolLM2-135M and three LoRA adapters of rank 16 on all linear modules (random factors: time does not depend on what was
learned). Three whole processes, interleaved, the median of each compared:

- `neuro_merging` on base+adapter, read tensor by tensor;
- the same on three full experts, for the memory;
- mergekit 0.1.5 without this package (MERGEKIT_NEURON_AUTOLOAD=0): `ties` at the same density, each adapter merged into
  a full model in an empty `--lora-merge-cache` first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from measuring import Run, machine, run_process
from whole_process import smollm2

DENSITY = 0.15


def make_adapter(base: Path, directory: Path, full: Path | None, seed: int) -> None:
    """Write a LoRA adapter with random factors, and the full model it makes, where that is wanted."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if (directory / "adapter_config.json").exists() and (full is None or (full / "config.json").exists()):
        return
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.002)
    model.save_pretrained(directory)
    if full is not None:
        model.merge_and_unload().to(torch.bfloat16).save_pretrained(full)


def bytes_in(directory: Path) -> int:
    """Size of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def main() -> None:
    """Run the benchmark and print its ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--directory", type=Path, help="where models are made and kept (default: temporary)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="neuron-benchmark-"))
    mergekit_yaml = shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent)) or "mergekit-yaml"
    runs: dict[str, list[Run]] = {}
    beyond: dict[str, int] = {}
    try:
        base = smollm2(directory)
        adapters = [directory / f"adapter-{i}" for i in range(3)]
        fulls = [directory / f"adapter-{i}-full" for i in range(3)]
        for seed, (adapter, full) in enumerate(zip(adapters, fulls, strict=True)):
            make_adapter(base, adapter, full, seed)
        lazily = [f"{base}+{adapter}" for adapter in adapters]
        cases = {
            "neuro_merging, adapters": ("neuro_merging", lazily, {}),
            "neuro_merging, full experts": ("neuro_merging", fulls, {}),
            "mergekit's ties, adapters": ("ties", lazily, {"MERGEKIT_NEURON_AUTOLOAD": "0"}),
        }
        for _ in range(arguments.rounds):
            for name, (method, experts, environment) in cases.items():
                out, cache, config = directory / "merged", directory / "cache", directory / "merge.yml"
                listed = "\n".join(f"  - model: {expert}" for expert in experts)
                weight = ", weight: 1.0" if method == "ties" else ""
                config.write_text(
                    f"merge_method: {method}\nbase_model: {base}\nmodels:\n{listed}\ndtype: bfloat16\n"
                    f"parameters: {{density: {DENSITY}{weight}}}\n"
                )
                options = ["--no-copy-tokenizer", "--no-write-model-card"]
                if method == "ties":
                    options += ["--lora-merge-cache", str(cache)]
                cache.mkdir()
                run = run_process([mergekit_yaml, str(config), str(out), *options], environment)
                runs.setdefault(name, []).append(run)
                beyond[name] = run.written_bytes - bytes_in(out)
                print(f"  {name}: {run.seconds:.2f} s, {run.peak_bytes / 1e9:.2f} GB", flush=True)
                shutil.rmtree(out)
                shutil.rmtree(cache)
    finally:
        if arguments.directory is None:
            shutil.rmtree(directory, ignore_errors=True)
    seconds = {name: statistics.median(r.seconds for r in rs) for name, rs in runs.items()}
    peaks = {name: statistics.median(r.peak_bytes for r in rs) for name, rs in runs.items()}
    ours, full, stock = runs
    figures = {
        "machine": machine(),
        "time over mergekit's way": seconds[ours] / seconds[stock],
        "peak memory over full experts": peaks[ours] / peaks[full],
        "bytes written beyond the output": beyond,
        "seconds": seconds,
        "peak bytes": peaks,
    }
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
