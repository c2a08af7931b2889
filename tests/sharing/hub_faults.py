"""What a Hub, or what passes for one, can do wrong with an answer: one function each, by name."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler

from tests.sharing.hub_standin import Answer, Fault, StandIn

_PATIENCE = 30.0  # seconds after which a server that hangs gives up itself, for tests that fail


def _send(request: BaseHTTPRequestHandler, answer: Answer, **headers: str) -> None:
    status, own, content = answer
    request.send_response(status)
    for key, value in {"Content-Length": str(len(content)), **own, **headers}.items():
        request.send_header(key, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)


def silent(state: StandIn, request: BaseHTTPRequestHandler, answer: Answer) -> None:
    """Accepts, and never answers."""
    state.closing.wait(_PATIENCE)


def slow_head(state: StandIn, request: BaseHTTPRequestHandler, answer: Answer) -> None:
    """Answers byte by byte from the first on."""
    _drip(state, request, b"HTTP/1.1 200 OK\r\n" + b"X-Header: 1\r\n" * 1000)


def slow_body(state: StandIn, request: BaseHTTPRequestHandler, answer: Answer) -> None:
    """Answers at once, and its content comes byte by byte."""
    request.send_response(answer[0])
    content = answer[2] or b"x"
    for key, value in {**answer[1], "Content-Length": str(len(content) * 100)}.items():
        request.send_header(key, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.flush()
        _drip(state, request, content * 100)


def _drip(state: StandIn, request: BaseHTTPRequestHandler, content: bytes) -> None:
    for byte in content:
        request.wfile.write(bytes([byte]))
        request.wfile.flush()
        if state.closing.wait(0.02):
            return


def half(state: StandIn, request: BaseHTTPRequestHandler, answer: Answer) -> None:
    """Stops half-way, each time anew."""
    _send(request, (answer[0], answer[1], answer[2][: len(answer[2]) // 2]), **{"Content-Length": str(len(answer[2]))})


def longer(state: StandIn, request: BaseHTTPRequestHandler, answer: Answer) -> None:
    """Promises more than there is."""
    _send(request, answer, **{"Content-Length": str(len(answer[2]) + 100)})


def shorter(state: StandIn, request: BaseHTTPRequestHandler, answer: Answer) -> None:
    """Sends less than there is, and says so."""
    _send(request, (answer[0], answer[1], answer[2][:-1]))


def no_length(state: StandIn, request: BaseHTTPRequestHandler, answer: Answer) -> None:
    """Says no length and sends half."""
    request.send_response(answer[0])
    for key, value in answer[1].items():
        request.send_header(key, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(answer[2][: len(answer[2]) // 2])


def other(state: StandIn, request: BaseHTTPRequestHandler, answer: Answer) -> None:
    """Sends something else of the same length."""
    _send(request, (answer[0], answer[1], bytes(b ^ 1 for b in answer[2])))


def closed(state: StandIn, request: BaseHTTPRequestHandler, answer: Answer) -> None:
    """Hangs up."""
    request.connection.close()


def garbage(state: StandIn, request: BaseHTTPRequestHandler, answer: Answer) -> None:
    """Speaks another protocol."""
    request.wfile.write(b"\x15\x03\x01\x00\x02\x02\x16" * 10)


def _says(content: bytes, status: int = 200, **headers: str) -> Fault:
    def fault(state: StandIn, request: BaseHTTPRequestHandler, answer: Answer) -> None:
        _send(request, (status, {"Content-Type": "application/json"}, content), **headers)

    return fault


def to_itself(state: StandIn, request: BaseHTTPRequestHandler, answer: Answer) -> None:
    """Redirects to where it is."""
    _send(request, (301, {"Location": request.path}, b""))


def in_a_circle(state: StandIn, request: BaseHTTPRequestHandler, answer: Answer) -> None:
    """Redirects to a new place each time."""
    _send(request, (302, {"Location": f"{state.url}{request.path}?{len(state.asked)}"}, b""))


#: All of them.
FAULTS: dict[str, Fault] = {
    "silent": silent,
    "slow head": slow_head,
    "slow body": slow_body,
    "half": half,
    "longer": longer,
    "shorter": shorter,
    "no length": no_length,
    "other": other,
    "closed": closed,
    "garbage": garbage,
    "to itself": to_itself,
    "in a circle": in_a_circle,
    "html": _says(b"<html><body>Log in to the hotel</body></html>", **{"Content-Type": "text/html"}),
    "empty": _says(b""),
    "null": _says(b"null"),
    "number": _says(b"3"),
    "list": _says(b"[1, 2]"),
    "text": _says(b'"yes"'),
    "object": _says(b"{}"),
    "wrong types": _says(b'{"name": 3, "orgs": 3, "auth": 3, "files": 3, "objects": 3, "siblings": 3, "sha": 3}'),
    "cut": _says(b'{"name": "al'),
    "no UTF-8": _says(b"\xff\xfe\x00{"),
    "429 for an hour": _says(b"{}", 429, **{"Retry-After": "3600"}),
    "429 by its limits": _says(b"{}", 429, ratelimit='"api";r=0;t=3600'),
    "503 for an hour": _says(b"{}", 503, **{"Retry-After": "3600"}),
    "301 to nowhere": _says(b"", 301),
    **{
        str(status): _says(b'{"error": "made to fail"}', status)
        for status in (400, 401, 403, 404, 408, 409, 410, 416, 418, 429, 500, 502, 503, 504)
    },
}
