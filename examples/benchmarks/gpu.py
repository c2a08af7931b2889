"""On a GPU: every method against the CPU, and how fast it is there.

    python examples/benchmarks/gpu.py                    one matrix of 8192 × 8192, three bf16 experts
    python examples/benchmarks/gpu.py --experts 8 --width 16384

For each method: how far the merge is from the CPU's on a smaller matrix, relative to the merged update's length; the
time of one merge of the large matrix, the best of some; and the bandwidth that comes to, inputs read once and the
result written once, beside that of a plain copy on the same device. It has been written without a GPU at hand, and
every method has been run through it on the CPU (`--device cpu`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mergekit.merge_methods import merge_state_dicts
from torch import Tensor

import neuron_methods

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 1.0},
    "ties": {"weight": 1.0, "density": 0.15},
    "neuro_merging": {"density": 0.15},
    "neuron_response": {},
}
NAME = "model.layers.0.mlp.up_proj.weight"


def models(width: int, experts: int, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Make a base of one matrix and experts near it, in bf16; the same numbers wherever they are."""
    generator = torch.Generator("cpu").manual_seed(0)
    base = torch.empty(width, width, dtype=torch.bfloat16, device="cpu").normal_(0, 0.02, generator=generator)
    made = {"base": {NAME: base.to(device)}}
    for index in range(experts):
        noise = torch.empty_like(base).normal_(0, 0.001, generator=generator)
        made[f"expert-{index}"] = {NAME: (base + noise).to(device)}
    return made


def merged(method: str, inputs: dict[str, dict[str, Tensor]]) -> Tensor:
    """Merge by one method, on the device of the inputs."""
    parameters = METHODS[method]
    if method == "linear":
        inputs = {name: tensors for name, tensors in inputs.items() if name != "base"}
        return merge_state_dicts(inputs, method, parameters=parameters)[NAME]
    return merge_state_dicts(inputs, method, base="base", parameters=parameters)[NAME]


def parity(method: str, device: torch.device, experts: int, width: int) -> float:
    """Measure how far the merge there is from the CPU's, relative to what the merge adds to the base."""
    on_cpu = models(width, experts, torch.device("cpu"))
    base = on_cpu["base"][NAME].double()
    expected = merged(method, on_cpu).double()
    found = merged(method, models(width, experts, device))
    if found.device.type != device.type:
        raise SystemExit(f"{method}: the merge is on {found.device}, its inputs on {device}")
    return float((found.cpu().double() - expected).norm() / (expected - base).norm())


def best_seconds(run: Any, device: torch.device, rounds: int) -> float:
    """Time something, the best of some rounds after one to get warm."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="of torch (default cuda)")
    parser.add_argument("--width", type=int, default=8192, help="of the square matrix that is timed (default 8192)")
    parser.add_argument("--experts", type=int, default=3, help="(default 3)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the best counts (default 5)")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; run this on a machine with one, or try it with --device cpu --width 256")
    neuron_methods.register()
    inputs = models(arguments.width, arguments.experts, device)
    source = inputs["base"][NAME]
    target = torch.empty_like(source)
    copying = 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device, arguments.rounds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"{name}, torch {torch.__version__}: a copy at {copying / 1e9:.1f} GB/s")
    figures: dict[str, Any] = {"device": name, "torch": torch.__version__, "copy bytes a second": copying}
    for method in arguments.methods:
        off = parity(method, device, arguments.experts, min(arguments.width, 512))
        seconds = best_seconds(lambda method=method: merged(method, inputs), device, arguments.rounds)
        # The base is an input of `linear` in no merge here.
        moved = source.nbytes * (arguments.experts + (1 if method == "linear" else 2))
        figures[method] = {"relative error": off, "seconds": seconds, "bytes a second": moved / seconds}
        print(
            f"{method}: {off:.1e} from the CPU's; {seconds * 1e3:.1f} ms, {moved / seconds / 1e9:.1f} GB/s, "
            f"{moved / seconds / copying:.2f} of a copy's"
        )
    if device.type == "cuda":
        figures["peak bytes"] = torch.cuda.max_memory_allocated(device)
        print(f"peak of the device's memory: {figures['peak bytes'] / 1e9:.2f} GB")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
