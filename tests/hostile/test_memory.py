"""Memory: what a plan says a merge takes is taken at most, and what is not there is not begun."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from neuron_methods.cli import main
from neuron_methods.cli.common import describe_error
from neuron_methods.support import memory
from neuron_methods.support.errors import UserError
from tests.support.byte_llama import byte_tokenizer
from tests.support.checkpoints import configuration
from tests.support.commands import environment, invoke, refused
from tests.support.peaks import CASES

MB = 10**6
# Small tensors go back to the system as large ones do; else what the C library keeps of them is measured, too.
STEADY = {"MALLOC_MMAP_THRESHOLD_": "4000000"}


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    folder = tmp_path_factory.mktemp("peaks")
    command = [sys.executable, "-m", "tests.support.peaks", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(**STEADY))
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_plan_promises_what_a_merge_takes_at_most_and_not_much_more(
    peaks: dict[str, tuple[int, int]], case: str
) -> None:
    promised, taken = peaks[case]
    assert taken <= promised + 30 * MB  # which a plan counts to the process: what Python keeps, modules that come late
    assert promised <= 1.5 * taken + 70 * MB  # of which histograms may be, which seldom grow to their bound


def meminfo(monkeypatch: pytest.MonkeyPatch, folder: Path, free: int) -> None:
    """Let the kernel say that so many bytes are available, and no control group anything."""
    (folder / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {free // 1024} kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", folder / "meminfo")
    monkeypatch.setattr(memory, "_GROUP_OF_PROCESS", folder / "none")


def test_what_the_kernel_calls_available_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo(monkeypatch, tmp_path, 5 * 1024**2)
    assert memory.free_memory() == 5 * 1024**2
    (tmp_path / "meminfo").write_text("nonsense\n")
    assert memory.free_memory() is None
    memory.check_memory(10**18, "x", "y")  # where nothing is known, nothing is refused


@pytest.mark.parametrize(
    ("line", "place", "limit", "usage", "cache"),
    [
        ("0::/a/b", "a", "memory.max", "memory.current", "inactive_file"),
        ("0::/a/b", "a/b", "memory.max", "memory.current", "inactive_file"),
        ("0::/of/the/host", ".", "memory.max", "memory.current", "inactive_file"),
        ("7:cpu,memory:/a/b", "memory/a/b", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ("7:memory:/host", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_limits_of_control_groups_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, place: str, limit: str, usage: str, cache: str
) -> None:
    meminfo(monkeypatch, tmp_path, 10**9)
    (tmp_path / "cgroup").write_text(f"3:cpuset:/x\n{line}\n")
    monkeypatch.setattr(memory, "_GROUP_OF_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    group = tmp_path / "groups" / place
    group.mkdir(parents=True)
    (group / usage).write_text("4000\n")
    (group / "memory.stat").write_text(f"cache 1\n{cache} 500\n")
    (group / limit).write_text("max\n")
    assert memory.free_memory() == 10**9 // 1024 * 1024
    (group / limit).write_text("5000\n")
    assert memory.free_memory() == 1500


def test_limits_of_ulimit_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of address space and of data, in a process of its own, which keeps what it has taken."""
    for limit in ("RLIMIT_AS", "RLIMIT_DATA"):
        code = (
            "import resource; from neuron_methods.support.memory import free_memory\n"
            f"resource.setrlimit(resource.{limit}, (500 << 20, resource.RLIM_INFINITY)); before = free_memory()\n"
            "taken = bytearray(100 << 20); print(before >> 20, before - free_memory() >> 20)"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        left, less = map(int, ran.stdout.split())
        assert left < 500 and 95 <= less <= 110, (limit, left, less)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("x.so: failed to map segment from shared object"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_is_no_fault_of_ours(error: Exception) -> None:
    assert re.fullmatch(r"not enough memory: \S+ .B are free now; .*", describe_error(error))


def test_more_than_there_is_is_refused_with_need_and_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo(monkeypatch, tmp_path, 2 * 1024**2)
    memory.check_memory(2 * 1024**2, "it", "less helps")
    with pytest.raises(UserError) as error:
        memory.check_memory(3 * 1024**2, "it", "less helps")
    assert str(error.value) == (
        "it needs about 3.1 MB of memory, 2.1 MB are free; less helps, or go on all the same with "
        "MERGEKIT_NEURON_IGNORE_MEMORY=1"
    )
    monkeypatch.setenv("MERGEKIT_NEURON_IGNORE_MEMORY", "1")
    memory.check_memory(3 * 1024**2, "it", "less helps")


def test_a_merge_that_will_not_fit_is_not_begun(monkeypatch: pytest.MonkeyPatch, workspace: Any) -> None:
    meminfo(monkeypatch, workspace("llama-tied"), 10**4)
    line = refused()
    assert re.search(r"merge\.yaml: the merge needs about \S+ MB of memory, 9\.2 kB are free; ", line), line
    assert "9.2 kB are free" in invoke("out", "--dry-run").output
    monkeypatch.setenv("MERGEKIT_NEURON_IGNORE_MEMORY", "1")
    invoke("out")


@pytest.mark.parametrize(
    "arguments",
    [
        ("profile", "base", "--data", "x=rows.jsonl", "-o", "p.safetensors"),
        ("evaluate", "base", "--task", "tasks.yml"),
        ("linearity", "merge.yaml"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_model_that_will_not_fit_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, workspace: Any, arguments: tuple[str, ...]
) -> None:
    folder = workspace("llama-tied")
    byte_tokenizer().save_pretrained(folder / "base")
    Path("rows.jsonl").write_text('{"text": "a b", "label": "a"}\n' * 4)
    Path("tasks.yml").write_text("tasks:\n- {name: x, kind: perplexity, data: rows.jsonl}\n")
    Path("merge.yaml").write_text(configuration())
    meminfo(monkeypatch, folder, 10**4)
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 1, result.output
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert re.search(r"model \S*base: loading it needs about 18\.2 kB of memory, 9\.2 kB are free; ", line), line
