"""What the benchmarks share: models to merge, processes timed from outside, the machine in words."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


@dataclass(frozen=True)
class Run:
    """One process, measured from outside: wall-clock and CPU seconds, peak resident memory, bytes written to files."""

    seconds: float
    peak_bytes: int
    written_bytes: int
    cpu_seconds: float


def run_process(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end and measure it.

    Raises:
        SystemExit: the command failed; its output is shown.
    """
    started = time.perf_counter()
    with subprocess.Popen(
        command,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{output}")
    return Run(seconds, usage.ru_maxrss * 1024, usage.ru_oublock * 512, usage.ru_utime + usage.ru_stime)


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
