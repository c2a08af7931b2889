"""Forks of a process that has imported everything: commands that are killed at a moment, alone or in a launch."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

#: Operations on files that a run may be killed at, as Python's audit hooks name them.
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.copyfile", "os.truncate")
#: Whom a kill in a launch may meet: the process whose moment it is, as often as all and their launcher.
VICTIMS = ("it", "it", "all", "the launcher")
#: Seconds within which all processes of a launch have to be gone when one is.
TOGETHER = 60.0


def in_fork(work: Callable[[], None]) -> None:
    """Do some work in a fork of this process; raises SystemExit where it fails."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(1)


def forked(arguments: tuple[str, ...], folder: Path, *, after: float | None = None, at: int | None = None) -> int:
    """Run a command in a fork of this process.

    Args:
        arguments: of `mergekit-neuron`.
        folder: where.
        after: kill it after so many seconds.
        at: kill it at this operation on files.

    Returns:
        Its exit status, negative where a signal ended it.
    """
    child = os.fork()
    if child == 0:
        _run(arguments, folder, at)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def launched(
    arguments: tuple[str, ...],
    folder: Path,
    *,
    after: float | None = None,
    at: int | None = None,
    rank: int = 0,
    victim: str = "it",
) -> int:
    """Run a command in two processes of ``accelerate launch``, which are forks of this process like their launcher.

    Args:
        arguments: of `mergekit-neuron`.
        folder: where.
        after: kill when the process of `rank` is so many seconds old.
        at: kill at this operation on files of the process of `rank`.
        rank: of the process that goes by.
        victim: which is killed then: it, all with the launcher, or the launcher.

    Returns:
        The launcher's exit status, negative where a signal ended it.

    Raises:
        TimeoutError: one of them has outlived the launcher; it is killed now.
    """
    gone, held = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        _launch(arguments, folder, partial(_harm, after=after, at=at, rank=rank, victim=victim))
    os.close(held)
    _, status = os.waitpid(child, 0)
    # Each holds the other end; when the last is gone, this one can be read.
    alone = bool(select.select([gone], [], [], TOGETHER)[0])
    os.close(gone)
    if not alone:
        os.killpg(child, signal.SIGKILL)
        raise TimeoutError(f"a process is left {TOGETHER:.0f} s after the launcher has gone")
    return os.waitstatus_to_exitcode(status)


def _launch(arguments: tuple[str, ...], folder: Path, harm: Callable[[Path, int], None]) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser

    import neuron_methods

    _go_to(folder)
    forks = 0

    def count() -> None:
        nonlocal forks
        forks += 1

    os.register_at_fork(before=count, after_in_child=lambda: harm(folder, forks - 1))
    script = str(Path(neuron_methods.__file__).with_name("__main__.py"))
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    chosen = launch_command_parser().parse_args([*options, "--mixed_precision", "no", script, *arguments])
    # What -m does in a new Python, a fork of this one does.
    chosen.run_path, chosen.start_method = True, "fork"
    code = 1
    try:
        launch_command(chosen)
        code = 0
    except BaseException as error:
        print(f"launcher: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _harm(folder: Path, own: int, *, after: float | None, at: int | None, rank: int, victim: str) -> None:
    """In a process of a launch, see to it that there is a kill where it is the one that goes by."""

    def kill() -> None:
        whom = {"it": os.getpid(), "all": 0, "the launcher": os.getppid()}[victim]
        os.kill(whom, signal.SIGKILL)

    if at == 0 or (at is not None and own == rank):
        _watch(folder / f".events{own}", at, kill)
    if after is not None and own == rank:
        timer = threading.Timer(after, kill)
        timer.daemon = True
        timer.start()


def _run(arguments: tuple[str, ...], folder: Path, at: int | None) -> None:
    from neuron_methods.cli import main

    _go_to(folder)
    if at is not None:
        _watch(folder / ".events0", at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    code = 1
    try:
        main(list(arguments), prog_name="mergekit-neuron")
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _go_to(folder: Path) -> None:
    os.chdir(folder)
    log = os.open(folder / ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _watch(place: Path, at: int, kill: Callable[[], None]) -> None:
    """Kill at an operation on files, by number; 0: write to `place` how many there are."""
    seen = 0

    def hook(event: str, _arguments: object) -> None:
        nonlocal seen
        if event in EVENTS:
            seen += 1
            if seen == at:
                kill()
            if at == 0:
                os.pwrite(counter, str(seen).encode(), 0)

    counter = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if at == 0 else -1
    sys.addaudithook(hook)
