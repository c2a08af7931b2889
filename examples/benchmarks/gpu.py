"""On a GPU: every method against the CPU, and how fast it is there.

    python examples/benchmarks/gpu.py                    one matrix of 8192 × 8192, three bf16 experts
    python examples/benchmarks/gpu.py --experts 8 --width 16384
    python examples/benchmarks/gpu.py --whole 1.1b       whole merges of generated checkpoints, full and adapters

For each method: how far the merge is from the CPU's on a smaller matrix, relative to the merged update's length; the
time of one merge of the large matrix, the best of some; and the bandwidth that comes to, inputs read once and the
result written once, beside that of a plain copy on the same device.

Whole merges are made by the pipeline of the command, from reading to the verified output, on the CPU and then on the
device. What is told of both is their time, without that of Python's imports, and how far the outputs, which are rounded
to bfloat16, are apart: the share of weights that differ, and the largest difference in units of bfloat16's spacing.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import machine
from mergekit.merge_methods import merge_state_dicts
from mergekit.options import MergeOptions
from safetensors import safe_open
from scale import SHAPES, write_models
from torch import Tensor

import neuron_methods

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 1.0},
    "ties": {"weight": 1.0, "density": 0.15},
    "neuro_merging": {"density": 0.15},
    "neuron_response": {},
}
NAME = "model.layers.0.mlp.up_proj.weight"
#: Whole merges: every method of ours, and those of mergekit that users compare with.
WHOLE: dict[str, dict[str, Any]] = METHODS | {
    "task_arithmetic": {"weight": 0.4},
    "sce": {"select_topk": 0.5},
    "multislerp": {"weight": 1.0},
    "breadcrumbs": {"weight": 1.0, "density": 0.9, "gamma": 0.01},
    "model_stock": {},
    "min_merging": {"density": 0.3},
    "neuron_merge": {"groups": "groups.json"},
}


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


def whole_configuration(method: str, base: Path, experts: list[str], directory: Path) -> str:
    """Write the YAML of one merge, which is JSON; and the groups of neurons, every second one general."""
    config: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    parameters: dict[str, Any] = {**WHOLE[method]}
    config["models"] = [{"model": expert, "parameters": {}} for expert in experts]
    if method == "neuron_merge":
        from neuron_methods.methods.groups_file import groups_from_labels

        shape = json.loads((base / "config.json").read_text())
        half = ["general", "own"] * (shape["intermediate_size"] // 2)
        labels = {f"layers.{layer}": half for layer in range(shape["num_hidden_layers"])}
        parameters["groups"] = str(directory / "groups.json")
        groups_from_labels(str(base), shape["model_type"], labels, {}).write(parameters["groups"])
        for model in config["models"]:
            model["parameters"]["group"] = "own"
    if method != "linear":
        config["base_model"] = str(base)
    return json.dumps(config | {"parameters": parameters})


def apart(one: Path, other: Path) -> tuple[float, float]:
    """Compare two outputs: the share of weights that differ, and the largest difference in units of bf16's spacing."""
    differ, entries, most = 0, 0, 0.0
    files = [{key: file for file in place.glob("*.safetensors") for key in _keys(file)} for place in (one, other)]
    if files[0].keys() != files[1].keys():
        raise SystemExit(f"{one} and {other} do not hold the same tensors")
    for key in files[0]:
        with safe_open(files[0][key], "pt") as first, safe_open(files[1][key], "pt") as second:
            found, expected = first.get_tensor(key).float(), second.get_tensor(key).float()
        unequal = found != expected
        entries += found.numel()
        if count := int(unequal.sum()):
            differ += count
            found, expected = found[unequal], expected[unequal]
            spacing = torch.exp2(torch.floor(torch.log2(torch.maximum(found.abs(), expected.abs()))) - 7)
            most = max(most, float(((found - expected).abs() / spacing).max()))
    return differ / entries, most


def _keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def whole_merges(arguments: argparse.Namespace, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """Merge whole checkpoints on the CPU and on the device; give the figures by kind of expert and method."""
    from neuron_methods.plugin.merging import merge_to_directory

    figures: dict[str, Any] = {}
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="neuron-gpu-"))
    directory.mkdir(parents=True, exist_ok=True)
    try:
        for kind in ("full", "lora"):
            base, experts = write_models(directory, SHAPES[arguments.whole], kind, arguments.experts, 2)
            for method in arguments.methods or WHOLE:
                config, seconds = whole_configuration(method, base, experts, directory), []
                for place, where in (("on-cpu", "cpu"), ("on-device", device.type)):
                    started = time.perf_counter()
                    options = MergeOptions(device=where, quiet=True, write_model_card=False)
                    merge_to_directory(config, directory / place, progress=False, force=True, options=options)
                    seconds.append(time.perf_counter() - started)
                differ, most = apart(directory / "on-device", directory / "on-cpu")
                figures[f"{method}, {kind}"] = {"seconds": seconds, "differ": differ, "spacings": most}
                say(
                    f"{method}, {arguments.experts} {kind} of {arguments.whole}: {seconds[0]:.1f} s on the CPU, "
                    f"{seconds[1]:.1f} s there; {differ:.2e} of the weights differ, by {most:.1f} spacings at most"
                )
    finally:
        if arguments.directory is None:
            shutil.rmtree(directory, ignore_errors=True)
    return figures


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
    parser.add_argument("--methods", nargs="+", choices=[*WHOLE], help="(default: all)")
    parser.add_argument(
        "--whole", choices=[*SHAPES][:-2], metavar="SIZE", help=f"merge models: {', '.join([*SHAPES][:-2])}"
    )
    parser.add_argument("--directory", type=Path, help="where whole models are made and kept (default: temporary)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; run this on a machine with one, or try it with --device cpu --width 256")
    neuron_methods.register()
    if arguments.whole:
        say = functools.partial(print, flush=True)
        say(machine())
        figures = whole_merges(arguments, device, say)
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
        return
    inputs = models(arguments.width, arguments.experts, device)
    source = inputs["base"][NAME]
    target = torch.empty_like(source)
    copying = 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device, arguments.rounds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"{name}, torch {torch.__version__}: a copy at {copying / 1e9:.1f} GB/s")
    figures = {"device": name, "torch": torch.__version__, "copy bytes a second": copying}
    for method in arguments.methods or METHODS:
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
