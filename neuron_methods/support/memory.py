"""Memory asked for is compared with what there is, before it is taken."""

from __future__ import annotations

import os
from pathlib import Path

from neuron_methods.support.errors import UserError
from neuron_methods.support.text import format_bytes

#: In the environment, 1 lets every command go on where memory will not do.
IGNORE = "MERGEKIT_NEURON_IGNORE_MEMORY"

_NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "Cannot allocate memory",
    "not enough memory",
    "failed to map segment from shared object",
)
_MEMINFO = Path("/proc/meminfo")
_PAGES_OF_PROCESS = Path("/proc/self/statm")
_GROUP_OF_PROCESS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def free_memory(device: str = "cpu") -> int | None:
    """Tell how many bytes this process may still take; None where the system does not say.

    On a CPU it is what the kernel calls available, page cache included, and no more than the limits of the control
    groups (v1 or v2) of the process and of `ulimit` leave. On a CUDA device it is what the driver has, and what torch
    keeps unused.

    Args:
        device: as torch spells it.
    """
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device != "cpu":
        return None
    found = [size for size in (_available(), *_left_in_groups(), *_left_by_ulimit()) if size is not None]
    return min(found, default=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error, or what it came of, says that memory has run out, in Python's, torch's or C's words."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in _NO_MEMORY)
        or (error.__cause__ is not None and is_out_of_memory(error.__cause__))
    )


def check_memory(need: int, what: str, advice: str, device: str = "cpu") -> None:
    """Refuse to start what will not fit.

    Args:
        need: bytes beyond what the process holds already.
        what: needs it: "merge.yaml: the merge".
        advice: what would help: "smaller shards (--out-shard-size 1B)".
        device: where.

    Raises:
        UserError: the memory is not free, and the environment does not say to go on.
    """
    free = free_memory(device)
    if free is None or need <= free or os.environ.get(IGNORE, "0") not in ("", "0"):
        return
    where = "" if device == "cpu" else f" on {device}"
    raise UserError(
        f"{what} needs about {format_bytes(need)} of memory{where}, {format_bytes(free)} are free; {advice}, or go on "
        f"all the same with {IGNORE}=1"
    )


class NoRoom(Exception):
    """What would be quicker does not fit into memory; the message says what it needs and what is free."""


def check_room(need: int, what: str) -> None:
    """Make sure that something fits which can be done without.

    Args:
        need: bytes beyond what the process holds already.
        what: needs it: "a merge in memory".

    Raises:
        NoRoom: the memory is not free, and the environment does not say to go on.
    """
    free = free_memory()
    if free is not None and need > free and os.environ.get(IGNORE, "0") in ("", "0"):
        raise NoRoom(f"{what} needs {format_bytes(need)} of memory, {format_bytes(free)} are free")


def _available() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _left_by_ulimit() -> list[int]:
    """What the process's own limits leave: of address space, which mapped files take part of, and of data."""
    try:
        import resource

        pages = [int(number) for number in _PAGES_OF_PROCESS.read_text().split()]
        limits = ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5]))
        taken = [(resource.getrlimit(limit)[0], count * resource.getpagesize()) for limit, count in limits]
    except (ImportError, OSError, ValueError, IndexError):  # Windows, macOS
        return []
    return [max(0, most - used) for most, used in taken if most != resource.RLIM_INFINITY]


def _left_in_groups() -> list[int]:
    """What the limits of the process's control groups leave, and those of the groups above them."""
    try:
        lines = _GROUP_OF_PROCESS.read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _GROUPS / "memory" if controllers else _GROUPS
        limit, usage = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        group = root / path.strip("/")
        # In a container the path is the host's, and the group itself is mounted as the root.
        for place in dict.fromkeys((group, *(p for p in group.parents if p.is_relative_to(root)), root)):
            left += _left_in(place, f"memory.{limit}", f"memory.{usage}")
    return left


def _left_in(group: Path, limit: str, usage: str) -> list[int]:
    try:
        # Without a limit v2 says "max"; v1 says some 2^63, of which more is left than there is.
        most, used = int((group / limit).read_text()), int((group / usage).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
    except (OSError, ValueError):
        return []
    return [max(0, most - used + cached)]
