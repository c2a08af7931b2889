"""Large models: generated Llamas merged by whole processes, held to a formula for memory and to the disk's speed.

    python examples/benchmarks/scale.py                         1.1 B parameters, three experts, full
    python examples/benchmarks/scale.py --size 7b --experts 8 --kind lora --processes 2
    python examples/benchmarks/scale.py --plan 70b --rows rows.json

Each merge is a process of its own, from the interpreter's start to the verified output; its rows are kept as they come
(`--rows`), so that a run that was interrupted goes on where it was. Beyond `--distinct` experts, the files of further
ones are hard links to those of earlier ones: the disk holds two experts of 7 B beside their base, not eight, and all
eight are read. Weights are random: time does not depend on what was learned.

Memory is held to what the plan of the merge promises: what the interpreter and its packages take, and for each tensor
its inputs, the method's scratch memory, the result, and two results that wait to be written. Of files that are mapped,
which the system can take back at any time, it is 64 MiB and two tensors for each model.

The physical limit is the bytes read and written at the speed at which this disk reads and writes, measured in the same
run. `--plan` computes from the measured rows what a model of 70 or 405 B would take.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import machine
from safetensors import safe_open
from safetensors.torch import save_file

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 1.0},
    "ties": {"weight": 1.0, "density": 0.15},
    "neuro_merging": {"density": 0.15},
    "neuron_response": {},
}
RANK = 16
SHARD_BYTES = 10**9


@dataclass(frozen=True)
class Shape:
    """A Llama: numbers of its config."""

    hidden: int
    inner: int
    layers: int
    heads: int
    shared_heads: int
    tokens: int

    def config(self) -> dict[str, Any]:
        """Give config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "vocab_size": self.tokens,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.shared_heads,
            "tie_word_embeddings": False,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """List all tensors with their shapes."""
        shared = self.hidden * self.shared_heads // self.heads
        yield "model.embed_tokens.weight", (self.tokens, self.hidden)
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            yield f"{at}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{at}.self_attn.k_proj.weight", (shared, self.hidden)
            yield f"{at}.self_attn.v_proj.weight", (shared, self.hidden)
            yield f"{at}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{at}.mlp.gate_proj.weight", (self.inner, self.hidden)
            yield f"{at}.mlp.up_proj.weight", (self.inner, self.hidden)
            yield f"{at}.mlp.down_proj.weight", (self.hidden, self.inner)
            yield f"{at}.input_layernorm.weight", (self.hidden,)
            yield f"{at}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.tokens, self.hidden)

    @property
    def parameters(self) -> int:
        """Count the entries of all tensors."""
        return sum(torch.Size(shape).numel() for _, shape in self.tensors())


SHAPES = {
    "tiny": Shape(64, 176, 2, 4, 2, 512),
    "0.1b": Shape(768, 2048, 12, 12, 4, 16000),
    "1.1b": Shape(2048, 5632, 22, 32, 4, 32000),
    "3b": Shape(3072, 8192, 26, 24, 8, 32000),
    "7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "70b": Shape(8192, 28672, 80, 64, 8, 128256),
    "405b": Shape(16384, 53248, 126, 128, 8, 128256),
}


@dataclass
class Row:
    """One merge, measured.

    Attributes:
        size, kind, experts, method, processes: what was merged, and by how many processes.
        seconds, cpu_seconds: of all processes, wall clock and processor.
        peak_bytes: resident memory of the largest process.
        own_bytes: of it what no file backs, as seen twenty times a second.
        promised_bytes: what the formula allows for the latter.
        read_bytes: that the merge has read, out of the cache or not.
        disk_bytes: that came from the disk.
        written_bytes: size of the output.
        read_speed, write_speed: of the disk in the same run, in bytes a second.
    """

    size: str
    kind: str
    experts: int
    method: str
    processes: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    own_bytes: int = 0
    promised_bytes: int = 0
    read_bytes: int = 0
    disk_bytes: int = 0
    written_bytes: int = 0
    read_speed: float = 0.0
    write_speed: float = 0.0

    @property
    def limit_seconds(self) -> float:
        """Reading and writing alone, at the disk's speed."""
        return self.read_bytes / self.read_speed + self.written_bytes / self.write_speed

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells the row from others."""
        return self.size, self.kind, self.experts, self.method, self.processes


def write_model(place: Path, shape: Shape, seed: int, base: Path | None = None) -> None:
    """Write a checkpoint with random weights in shards; those of an expert are the base's and noise."""
    if (place / "config.json").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    # A normal number for each weight would take longer than most merges; these repeat, from another one on each time.
    pool = torch.empty(2**22 + 1, dtype=torch.bfloat16).normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
    names: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    files = 0

    def flush() -> None:
        nonlocal files
        files += 1
        save_file(shard, place / f"model-{files:05d}.safetensors", metadata={"format": "pt"})
        names.update(dict.fromkeys(shard, f"model-{files:05d}.safetensors"))
        shard.clear()

    held = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"] if base else {}
    for number, (name, size) in enumerate(shape.tensors()):
        entries = torch.Size(size).numel()
        values = pool.roll(7919 * number).repeat(-(-entries // len(pool)))[:entries].view(size).clone()
        if base is not None:
            with safe_open(base / held[name], "pt") as file:
                values.mul_(0.02).add_(file.get_tensor(name))
        if shard and sum(tensor.nbytes for tensor in shard.values()) + values.nbytes > SHARD_BYTES:
            flush()
        shard[name] = values
    flush()
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (place / "config.json").write_text(json.dumps(shape.config()))


def write_adapter(place: Path, shape: Shape, seed: int, base: Path) -> None:
    """Write a LoRA adapter of rank 16 on all linear modules of the layers."""
    if (place / "adapter_config.json").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, size in shape.tensors():
        if "_proj." in name:
            path = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{path}.lora_A.weight"] = torch.empty(RANK, size[1]).normal_(0, 0.02, generator=generator)
            factors[f"{path}.lora_B.weight"] = torch.empty(size[0], RANK).normal_(0, 0.002, generator=generator)
    save_file(factors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    config |= {"target_modules": modules, "base_model_name_or_path": str(base)}
    (place / "adapter_config.json").write_text(json.dumps(config))


def link(place: Path, original: Path) -> None:
    """Make a directory whose files are hard links to another's."""
    if not place.exists():
        place.mkdir()
        for file in original.iterdir():
            os.link(file, place / file.name)


def write_models(directory: Path, shape: Shape, kind: str, experts: int, distinct: int) -> tuple[Path, list[str]]:
    """Write base and experts; give the base, and the experts as a YAML names them."""
    base = directory / "base"
    write_model(base, shape, 0)
    places = [directory / f"{kind}-{index}" for index in range(experts)]
    for index, place in enumerate(places):
        if index >= distinct:
            link(place, places[index % distinct])
        elif kind == "full":
            write_model(place, shape, index + 1, base)
        else:
            write_adapter(place, shape, index + 1, base)
    return base, [str(place) if kind == "full" else f"{base}+{place}" for place in places]


def configuration(method: str, base: Path, experts: list[str]) -> str:
    """Write the YAML of one merge, which is JSON."""
    models = [{"model": expert} for expert in experts]
    content: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    content["parameters"] = METHODS[method]
    if method != "linear":
        content["base_model"] = str(base)
    return json.dumps(content)


def write_hollow(directory: Path, shape: Shape, experts: int) -> tuple[Path, list[str]]:
    """Write a base and experts that are headers alone, in files that take no room: enough to plan a merge of them."""
    base = directory / "base"
    base.mkdir(parents=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, axes in shape.tensors():
        size += 2 * torch.Size(axes).numel()
        if shards[-1] and size > 5 * SHARD_BYTES:
            shards.append({})
            size = 2 * torch.Size(axes).numel()
        shards[-1][name] = axes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file, end, header = base / f"model-{number:05d}.safetensors", 0, {}
        for name, axes in shard.items():
            begin, end = end, end + 2 * torch.Size(axes).numel()
            header[name] = {"dtype": "BF16", "shape": axes, "data_offsets": [begin, end]}
        content = json.dumps(header).encode()
        file.write_bytes(len(content).to_bytes(8, "little") + content)
        os.truncate(file, 8 + len(content) + end)
        weight_map |= dict.fromkeys(shard, file.name)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (base / "config.json").write_text(json.dumps(shape.config()))
    places = [directory / f"expert-{index}" for index in range(experts)]
    for place in places:
        link(place, base)
    return base, list(map(str, places))


def disk_speeds(directory: Path, megabytes: int) -> tuple[float, float]:
    """Measure how fast this disk reads and writes, in bytes a second, by a file that is synchronised and dropped."""
    place, block = directory / "speed", os.urandom(2**20)
    started = time.perf_counter()
    with place.open("wb") as file:
        for _ in range(megabytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        writing = time.perf_counter() - started
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    with place.open("rb", buffering=0) as file:
        while file.read(2**22):
            pass
    reading = time.perf_counter() - started
    place.unlink()
    return megabytes * 2**20 / reading, megabytes * 2**20 / writing


class Watch(threading.Thread):
    """Looks at a process and its children, and keeps the most that one of them has had of memory that no file backs."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.process, self.most, self.done = process, 0, threading.Event()

    def run(self) -> None:
        """Look twenty times a second until `done`."""
        while not self.done.wait(0.05):
            for process in _with_children(self.process):
                self.most = max(self.most, _anonymous(process))


def _with_children(process: int) -> list[int]:
    found = [process]
    for one in found:
        try:
            found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
        except OSError:
            continue
    return found


def _anonymous(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def planned(config: Path) -> Any:
    """Plan a merge: its memory, and the bytes that it will read and write."""
    from neuron_methods.plugin.merging import plan_merge

    return plan_merge(config.read_text(), config_name=str(config))


def merge(config: Path, out: Path, row: Row, threads: int) -> None:
    """Run one merge to its end, and put into `row` what it took.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    launch = ["-m", "neuron_methods"]
    if row.processes > 1:
        # Which launches processes on the CPU where there is no GPU.
        several = ["--multi_gpu", "--num_processes", str(row.processes)]
        launch = ["-m", "accelerate.commands.launch", *several, *launch]
    command = [sys.executable, *launch, "merge", str(config), str(out), "--quiet", "--no-write-model-card"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        watch = Watch(process.pid)
        watch.start()
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        watch.done.set()
        watch.join()
    row.seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{said}")
    row.cpu_seconds = usage.ru_utime + usage.ru_stime
    row.peak_bytes, row.own_bytes = usage.ru_maxrss * 1024, watch.most
    row.disk_bytes = usage.ru_inblock * 512  # what /proc/PID/io calls read_bytes, of a process that has ended
    row.written_bytes = sum(file.stat().st_size for file in out.iterdir())


def table(rows: list[Row]) -> str:
    """Show rows in Markdown, as ratios to `linear` of the same models in one process."""
    lines = [
        "| models | method | processes | time | processor time | of the disk's limit | own memory, of promised |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        whole = [r for r in rows if r.key == (row.size, row.kind, row.experts, "linear", 1)]
        time_ratio, cpu_ratio = (
            (f"{row.seconds / whole[0].seconds:.2f} ×", f"{row.cpu_seconds / whole[0].cpu_seconds:.2f} ×")
            if whole
            else ("", "")
        )
        limit, memory = row.seconds / row.limit_seconds, row.own_bytes / row.promised_bytes
        lines.append(
            f"| {row.size}, {row.experts} {row.kind} | `{row.method}` | {row.processes} | {time_ratio} | {cpu_ratio} | "
            f"{limit:.1f} × | {memory:.2f} × |"
        )
    return "\n".join(lines)


def read_rows(place: Path | None) -> list[Row]:
    """Read the rows of an earlier run, none where there was none."""
    return [Row(**row) for row in json.loads(place.read_text())["rows"]] if place and place.exists() else []


def measure(arguments: argparse.Namespace, directory: Path, rows: list[Row]) -> None:
    """Merge by every method that has no row yet."""
    shape = SHAPES[arguments.size]
    directory.mkdir(parents=True, exist_ok=True)
    speeds = disk_speeds(directory, 16 if arguments.size == "tiny" else 1024)
    base, experts = write_models(directory, shape, arguments.kind, arguments.experts, arguments.distinct)
    for method in arguments.methods:
        row = Row(arguments.size, arguments.kind, arguments.experts, method, arguments.processes)
        if any(row.key == earlier.key for earlier in rows):
            continue
        config, out = directory / f"{method}.yml", directory / "merged"
        shutil.rmtree(out, ignore_errors=True)
        config.write_text(configuration(method, base, experts))
        plan = planned(config)
        row.promised_bytes, row.read_bytes = plan.memory.of_process, plan.bytes_to_read
        merge(config, out, row, arguments.threads)
        shutil.rmtree(out)
        row.read_speed, row.write_speed = speeds
        rows.append(row)
        print(f"  {json.dumps(asdict(row))}", file=sys.stderr, flush=True)
        if arguments.rows:
            content = {"machine": machine(), "rows": [asdict(row) for row in rows]}
            arguments.rows.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Measure, or plan, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[*SHAPES][:-2], default="1.1b", help="of the model (default 1.1b)")
    parser.add_argument("--experts", type=int, default=3, help="(default 3)")
    parser.add_argument("--kind", choices=["full", "lora"], default="full", help="of the experts (default full)")
    parser.add_argument("--distinct", type=int, default=2, help="experts with files of their own (default 2)")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--processes", type=int, default=1, help="that accelerate launches (default 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each process (default: cores)")
    parser.add_argument("--directory", type=Path, help="where models are made and kept (default: temporary)")
    parser.add_argument("--rows", type=Path, help="JSON to keep rows in, and to go on from")
    parser.add_argument("--plan", choices=["70b", "405b"], help="compute from the rows what this model would take")
    arguments = parser.parse_args()
    rows = read_rows(arguments.rows)
    if arguments.plan:
        from scale_plan import plan_table

        print(plan_table(arguments.plan, rows))
        return
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="neuron-scale-"))
    try:
        measure(arguments, directory, rows)
    finally:
        if arguments.directory is None:
            shutil.rmtree(directory, ignore_errors=True)
    print(f"{machine()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
