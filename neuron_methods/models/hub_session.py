"""The Hub's client, held to bounds: whatever a server does, or does not do, every request comes to an end.

huggingface_hub 2.4 waits for ever for an answer to most requests, as long as a server asks to be left alone, and for a
download that trickles or breaks off again and again. All its requests, and those of transformers and datasets, go
through one client; that client gets a patience here. What goes through hf_xet does not: it has time limits of its own.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from neuron_methods.support.errors import UserError
from neuron_methods.support.text import first_line, format_bytes

CONNECTING = 10.0  # seconds for a connection
ANSWER = {"GET": 30.0, "HEAD": 15.0}  # seconds of silence
ANSWER_TO_CHANGE = 120.0  # of a request that changes something: large commits take a while
STALL = 120.0  # seconds in which ...
LEAST = 16_000  # ... so many bytes have to pass
LONGEST_WAIT = 30.0  # seconds that a server may ask to be left alone
TRIES = 5  # failures without a success in between
_TRIES_OF_ONE = 20  # failures of one address, with successes in between
_REQUESTS_OF_ONE = 2000  # of one address: pages that name themselves as the next, or redirections in a circle
_TRANSIENT = (408, 429, 500, 502, 503, 504)

LATER = "check the network and try again later; HF_HUB_OFFLINE=1 takes what the Hub's cache holds without asking"


class HubGaveUp(UserError):
    """The Hub was given up; no client's client catches this and tries again."""


def bound_session() -> None:
    """Hold all requests of huggingface_hub in this process to the bounds above. Idempotent."""
    import huggingface_hub

    global _bounded
    with _BOUNDING:
        if not _bounded:
            own = huggingface_hub.get_session()
            huggingface_hub.set_client_factory(functools.partial(_bounded_client, type(own), own.event_hooks))
            # Each of their tries is told; ours is one line at the end.
            for name in ("utils._http", "file_download"):
                logging.getLogger(f"huggingface_hub.{name}").setLevel(logging.ERROR)
            _bounded = True


_bounded, _BOUNDING = False, threading.Lock()
#: Bytes of files that have been sent whole, in this process.
_sent = 0


def sent() -> int:
    """Count the bytes of files that the Hub has taken from this process so far."""
    return _sent


def without_token(text: str) -> str:
    """Take the Hub's token out of a text, which a server may have quoted."""
    if "huggingface_hub" not in sys.modules:
        return text  # nobody has read it
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "***") if token else text


def _bounded_client(kind: type, hooks: dict[str, list[Any]]) -> Any:
    client = kind(event_hooks=hooks, follow_redirects=True)
    _Bounds(client)
    return client


class _Bounds:
    """What one client is held to, and how its requests have gone."""

    def __init__(self, client: Any) -> None:
        # httpx2 for huggingface_hub 2.4; others are built on httpx.
        self.library = importlib.import_module(type(client).__module__.partition(".")[0])
        self.client, self._send = client, client.send
        self.failures = 0
        self.since = time.monotonic()  # the last success
        self.of_one: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.given_up: str | None = None
        self.current = threading.local()
        client.send = self.send
        hooks = client.event_hooks
        client.event_hooks = {"request": [*hooks["request"], self.begin], "response": [self.answered]}

    def send(self, request: Any, **how: Any) -> Any:
        """Send a request as the client does, within bounds."""
        timeouts = request.extensions.setdefault("timeout", {})
        answer = ANSWER.get(request.method, ANSWER_TO_CHANGE)
        for key, bound in (("connect", CONNECTING), ("read", answer), ("write", answer), ("pool", answer)):
            timeouts[key] = min(timeouts.get(key) or bound, bound)
        self.current.begun = []  # a redirection makes a request of its own
        try:
            return self._send(request, **how)
        except self.library.TransportError as error:
            self.failed(request, first_line(error) if str(error) else type(error).__name__)
            raise
        except (OSError, RuntimeError):  # of a connection that was closed under it
            if self.given_up is not None:
                self.give_up(self.given_up)
            raise
        finally:
            for begun in self.current.begun:
                self.settle(begun)

    def begin(self, request: Any) -> None:
        """Watch over one request until its answer begins."""
        self.current.begun.append(request)
        address = _address(request)
        self.asked[address] += 1
        if self.asked[address] > _REQUESTS_OF_ONE:
            self.give_up(f"{address} leads to itself again and again")
        request.stream = _counted(self, request, request.stream)
        watch = threading.Timer(STALL, self.stalled, (request, 0))
        watch.daemon = True
        request.extensions["neuron_watch"] = watch
        watch.start()

    def stalled(self, request: Any, before: int) -> None:
        """Break off a request that has neither been sent nor answered in time, whatever it is waiting for."""
        if request.extensions["neuron_watch"] is None:
            return
        if (moved := request.stream.moved) - before >= LEAST:
            watch = threading.Timer(STALL, self.stalled, (request, moved))
            watch.daemon = True
            request.extensions["neuron_watch"] = watch
            watch.start()
            return
        self.given_up = f"{_address(request)}: the Hub has not answered within {STALL:.0f} s"
        self.client.close()  # whoever reads from its connections gets an error

    def settle(self, request: Any) -> None:
        """Stop watching over a request."""
        watch = request.extensions.get("neuron_watch")
        request.extensions["neuron_watch"] = None
        if watch is not None:
            watch.cancel()

    def answered(self, response: Any) -> None:
        """Look at an answer before its body is read."""
        request = response.request
        self.settle(request)
        wait = max(map(float, _WAIT.findall(_asked_to_wait(response))), default=0.0)
        if response.status_code in _TRANSIENT and wait > LONGEST_WAIT:
            self.give_up(f"{_address(request)}: the Hub answered {response.status_code} and asks to wait {wait:.0f} s")
        if response.status_code in _TRANSIENT:
            self.failed(request, f"the Hub answered {response.status_code}")
        response.stream = _counted(self, request, response.stream, response.status_code)

    def failed(self, request: Any, why: str) -> None:
        """Count a failure; give the Hub up after too many."""
        if self.given_up is not None:
            self.give_up(self.given_up)
        address = _address(request)
        self.failures += 1
        self.of_one[address] += 1
        if self.failures >= TRIES or self.of_one[address] >= _TRIES_OF_ONE:
            seconds = time.monotonic() - self.since
            self.give_up(f"{address}: {why} (tried {self.failures} times in {seconds:.0f} s)")

    def succeeded(self) -> None:
        """Note that a whole answer has come."""
        self.failures, self.since = 0, time.monotonic()

    def give_up(self, why: str) -> None:
        """Close the client; the next request gets a new one."""
        import huggingface_hub

        huggingface_hub.close_session()
        raise HubGaveUp(f"{without_token(why)}; {LATER}")


_WAIT = re.compile(r"(?:^|t\s*=\s*)(\d+)")


def _asked_to_wait(response: Any) -> str:
    limits = response.headers.get("ratelimit", "")
    return response.headers.get("retry-after", "").strip() or (limits if re.search(r"r\s*=\s*0\b", limits) else "")


def _address(request: Any) -> str:
    # Without the query, which may be signed.
    return f"{request.method} {request.url.scheme}://{request.url.host}{request.url.path}"


def _counted(bounds: _Bounds, request: Any, stream: Any, status: int | None = None) -> Any:
    """A body whose bytes are counted as they pass; of an answer, if it has a status."""

    class Counted(bounds.library.SyncByteStream):  # type: ignore[name-defined, misc]
        moved = 0

        def __iter__(self) -> Iterator[bytes]:
            yield from self.sending() if status is None else self.receiving()

        def sending(self) -> Iterator[bytes]:
            global _sent
            for chunk in stream:
                self.moved += len(chunk)
                yield chunk
            if request.method == "PUT":
                _sent += self.moved

        def receiving(self) -> Iterator[bytes]:
            parts, waited, mark = iter(stream), 0.0, 0
            while True:
                started = time.monotonic()
                try:
                    chunk = next(parts, None)
                except bounds.library.TransportError as error:
                    bounds.failed(request, f"broke off after {format_bytes(self.moved)}: {first_line(error)}")
                    raise
                waited += time.monotonic() - started
                if chunk is None:
                    break
                self.moved += len(chunk)
                if waited > STALL:
                    if self.moved - mark < LEAST:
                        told = f"{format_bytes(self.moved - mark)} in {waited:.0f} s"
                        bounds.give_up(f"{_address(request)}: the Hub sends too slowly, {told}")
                    waited, mark = 0.0, self.moved
                yield chunk
            if status not in _TRANSIENT:
                bounds.succeeded()

        def close(self) -> None:
            if hasattr(stream, "close"):
                stream.close()

    return Counted()


def asked(what: str, work: Callable[[], Any]) -> Any:
    """Ask the Hub for something, and say in one line why it is not to be had.

    Args:
        what: what is asked for, for the message.
        work: calls huggingface_hub.

    Raises:
        UserError: whatever comes of servers, networks, proxies, certificates, and answers that nobody understands.
    """
    bound_session()
    try:
        return work()
    except HubGaveUp as error:
        raise HubGaveUp(f"{what}: {error}") from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: not to be had from the Hub: {without_token(first_line(error))}") from error
