"""Merging by response against `linear`, `ties` and FusionBench's TSV-M and Iso-C: whole processes, in one run.

    python examples/benchmarks/responses.py               SmolLM2-135M, three bf16 experts
    python examples/benchmarks/responses.py --llama 1b    a generated Llama of 1.1 B parameters (11 GB on disk, removed)
    python examples/benchmarks/responses.py --llama 30m   one of 30 M, to see that all of it runs

`neuron_response` merges full experts without data and with measured inputs, and LoRA adapters of rank 16 to an adapter.
Everything that is merged is random: experts are the base and noise, inputs are factors of 1,024 rows, adapters are
drawn. Spectra are flat then, so that float32 will do more often than with trained experts: the times are those at
best. Rounds are interleaved and medians compared. All but FusionBench's are run by
`mergekit-neuron merge`. The functions of FusionBench (pip install fusion-bench), which merge
in memory, load and save safetensors in a process of their own; where it is not installed their rows are left out.
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
from transformers import LlamaConfig, LlamaForCausalLM
from whole_process import smollm2

from neuron_methods.methods.inputs_file import InputsInfo, save_inputs

EXPERTS = 3
ROWS = 1024
PEERS = ("tsv_m", "iso_c")
LLAMAS = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "30m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8},
}


def make_llama(directory: Path, size: str) -> Path:
    """A Llama with random weights in bf16, in shards."""
    base = directory / "base"
    if not (base / "config.json").exists():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, num_key_value_heads=4, dtype="bfloat16", **LLAMAS[size]))
        torch.set_default_dtype(torch.float32)
        model.save_pretrained(base, max_shard_size="1GB")
    return base


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


def main() -> None:
    """Run the benchmark and print its ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama", choices=sorted(LLAMAS), help="a generated Llama instead of SmolLM2-135M")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--only", action="append", metavar="ROW", help="this row (may be given several times)")
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
        base = make_llama(directory, arguments.llama) if arguments.llama else smollm2(directory)
        experts = [directory / f"expert-{i}" for i in range(EXPERTS)]
        profiles = [directory / f"inputs-{i}.safetensors" for i in range(EXPERTS)]
        adapters = [directory / f"adapter-{i}" for i in range(EXPERTS)]
        for seed, (expert, profile, adapter) in enumerate(zip(experts, profiles, adapters, strict=True)):
            make_expert(base, expert, seed)
            make_inputs(base, profile, seed)
            make_adapter(base, adapter, None, seed)
        full, lora = [str(expert) for expert in experts], [f"{base}+{adapter}" for adapter in adapters]
        rows = {
            "linear": recipe("linear", base, full, "parameters: {weight: 1.0}"),
            "ties": recipe("ties", base, full, "parameters: {weight: 1.0, density: 0.15}"),
            "neuron_response": recipe("neuron_response", base, full),
            "neuron_response, inputs": recipe("neuron_response", base, full, profiles=profiles),
            "neuron_response, LoRA": recipe("neuron_response", base, lora),
        }
        peers = PEERS if importlib.util.find_spec("fusion_bench") is not None else ()
        if not peers:
            print("TSV-M and Iso-C left out: pip install fusion-bench", flush=True)
        wanted = [row for row in (*rows, *peers) if not arguments.only or row in arguments.only]
        for _ in range(arguments.rounds):
            for row in wanted:
                out, config = directory / "merged", directory / "merge.yml"
                shutil.rmtree(out, ignore_errors=True)
                if row in peers:
                    command = [sys.executable, __file__, "--peer", row, str(out), str(base), *full]
                else:
                    config.write_text(rows[row])
                    ours = [sys.executable, "-m", "neuron_methods", "merge", str(config), str(out), "--quiet"]
                    command = [*ours, "--as-adapter"] if row.endswith("LoRA") else ours
                run = run_process(command)
                runs.setdefault(row, []).append(run)
                shutil.rmtree(out)
                print(
                    f"  {row}: {run.seconds:.1f} s, {run.cpu_seconds:.1f} s of CPU, {run.peak_bytes / 1e9:.2f} GB",
                    flush=True,
                )
    finally:
        if arguments.directory is None:
            shutil.rmtree(directory, ignore_errors=True)
    medians = {
        row: {
            "seconds": statistics.median(run.seconds for run in each),
            "seconds of CPU": statistics.median(run.cpu_seconds for run in each),
            "peak bytes": statistics.median(run.peak_bytes for run in each),
        }
        for row, each in runs.items()
    }
    figures = {
        "machine": machine(),
        "model": f"generated Llama, {arguments.llama}" if arguments.llama else "SmolLM2-135M",
        **{
            f"{row} over {peer}": {what: round(own[what] / medians[peer][what], 2) for what in own}
            for row, own in medians.items()
            for peer in ("linear", "tsv_m")
            if peer in medians and row.startswith("neuron_response")
        },
        "medians": medians,
    }
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
