"""Large models: generated Llamas merged by whole processes, held to a formula for memory and to the disk's speed.

    python examples/benchmarks/scale.py                         1.1 B parameters, three experts, full
    python examples/benchmarks/scale.py --size 7b --experts 8 --kind lora --processes 2
    python examples/benchmarks/scale.py --size 3b 7b --processes 1 2 --methods linear neuron_response --device cuda \
        --at /dev/shm --rows rows.json
    python examples/benchmarks/scale.py --plan 70b --rows rows.json

Where several sizes, kinds, numbers of experts or of processes are given, all combinations are merged by every method.
Each merge is a process of its own, or one launch of several, from the interpreter's start to the verified output; its
row is printed and kept as it comes (`--rows`), so that a run that was interrupted goes on where it was. Models are
written before the first merge of them and removed after the last (but with `--keep`). Beyond `--distinct` experts, the
files of further ones are hard links to those of earlier ones: the disk holds two experts of 7 B beside their base and
the output, 54 GB, and all eight are read. Weights are random: time does not depend on what was learned.

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
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from measuring import machine, run_process
from scale_models import SHAPES, Shape, write_models

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 1.0},
    "ties": {"weight": 1.0, "density": 0.15},
    "neuro_merging": {"density": 0.15},
    "neuron_response": {},
}


@dataclass
class Row:
    """One merge, measured.

    Attributes:
        size, kind, experts, method, processes, device: what was merged, by how many processes, and where.
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
    device: str = "cpu"
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
        return self.size, self.kind, self.experts, self.method, self.processes, self.device

    def __str__(self) -> str:
        return (
            f"{self.size}, {self.experts} {self.kind}, {self.method}, {self.processes} processes, {self.device}: "
            f"{self.seconds:.1f} s, of processors {self.cpu_seconds:.1f} s, of the disk alone {self.limit_seconds:.1f} "
            f"s; peak {self.peak_bytes / 1e9:.2f} GB, own memory {self.own_bytes / 1e9:.2f} of "
            f"{self.promised_bytes / 1e9:.2f} GB promised"
        )


def configuration(method: str, base: Path, experts: list[str]) -> str:
    """Write the YAML of one merge, which is JSON."""
    models = [{"model": expert} for expert in experts]
    content: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    content["parameters"] = METHODS[method]
    if method != "linear":
        content["base_model"] = str(base)
    return json.dumps(content)


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

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process, self.most, self.done = 0, 0, threading.Event()

    @contextmanager
    def of(self, process: int) -> Iterator[None]:
        """Look twenty times a second, until the block is done."""
        self.process = process
        self.start()
        try:
            yield
        finally:
            self.done.set()
            self.join()

    def run(self) -> None:
        """Look until `done`."""
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


def merge(config: Path, out: Path, row: Row, threads: int | None) -> None:
    """Run one merge to its end, and put into `row` what it took.

    Args:
        config: its YAML.
        out: the directory that it makes.
        row: says how.
        threads: of each process; by default its share of the cores.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    launch = ["-m", "neuron_methods"]
    environment = {"OMP_NUM_THREADS": str(threads or max(1, (os.cpu_count() or 1) // row.processes))}
    if row.processes > 1:
        # Which launches processes on the CPU where there is no GPU.
        several = ["--multi_gpu", "--num_processes", str(row.processes)]
        launch = ["-m", "accelerate.commands.launch", *several, *launch]
        if row.device != "auto":  # then accelerate need not give each process a GPU of its own
            environment["ACCELERATE_USE_CPU"] = "1"
    command = [sys.executable, *launch, "merge", str(config), str(out), "--quiet", "--no-write-model-card"]
    command += ["--device", row.device]
    watch = Watch()
    run = run_process(command, environment, watch.of)
    row.seconds, row.cpu_seconds = run.seconds, run.cpu_seconds
    row.peak_bytes, row.own_bytes = run.peak_bytes, watch.most
    row.disk_bytes = run.read_bytes
    row.written_bytes = sum(file.stat().st_size for file in out.iterdir())


def table(rows: list[Row]) -> str:
    """Show rows in Markdown, as ratios to `linear` of the same models in one process."""
    lines = [
        "| models | method | processes, device | time | processor time | of the disk's limit | own memory, of limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        whole = [r for r in rows if r.key == (row.size, row.kind, row.experts, "linear", 1, row.device)]
        time_ratio, cpu_ratio = (
            (f"{row.seconds / whole[0].seconds:.2f} ×", f"{row.cpu_seconds / whole[0].cpu_seconds:.2f} ×")
            if whole
            else ("", "")
        )
        limit, memory = row.seconds / row.limit_seconds, row.own_bytes / row.promised_bytes
        lines.append(
            f"| {row.size}, {row.experts} {row.kind} | `{row.method}` | {row.processes}, {row.device} | {time_ratio} | "
            f"{cpu_ratio} | {limit:.1f} × | {memory:.2f} × |"
        )
    return "\n".join(lines)


def read_rows(place: Path | None) -> list[Row]:
    """Read the rows of an earlier run, none where there was none."""
    return [Row(**row) for row in json.loads(place.read_text())["rows"]] if place and place.exists() else []


def measure(arguments: argparse.Namespace, rows: list[Row]) -> None:
    """Make the merges that have no row yet.

    Raises:
        SystemExit: a merge failed, or the models and an output would not fit on the disk.
    """
    for size, kind, experts in product(arguments.size, arguments.kind, arguments.experts):
        ways = product(arguments.methods, arguments.processes)
        wanted = [Row(size, kind, experts, method, processes, arguments.device) for method, processes in ways]
        missing = [row for row in wanted if all(row.key != earlier.key for earlier in rows)]
        if missing:
            with _directory(arguments, f"neuron-scale-{size}-{kind}-{experts}") as directory:
                _measure(missing, SHAPES[size], directory, arguments, rows)


@contextmanager
def _directory(arguments: argparse.Namespace, name: str) -> Iterator[Path]:
    if arguments.keep:
        kept = (arguments.at or Path(tempfile.gettempdir())) / name
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
    else:
        with tempfile.TemporaryDirectory(prefix="neuron-scale-", dir=arguments.at) as directory:
            yield Path(directory)


def _measure(missing: list[Row], shape: Shape, directory: Path, arguments: argparse.Namespace, rows: list[Row]) -> None:
    """Make merges of the same models, each of one row, and append the rows to those that there are."""
    kind, experts = missing[0].kind, missing[0].experts
    models = 2 + (min(arguments.distinct, experts) if kind == "full" else 0)
    there = sum(file.stat().st_size for file in directory.rglob("*.safetensors"))
    need, free = models * 2 * shape.parameters - there, shutil.disk_usage(directory).free
    if need > free:
        raise SystemExit(f"{directory}: {need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; see --at")
    speeds = disk_speeds(directory, 16 if missing[0].size == "tiny" else 1024)
    started = time.perf_counter()
    base, places = write_models(directory, shape, kind, experts, arguments.distinct)
    print(f"{missing[0].size}, {experts} {kind}: written in {time.perf_counter() - started:.1f} s", flush=True)
    for row in missing:
        config, out = directory / f"{row.method}.yml", directory / "merged"
        config.write_text(configuration(row.method, base, places))
        plan = planned(config)
        row.promised_bytes, row.read_bytes = plan.memory.of_process, plan.bytes_to_read
        row.read_speed, row.write_speed = speeds
        merge(config, out, row, arguments.threads)
        shutil.rmtree(out)
        rows.append(row)
        print(row, flush=True)
        if arguments.rows:
            content = {"machine": machine(), "rows": [asdict(row) for row in rows]}
            arguments.rows.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Measure, or plan, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=[*SHAPES][:-2], default=["1.1b"], help="of the model (1.1b)")
    parser.add_argument("--experts", nargs="+", type=int, default=[3], help="how many (3)")
    parser.add_argument("--kind", nargs="+", choices=["full", "lora"], default=["full"], help="of the experts (full)")
    parser.add_argument("--distinct", type=int, default=2, help="experts with files of their own (2)")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--processes", nargs="+", type=int, default=[1], help="that accelerate launches (1)")
    parser.add_argument("--threads", type=int, help="of each process (its share of the cores)")
    parser.add_argument("--device", default="cpu", help="that each process computes on, as merge has it (cpu)")
    parser.add_argument("--at", type=Path, help="directory that models are written in for the time (/tmp)")
    parser.add_argument("--keep", action="store_true", help="leave the models there, for a further run")
    parser.add_argument("--rows", type=Path, help="JSON to keep rows in, and to go on from")
    parser.add_argument("--plan", choices=["70b", "405b"], help="compute from the rows what this model would take")
    arguments = parser.parse_args()
    rows = read_rows(arguments.rows)
    if arguments.plan:
        from scale_plan import plan_table

        print(plan_table(arguments.plan, rows))
        return
    try:
        measure(arguments, rows)
    finally:
        print(f"\n{machine()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
