"""Several runs, and those that died: whose an unfinished file is, and who may write to a place now.

Whatever is unfinished lies beside its place under a name that tells which run makes it: machine, process, when that
process and the machine were started. A run that begins writes to a place alone; it removes what dead ones left there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from neuron_methods.support.errors import UserError
from neuron_methods.support.text import printable

try:
    import fcntl
except ImportError:  # Windows, where two runs are not kept apart
    fcntl = None  # type: ignore[assignment]

#: The lock within a directory that is filled bit by bit.
LOCK = ".lock"
_LONGEST = 255  # bytes of a file's name, on most file systems
_RUN = r"(?P<host>[\w-]+)\.(?P<process>\d+)\.(?P<started>\d+)\.(?P<boot>\w+)"
_ENDINGS = ("partial", "old")
# What a file system says that has no locks, or none on what is not open for writing.
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS, errno.EINVAL}


def beside(target: Path, ending: str) -> Path:
    """Name what this run makes of a file or directory until it is finished.

    Args:
        target: where it will be.
        ending: ``partial``; ``old`` for what makes way for it.
    """
    run = f"{_host()}.{os.getpid()}.{_started(os.getpid())}.{_boot()}.{ending}"
    return target.with_name(f".{_cut(target.name, _LONGEST - len(run) - 2)}.{run}")


def hidden(target: Path, ending: str) -> Path:
    """Name what belongs to a file or directory, whichever run is at it, and lies beside."""
    return target.with_name(f".{_cut(target.name, _LONGEST - len(ending) - 2)}.{ending}")


@contextmanager
def claimed(
    target: Path, shown: object | None = None, *, inside: bool = False, pair: Path | None = None
) -> Iterator[None]:
    """Write to a place alone as long as the block lasts, with nothing there of runs that died.

    Directories that had to be made for it are removed, too, where nothing came into them.

    Args:
        target: file or directory.
        shown: what messages call it.
        inside: `target` is a directory that is filled bit by bit, and not replaced: it is made, and the lock, which the
            system lifts with the process, lies within it instead of beside.
        pair: the file that is written with it, see `files.pair_in_place_after`.

    Raises:
        UserError: another run writes to it, or the place cannot be written to.
    """
    lock = target / LOCK if inside else hidden(target, "lock")
    with parents_of(lock), _locked(lock, target if shown is None else shown):
        if not inside:
            for place in filter(None, (target, pair)):
                remove_leftovers(place.parent, place.name)
        if target.is_dir():
            remove_leftovers(target)
        yield


@contextmanager
def parents_of(target: Path) -> Iterator[None]:
    """Make the directories above a place; those that nothing came into are removed after the block.

    Raises:
        UserError: they cannot be made.
    """
    made: list[Path] = []
    try:
        try:
            for parent in [p for p in (target.parent, *target.parent.parents) if not p.exists()][::-1]:
                parent.mkdir(exist_ok=True)
                made.append(parent)
            if not target.parent.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        except OSError as error:
            raise UserError(f"{target.parent}: cannot write here ({error.strerror})") from None
        yield
    finally:
        for parent in made[::-1]:
            with suppress(OSError):  # something came into it
                parent.rmdir()


@contextmanager
def _locked(lock: Path, shown: object) -> Iterator[None]:
    descriptor = None
    try:
        while fcntl is not None:
            try:
                descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                raise UserError(f"{lock.parent}: cannot write here ({error.strerror})") from None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                told = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                descriptor = None
                raise UserError(
                    f"{shown}: another run{f' ({told})' if told else ''} writes to it now; wait for its end, or "
                    "choose another name"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            # Whoever held it before has removed the file with its lock; then there is a new one to hold.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                    os.truncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {_host()}".encode())
                    break
            os.close(descriptor)
            descriptor = None
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                lock.unlink()
            os.close(descriptor)


@contextmanager
def workplace(name: str, within: Path | None = None) -> Iterator[Path]:
    """Give a directory for what is of use in this run alone; it is gone after the block, or with the next run.

    Args:
        name: of it; directories of this name that runs left that are no more are removed.
        within: where it is made; None: where temporary files go.

    Raises:
        UserError: it cannot be made.
    """
    place = (within or Path(tempfile.gettempdir())) / name
    remove_leftovers(place.parent, name)
    made = beside(place, "partial")
    made = made.with_name(made.name.replace(f".{name}.", f".{name}-{secrets.token_hex(4)}.", 1))
    try:
        made.mkdir(mode=0o700)
    except OSError as error:
        raise UserError(f"{place.parent}: cannot write here ({error.strerror})") from None
    try:
        yield made
    finally:
        remove(made)


def remove_leftovers(directory: Path, name: str | None = None) -> None:
    """Remove what runs of this machine that are no more left unfinished, and say so.

    Where such a run was killed after it had moved an old output away and before the new one was in its place, the old
    one comes back.

    Args:
        directory: where to look.
        name: of the file or directory that they made; None: of all in `directory`.
    """
    with os.scandir(directory) as entries:
        found = sorted(entry.name for entry in entries if entry.name.endswith(_ENDINGS))
    for left in found:
        parts = re.fullmatch(rf"\.(?P<name>.+)\.{_RUN}\.(?P<ending>{'|'.join(_ENDINGS)})", left)
        if parts is None or (name is not None and not _is_of(parts["name"], name)):
            continue
        place = directory / left
        if parts["host"] != _host():
            note(f"{place}: left by a run on {parts['host']}; remove it if that does not go on")
        elif not _lives(int(parts["process"]), int(parts["started"]), parts["boot"]):
            old = next(place.iterdir(), None) if parts["ending"] == "old" and place.is_dir() else None
            if old is not None and not os.path.lexists(directory / old.name):
                old.rename(directory / old.name)
                note(f"{directory / old.name}: put back, as a run that was killed had moved it away")
            else:
                note(f"{place}: removed, as the run that left it is no more")
            remove(place)


def remove(place: Path) -> None:
    """Remove a file or a directory of this package's making, as far as it can be."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with suppress(OSError):
            place.unlink()


def _is_of(found: str, name: str) -> bool:
    """Whether the name of something unfinished was made of `name`."""
    return (
        found == _cut(name, len(found.encode())) or re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{8}}", found) is not None
    )


def note(text: str) -> None:
    """Tell the user something on stderr, in one piece, as other processes may write there."""
    sys.stderr.write(f"note: {printable(text)}\n")


def _cut(name: str, most: int) -> str:
    """Shorten a name to so many bytes, by a hash of it."""
    data = os.fsencode(name)
    if len(data) <= most:
        return name
    return f"{os.fsdecode(data[: most - 9]).encode(errors='ignore').decode()}~{hashlib.sha256(data).hexdigest()[:8]}"


def _host() -> str:
    return re.sub(r"[^\w-]", "_", socket.gethostname(), flags=re.ASCII)[:32] or "host"


def _boot() -> str:
    """When the machine was started, as far as that can be told: the id that Linux gives each start."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return "0"


def _started(process: int) -> int:
    """When a process was started, in ticks since the machine was; 0 where that cannot be told, or it is no more."""
    try:
        # Its name, in brackets, may hold anything.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        # One that is dead keeps its entry until its parent has heard of that.
        return 0 if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return 0


def _lives(process: int, started: int, boot: str) -> bool:
    if boot != _boot():
        return False
    if started:
        return _started(process) == started
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
