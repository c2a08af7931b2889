"""Merging by response against `linear`, `ties` and FusionBench's TSV-M and Iso-C: whole processes, in one run.

    python examples/benchmarks/responses.py                SmolLM2-135M, three bf16 experts
    python examples/benchmarks/responses.py --size 1.1b    a generated Llama (11 GB on disk, removed); 0.1b, 3b, 7b
    python examples/benchmarks/responses.py --size 1.1b --only linear neuron_response --device cuda --rounds 1

`neuron_response` merges full experts without data (by as many rows as it takes, and by 256) and with measured inputs,
and LoRA adapters of rank 16, beside `linear` of the same adapters, to a model and to an adapter. All that is merged is
random: experts are the base and noise, inputs are factors of 1,024 rows, adapters are drawn. Rounds are interleaved and
medians compared; a table of them is printed after every merge. All but FusionBench's are run by
`mergekit-neuron merge`. The functions of FusionBench (pip install fusion-bench), which merge in memory and on the CPU,
load and save safetensors in a process of their own; where it is not installed their rows are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from adapters import make_adapter
from measuring import Run, machine, make_expert, run_process
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scale_models import SHAPES, write_models
from whole_process import smollm2

from neuron_methods.methods.inputs_file import InputsInfo, save_inputs

EXPERTS = 3
ROWS = 1024
PEERS = ("tsv_m", "iso_c")
SMOLLM2 = "135m"
SIZES = (SMOLLM2, *(size for size in SHAPES if size not in ("70b", "405b")))


def make_models(directory: Path, size: str) -> tuple[Path, list[str], list[str], list[Path]]:
    """Make what is merged: the base, full experts and adapters as a YAML names them, and files of inputs."""
    if size == SMOLLM2:
        base = smollm2(directory)
        full = [str(directory / f"full-{i}") for i in range(EXPERTS)]
        adapters = [directory / f"lora-{i}" for i in range(EXPERTS)]
        for seed, (expert, adapter) in enumerate(zip(full, adapters, strict=True)):
            make_expert(base, Path(expert), seed)
            make_adapter(base, adapter, None, seed)
        lora = [f"{base}+{adapter}" for adapter in adapters]
    else:
        base, full = write_models(directory, SHAPES[size], "full", EXPERTS, EXPERTS)
        _, lora = write_models(directory, SHAPES[size], "lora", EXPERTS, EXPERTS)
    profiles = [directory / f"inputs-{i}.safetensors" for i in range(EXPERTS)]
    for seed, profile in enumerate(profiles):
        make_inputs(base, profile, seed)
    return base, full, lora, profiles


def make_inputs(base: Path, place: Path, seed: int) -> None:
    """Write a file of inputs as `profile --inputs` does, of random factors."""
    if place.exists():
        return
    generator = torch.Generator().manual_seed(seed)
    modules, widths = {}, {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, no mapping
                shape = opened.get_slice(name).get_shape()
                if len(shape) == 2 and "embed" not in name:
                    module = name.removesuffix(".weight")
                    layer, _, own = module.rpartition(".")
                    shared = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}
                    modules[module] = f"{layer}.{shared.get(own, own)}"
                    widths[modules[module]] = shape[1]
    factors = {
        factor: torch.randn(min(ROWS, width), width, generator=generator).bfloat16() for factor, width in widths.items()
    }
    tokens = dict.fromkeys(factors, ROWS)
    save_inputs(place, InputsInfo(model=place.stem, model_type="llama", modules=modules, tokens=tokens), factors)


def weights(model: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint, in float32."""
    read = [load_file(file) for file in sorted(model.glob("*.safetensors"))]
    return {name: tensor.float() for tensors in read for name, tensor in tensors.items()}


def merge_by_peer(peer: str, out: Path, base: Path, experts: list[Path]) -> None:
    """Merge by a function of FusionBench's package, from files to a file."""
    here = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(here / "leaderboard"), str(here / "zoo")]
    import peers

    origin = weights(base)
    merged = getattr(peers, peer)(origin, {expert.name: weights(expert) for expert in experts}, {})
    out.mkdir()
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in merged.items()}, out / "model.safetensors")


def recipe(method: str, base: Path, experts: list[str], more: str = "", profiles: list[Path] | None = None) -> str:
    """The YAML of one merge."""
    lines = []
    for number, expert in enumerate(experts):
        lines.append(f"  - model: {expert}")
        if profiles is not None:
            lines.append(f"    parameters: {{profile: {profiles[number]}}}")
    if method == "linear":
        lines.append(f"  - model: {base}")
    based = "" if method == "linear" else f"base_model: {base}\n"
    listed = "\n".join(lines)
    return f"merge_method: {method}\n{based}models:\n{listed}\ndtype: bfloat16\n{more}\n"


def recipes(base: Path, full: list[str], lora: list[str], profiles: list[Path]) -> dict[str, str]:
    """The YAML of every row of ours and of mergekit's."""
    return {
        "linear": recipe("linear", base, full, "parameters: {weight: 1.0}"),
        "ties": recipe("ties", base, full, "parameters: {weight: 1.0, density: 0.15}"),
        "neuron_response": recipe("neuron_response", base, full),
        "neuron_response, 256 rows": recipe("neuron_response", base, full, "parameters: {rows: 256}"),
        "neuron_response, inputs": recipe("neuron_response", base, full, profiles=profiles),
        "linear, LoRA": recipe("linear", base, lora, "parameters: {weight: 1.0}"),
        "neuron_response, LoRA": recipe("neuron_response", base, lora),
        "neuron_response, LoRA to LoRA": recipe("neuron_response", base, lora),
    }


def command_of(row: str, config: Path, out: Path, device: str) -> list[str]:
    """Say how a row that has a YAML is merged."""
    command = [sys.executable, "-m", "neuron_methods", "merge", str(config), str(out), "--quiet", "--device", device]
    return [*command, "--as-adapter"] if row.endswith("to LoRA") else command


def medians_of(runs: dict[str, list[Run]]) -> dict[str, dict[str, float]]:
    """Take the medians of each row."""
    return {
        row: {
            "seconds": statistics.median(run.seconds for run in each),
            "seconds of CPU": statistics.median(run.cpu_seconds for run in each),
            "peak bytes": statistics.median(run.peak_bytes for run in each),
        }
        for row, each in runs.items()
    }


def table(runs: dict[str, list[Run]]) -> str:
    """Show the medians in Markdown, beside those of `linear` of the same experts and of TSV-M."""
    medians = medians_of(runs)
    lines = [
        "| merge | runs | seconds | of CPU | peak | to `linear`: time, CPU, peak | to TSV-M |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, own in medians.items():
        beside = []
        for peer in ("linear, LoRA" if "LoRA" in row else "linear", "tsv_m"):
            ratios = [f"{value / medians[peer][what]:.2f} ×" for what, value in own.items()] if peer in medians else []
            beside.append(", ".join(ratios))
        lines.append(
            f"| {row} | {len(runs[row])} | {own['seconds']:.1f} | {own['seconds of CPU']:.1f} | "
            f"{own['peak bytes'] / 1e9:.2f} GB | {beside[0]} | {beside[1]} |"
        )
    return "\n".join(lines)


def measure(arguments: argparse.Namespace, directory: Path, runs: dict[str, list[Run]]) -> None:
    """Make all merges, a round of all rows after the other."""
    base, full, lora, profiles = make_models(directory, arguments.size)
    rows = recipes(base, full, lora, profiles)
    peers = PEERS if importlib.util.find_spec("fusion_bench") is not None else ()
    if not peers:
        print("TSV-M and Iso-C left out: pip install fusion-bench", flush=True)
    for _ in range(arguments.rounds):
        for row in (*rows, *peers):
            if arguments.only and row not in arguments.only:
                continue
            out, config = directory / "merged", directory / "merge.yml"
            shutil.rmtree(out, ignore_errors=True)
            if row in peers:
                command = [sys.executable, __file__, "--peer", row, str(out), str(base), *full]
            else:
                config.write_text(rows[row])
                command = command_of(row, config, out, arguments.device)
            runs.setdefault(row, []).append(run_process(command))
            shutil.rmtree(out)
            print(f"{table(runs)}\n", flush=True)


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default=SMOLLM2, help=f"of the model (default {SMOLLM2}: SmolLM2)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--only", nargs="+", choices=(*recipes(Path(), [], [], []), *PEERS), help="these rows")
    parser.add_argument("--device", default="cpu", help="that all but FusionBench's merge on (default cpu)")
    parser.add_argument("--directory", type=Path, help="where models are made and kept (default: temporary)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--peer", nargs="+", metavar="ARGUMENT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        peer, out, base, *experts = arguments.peer
        return merge_by_peer(peer, Path(out), Path(base), [Path(expert) for expert in experts])
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="neuron-benchmark-"))
    directory.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Run]] = {}
    try:
        measure(arguments, directory, runs)
    finally:
        if arguments.directory is None:
            shutil.rmtree(directory, ignore_errors=True)
    print(f"{machine()}; {arguments.size}, {EXPERTS} experts, on {arguments.device}")
    if arguments.json:
        figures = {
            "machine": machine(),
            "size": arguments.size,
            "device": arguments.device,
            "medians": medians_of(runs),
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
