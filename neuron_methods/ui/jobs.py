"""What the page runs: our own commands, each in a process of its own, so that all holds of them that is promised.

A job can be paused, which leaves the finished pieces of a merge for `--resume`, or cancelled, which leaves nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from neuron_methods.plugin.work import forget
from neuron_methods.support.errors import UserError
from neuron_methods.support.progress import LINE_VARIABLE, Counted

# The command, whatever lies in the directory where it runs: Python would take modules from there.
_COMMAND = "import sys; sys.path[:] = filter(None, sys.path); from neuron_methods.cli import main; main()"
_LINES = 2000  # that are kept of what a job says
_PATIENCE = 30.0  # seconds that a job has to end in order


class Job:
    """A command that runs, or has run.

    Attributes:
        what: it does, for people: "merge".
        out: the output that it makes, if any.
        code: its exit code; None as long as it runs.
        ended: "", "paused" or "cancelled": by whom it was ended before its time.
        progress: what it told last of how far it is.
    """

    def __init__(self, what: str, arguments: Sequence[str], place: Path, text: str = "", out: Path | None = None):
        """Start it.

        Args:
            what: it does.
            arguments: of the command.
            place: where it runs.
            text: what it reads on stdin.
            out: the output that it makes, a directory.
        """
        self.what, self.out = what, out
        self.code: int | None = None
        self.ended = ""
        self.progress: Counted | None = None
        self._lines: list[str] = []
        self._told = 0  # how often there was news
        self._news = threading.Condition()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *arguments],
            cwd=place,
            env={**os.environ, LINE_VARIABLE: "0.3"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the page, which ends its jobs
        )
        self._reader = threading.Thread(target=self._read, args=(text,), daemon=True)
        self._reader.start()

    @property
    def lines(self) -> list[str]:
        """What it has said, without progress."""
        with self._news:
            return list(self._lines)

    def follow(self, every: float = 0.5) -> Iterator[None]:
        """Come back whenever there is news, at most once in so many seconds, until it has ended."""
        seen = -1
        while self.code is None:
            with self._news:
                if self._told == seen:
                    self._news.wait(every)
                seen = self._told
            yield
            time.sleep(0.1)
        yield

    def end(self, how: str) -> None:
        """End it before its time; `how`: "paused" or "cancelled", after which nothing is left of what it made."""
        if self.code is None and not self.ended:
            self.ended = how
            self._process.terminate()
            try:
                self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._reader.join()

    def _read(self, text: str) -> None:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with suppress(OSError):  # it has ended, and says why
            process.stdin.write(text)
            process.stdin.close()
        for line in process.stdout:
            counted = Counted.read(line) or _bar(line)
            with self._news:
                if counted is not None:
                    self.progress = counted
                else:
                    self._lines = [*self._lines, line.rstrip()][-_LINES:]
                self._tell()
        code = process.wait()
        if code and self.ended == "cancelled" and self.out is not None:
            with suppress(UserError):  # another run is at it, which is nobody's to cancel here
                forget(self.out)
        with self._news:
            self.code = code
            self._tell()

    def _tell(self) -> None:
        self._told += 1
        self._news.notify_all()


def _bar(line: str) -> Counted | None:
    """Read a bar of a library's, such as that of a download."""
    found = re.match(r"\s*(.*?):?\s+(\d+)%\|", line)
    return Counted(found[1], int(found[2]), 100) if found else None


class Desk:
    """Where jobs are given in: one runs at a time, whoever's it is."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def start(self, owner: str, begin: Callable[[], Job]) -> Job:
        """Start a job.

        Args:
            owner: who gives it in.
            begin: starts it.

        Raises:
            UserError: another one runs.
        """
        with self._lock:
            running = next((job for job in self._jobs.values() if job.code is None), None)
            if running is not None:
                raise UserError(f"a {running.what} is running on this page's machine; wait for its end, or cancel it")
            self._jobs[owner] = begin()
            return self._jobs[owner]

    def of(self, owner: str) -> Job | None:
        """Find somebody's last job."""
        with self._lock:
            return self._jobs.get(owner)

    def end(self, owner: str, how: str) -> None:
        """End somebody's job before its time, if one runs; `how`: see `Job.end`."""
        job = self.of(owner)
        if job is not None:
            job.end(how)

    def leave(self, owner: str) -> None:
        """End what somebody has left behind; the finished pieces of a merge stay."""
        self.end(owner, "paused")
        with self._lock:
            self._jobs.pop(owner, None)

    def close(self) -> None:
        """End all jobs."""
        for owner in list(self._jobs):
            self.leave(owner)
