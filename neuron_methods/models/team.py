"""Several processes at one piece of work: what they tell each other, and what becomes of them when one dies.

Values are exchanged by torch.distributed (gloo, on the CPU). Beside that each process holds a connection to the first,
which a thread listens to: when a process dies the system closes it, so that the others know at once, whatever they are
at; and what must not wait for the others, such as progress, goes that way.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

from torch import Tensor

from neuron_methods.support.errors import UserError
from neuron_methods.support.files import is_own_fault
from neuron_methods.support.text import one_line, printable

#: Seconds after which a process that cannot be interrupted, as a kernel or the network keeps it, is ended.
PATIENCE = 30.0
_ORPHANED = "the launcher has died, so the processes that it has started end, too"
_TOGETHER = timedelta(days=30)  # others may be at work as long as that; that one has died is noticed otherwise


class _Stopped(BaseException):
    """Another process has ended, so this one does; all has been said."""


class Team:
    """The processes at one piece of work; of one alone, without any of this.

    Attributes:
        rank: which this is.
        count: how many there are.
        on_progress: called in the first process, from any thread, with what another has told by `progress`.
        at_fault: whether what has stopped the team is an error that the work has, and would have again.
    """

    def __init__(self) -> None:
        self.rank, self.count = 0, 1
        self.on_progress: Callable[[int], None] = lambda _count: None
        self.at_fault = False
        self._group: Any = None
        self._links: dict[int, socket.socket] = {}  # of the first to all others, of another to the first
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._leaving = self._stopped = False
        self._heard = threading.Event()  # that the first process knows
        self._launcher = os.getppid()

    @property
    def shown(self) -> str:
        """How messages call this process."""
        return f"process {self.rank} on {socket.gethostname()}"

    def exchange(self, value: Any) -> list[Any]:
        """Give a value to all, and get theirs, in the order of the processes; every process has to call it."""
        if self.count == 1:
            return [value]
        import torch.distributed

        found: list[Any] = [None] * self.count
        with self._waiting():
            torch.distributed.all_gather_object(found, value, group=self._group)
        return found

    def add_up(self, values: Tensor) -> Tensor:
        """Add up a tensor of integers over all processes."""
        if self.count == 1:
            return values
        import torch.distributed

        summed = values.cpu().contiguous()
        with self._waiting():
            torch.distributed.all_reduce(summed, group=self._group)
        return summed

    def refuse(self, error: UserError) -> NoReturn:
        """Fail with what all processes have found out alike, so that it is told once."""
        if self.rank:
            self._heard.wait(PATIENCE)
        raise error

    def progress(self, count: int) -> None:
        """Tell the first process that so many units are done."""
        if self.rank:
            self._send(0, {"done": count})

    def gather_up(self) -> None:
        """Stop all others, and wait until they are gone: what they were writing may be removed then."""
        with self._lock:
            self._leaving = True
        for rank in self._links:
            self._send(rank, {"stop": True})
        for thread in self._threads:
            thread.join(PATIENCE)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:  # the connection to one that has died; the thread that listens knows, and stops this one
            time.sleep(PATIENCE)
            raise

    def _send(self, rank: int, message: dict[str, Any]) -> None:
        with suppress(OSError, KeyError), self._lock:
            self._links[rank].sendall(json.dumps(message).encode() + b"\n")

    def _listen(self, rank: int) -> None:
        """Hear another process to its end, in a thread."""
        goodbye = False
        with suppress(OSError), self._links[rank].makefile("rb") as stream:
            for line in stream:
                message = json.loads(line)
                goodbye = goodbye or "bye" in message
                if "done" in message:
                    self.on_progress(message["done"])
                if "failed" in message:
                    self._stop(f"process {rank}: {message['failed']}", fault=message["fault"])
                if "stop" in message:
                    self._heard.set()
                    self._stop(None)
        self._heard.set()
        if not goodbye:
            self._stop(f"process {rank} of {self.count} has died, so the others end, too")

    def _is_orphaned(self) -> bool:
        return os.getppid() != self._launcher

    def _watch(self) -> None:
        """Stop when the process that has started this one is no more, in a thread: nobody else would end it then."""
        while not self._is_orphaned():
            if self._leaving:
                return
            time.sleep(1)
        if self.rank and self._links:
            self._send(0, {"failed": _ORPHANED, "fault": False})  # which may be on another host, or not have looked yet
            self._stop(None)
        else:
            self._stop(_ORPHANED if os.environ.get("LOCAL_RANK", "0") == "0" else None)

    def _stop(self, why: str | None, *, fault: bool = False) -> None:
        with self._lock:
            if self._leaving or self._stopped:
                return
            self._stopped, self.at_fault = True, fault
        if why is not None and self._is_orphaned():
            why = _ORPHANED  # also where another one has seen it before, and is gone
        # One line of all of them: by the first, or by the second where that is the one.
        if why is not None and self.rank < 2:
            sys.stderr.write(f"error: {printable(why)}\n")  # in one piece, as others write there
            sys.stderr.flush()
        if not self.rank:
            for other in self._links:
                self._send(other, {"stop": True})
        # That thread, as a system call in which it waits goes on where another one gets the signal.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        end = threading.Timer(PATIENCE * 1.5, os._exit, (1,))
        end.daemon = True
        end.start()

    def _join(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()
        _check_launcher()
        from neuron_methods.models.processes import process_state

        state = process_state()
        import torch.distributed

        self.rank, self.count = state.process_index, state.num_processes
        self._group = torch.distributed.new_group(backend="gloo", timeout=_TOGETHER)
        host = os.environ.get("MASTER_ADDR", "localhost")
        server = socket.create_server((host, 0)) if not self.rank else None
        told = [server.getsockname()[1], secrets.token_hex(16)] if server is not None else None
        port, token = self.exchange(told)[0]
        if server is None:
            link = socket.create_connection((host, port), timeout=PATIENCE)
            link.sendall(f"{token} {self.rank:8d}\n".encode())
            self._links[0] = link
        else:
            server.settimeout(PATIENCE)
            while len(self._links) < self.count - 1:
                link, _ = server.accept()
                link.settimeout(PATIENCE)
                said, _, rank = link.makefile("rb").readline(64).decode().strip().partition(" ")
                if hmac.compare_digest(said, token):
                    self._links[int(rank)] = link
                else:
                    link.close()
            server.close()
        for rank, link in self._links.items():
            link.settimeout(None)
            _keep_alive(link)
            thread = threading.Thread(target=self._listen, args=(rank,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _leave(self, error: BaseException | None) -> None:
        with self._lock:
            self._leaving = True
        if error is None:
            for rank, link in self._links.items():
                self._send(rank, {"bye": True})
                with suppress(OSError):
                    link.shutdown(socket.SHUT_WR)
            for thread in self._threads:
                thread.join(PATIENCE)
        elif not self.rank:
            self.gather_up()
        elif not self._stopped:
            self._send(0, {"failed": _told(error), "fault": is_own_fault(error)})
            self._heard.wait(PATIENCE)
        for link in self._links.values():
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()


@contextmanager
def teamed() -> Iterator[Team]:
    """Work together with the other processes of ``accelerate launch``, where there are any, while the block lasts.

    Where one of them fails or dies, all of them end; one line says which, and why.

    Raises:
        SystemExit: another has ended.
        UserError: in the first process, what is wrong there.
    """
    team = Team()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield team
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        raise _Stopped

    previous = signal.signal(signal.SIGUSR1, stop)
    error: BaseException | None = None
    try:
        team._join()
        yield team
    except BaseException as raised:
        error = raised
        if isinstance(raised, _Stopped) or team.rank:
            raise SystemExit(1) from None  # the first process tells it
        raise
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        team._leave(error)
        signal.signal(signal.SIGUSR1, previous)


def _check_launcher() -> None:
    """Make sure that the launcher answers, where the processes meet by it; torch would wait for half an hour."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except OSError as error:
        what = (
            f"process {os.environ['RANK']}: the launcher does not answer at {host}:{port} ({error.strerror or error})"
        )
        raise UserError(f"{what}; it has died, or this host cannot reach it") from None


def _told(error: BaseException) -> str:
    if not isinstance(error, Exception):
        return "was interrupted"
    unexpected = "" if isinstance(error, (UserError, OSError)) else f"unexpected {type(error).__name__}: "
    return f"{unexpected}{one_line(error)}"


def _keep_alive(link: socket.socket) -> None:
    """Have the system notice within half a minute that the other host is no more."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
