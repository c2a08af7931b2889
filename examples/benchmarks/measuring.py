"""What the benchmarks share: models to merge, processes timed from outside, the machine in words."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# A process between the benchmark and what it measures: Linux counts to a process's peak what its parent had when it was
# begun, and a benchmark has made models.
_BETWEEN = """
import json, os, sys

told, *command = sys.argv[1:]
process = os.posix_spawnp(command[0], command, os.environ)
_, status, usage = os.wait4(process, 0)
with open(told, "w") as file:
    json.dump([usage.ru_maxrss, usage.ru_inblock, usage.ru_oublock, usage.ru_utime + usage.ru_stime], file)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True)
class Run:
    """One process, measured from outside.

    Attributes:
        seconds: of the clock.
        cpu_seconds: of all processors.
        peak_bytes: of resident memory, files that are mapped included.
        read_bytes: from the disk.
        written_bytes: to files.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    read_bytes: int
    written_bytes: int


def run_process(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    watched: Callable[[int], AbstractContextManager[Any]] = lambda _process: nullcontext(),
) -> Run:
    """Run a command to its end and measure it.

    Args:
        command: program and arguments.
        environment: what is changed of this one.
        watched: entered while it runs, with the process that it is a child of.

    Raises:
        SystemExit: the command failed; its output is shown.
    """
    with tempfile.TemporaryDirectory(prefix="neuron-benchmark-") as folder:
        told = Path(folder) / "usage.json"
        started = time.perf_counter()
        with (
            subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BETWEEN, str(told), *command],
                env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as process,
            watched(process.pid),
        ):
            output, _ = process.communicate()
        seconds = time.perf_counter() - started
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{output}")
        peak, read, written, cpu_seconds = json.loads(told.read_text())
    return Run(seconds, cpu_seconds, peak * 1024, read * 512, written * 512)


def machine() -> str:
    """The machine in words: processor, cores, memory, GPU, torch."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    software = f"Python {platform.python_version()}, torch {torch.__version__}"
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([model, f"{os.cpu_count()} cores", f"{memory:.0f} GiB", *gpus, software])


def make_expert(base: Path, expert: Path, seed: int, scale: float = 0.02) -> None:
    """Write a stand-in for a fine-tuned expert: the base plus noise in proportion to each tensor's spread.

    Args:
        base: directory of a safetensors checkpoint, whole or in shards.
        expert: directory to create, with the base's other files linked.
        seed: of the noise.
        scale: standard deviation of the noise as a share of the tensor's.
    """
    if (expert / "config.json").exists():
        return
    expert.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for source in sorted(base.glob("*.safetensors")):
        tensors = {}
        with safe_open(source, framework="pt") as file:
            for name in list(file.keys()):
                weights = file.get_tensor(name)
                noise = torch.empty(weights.shape).normal_(generator=generator)
                tensors[name] = (weights.float() + noise * (scale * weights.float().std().nan_to_num())).to(
                    weights.dtype
                )
        save_file(tensors, expert / source.name, metadata={"format": "pt"})
    for other in base.iterdir():
        if other.suffix != ".safetensors" and other.name != "config.json" and other.is_file():
            (expert / other.name).write_bytes(other.read_bytes())
    (expert / "config.json").write_bytes((base / "config.json").read_bytes())
