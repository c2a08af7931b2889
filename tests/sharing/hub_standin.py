"""A small Hub on loopback: enough of its interface for the real client to create, upload, commit and download."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

Answer = tuple[int, dict[str, str], bytes]
#: Given the state, the request, and the answer that would be right: sends what it likes, and hangs up.
Fault = Callable[["StandIn", BaseHTTPRequestHandler, Answer], None]


@dataclass
class Repository:
    """Files by branch; a file is its bytes and whether it is a large one."""

    private: bool = False
    branches: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)


@dataclass
class StandIn:
    """The state of the Hub, and what was asked of it.

    Attributes:
        users: token -> what whoami answers.
        fail: called with (method, path) before each answer; a number is the status to fail with, "drop" hangs up, a
            function takes the place of the answer, see `Fault`.
        says: the message of a failure that was asked for.
        asked: (method, path) of every request.
    """

    url: str = ""
    users: dict[str, dict] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    fail: Callable[[str, str], int | str | Fault | None] = lambda _method, _path: None
    says: str = "made to fail"
    asked: list[tuple[str, str]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def count(self, method: str, part: str) -> int:
        return sum(1 for m, path in self.asked if m == method and part in path)

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        return {name: content for name, (content, _) in self.repositories[repository].branches[branch].items()}


def user(name: str, role: str = "write", orgs: dict[str, str] | None = None, fine: dict | None = None) -> dict:
    token: dict = {"displayName": "test", "role": role}
    if fine is not None:
        token["fineGrained"] = fine
    entries = [{"name": org, "type": "org", "roleInOrg": role} for org, role in (orgs or {}).items()]
    return {"type": "user", "name": name, "orgs": entries, "auth": {"type": "access_token", "accessToken": token}}


@contextmanager
def hub() -> Iterator[StandIn]:
    state = StandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _serve(self) -> None:
            path = unquote(urlsplit(self.path).path)
            query = parse_qs(urlsplit(self.path).query)
            body = self._body()
            state.asked.append((self.command, path))
            state.headers.append(dict(self.headers))
            failure = state.fail(self.command, path)
            if failure == "drop":
                self.close_connection = True
                self.connection.close()
                return
            if callable(failure):
                self.close_connection = True
                with suppress(OSError):  # the client has left
                    failure(state, self, _answer(state, self, path, query, body))
                return
            if isinstance(failure, int):
                status, headers, content = _error(failure, state.says)
            else:
                status, headers, content = _answer(state, self, path, query, body)
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline().strip() or b"0", 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        do_GET = do_HEAD = do_POST = do_PUT = _serve

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _json(content: object, status: int = 200, **headers: str) -> Answer:
    return status, {"Content-Type": "application/json", **headers}, json.dumps(content).encode()


def _error(status: int, message: str, code: str = "") -> Answer:
    return _json({"error": message}, status, **({"X-Error-Code": code} if code else {}))


def _answer(state: StandIn, request: BaseHTTPRequestHandler, path: str, query: dict, body: bytes) -> Answer:
    if path.startswith("/objects/"):  # signed addresses: no token
        state.large[path.removeprefix("/objects/")] = body
        return 200, {}, b""
    token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
    who = state.users.get(token)
    if who is None:
        return _error(401, "Invalid credentials in Authorization header")
    if path == "/api/whoami-v2":
        return _json(who)
    if path == "/api/validate-yaml":
        front = json.loads(body)["content"]
        bad = not front.startswith("---\n")
        return _json({"errors": [{"message": "no front matter"}] if bad else [], "warnings": []}, 400 if bad else 200)
    if path == "/api/repos/create":
        return _create(state, who, json.loads(body))
    if path.endswith(".git/info/lfs/objects/batch"):
        return _batch(state, json.loads(body))
    for name, repository in state.repositories.items():
        for prefix in (f"/api/models/{name}", f"/{name}"):
            if path == prefix or path.startswith(prefix + "/"):
                rest = path.removeprefix(prefix).strip("/")
                return _of_repository(state, who, name, repository, request.command, rest, query, body)
    return _error(404, "Repository not found", "RepoNotFound")


def _may_write(who: dict, name: str) -> bool:
    return name.split("/")[0] in (who["name"], *(o["name"] for o in who["orgs"] if o["roleInOrg"] != "read"))


def _create(state: StandIn, who: dict, asked: dict) -> Answer:
    name = f"{asked['organization'] or who['name']}/{asked['name']}"
    if not _may_write(who, name):
        return _error(403, "You don't have the rights to create a model under this namespace")
    if name in state.repositories:
        return _json({"error": "You already created this model repo", "url": f"{state.url}/{name}"}, 409)
    state.repositories[name] = Repository(private=asked.get("visibility") == "private")
    return _json({"url": f"{state.url}/{name}"})


def _batch(state: StandIn, asked: dict) -> Answer:
    objects = []
    for entry in asked["objects"]:
        if entry["oid"] in state.large:
            objects.append(entry)
        else:
            objects.append({**entry, "actions": {"upload": {"href": f"{state.url}/objects/{entry['oid']}"}}})
    return _json({"transfer": "basic", "objects": objects})


def _sha(files: dict[str, tuple[bytes, bool]]) -> str:
    listing = {name: hashlib.sha1(content).hexdigest() for name, (content, _) in files.items()}
    return hashlib.sha1(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def _find(repository: Repository, revision: str) -> dict[str, tuple[bytes, bool]] | None:
    if revision in repository.branches:
        return repository.branches[revision]
    return next((files for files in repository.branches.values() if _sha(files) == revision), None)


def _of_repository(
    state: StandIn, who: dict, name: str, repository: Repository, method: str, rest: str, query: dict, body: bytes
) -> Answer:
    what, _, argument = rest.partition("/")
    if what in ("", "revision"):
        files = _find(repository, argument or "main")
        if files is None:
            return _error(404, "Invalid rev id", "RevisionNotFound")
        siblings = [{"rfilename": file} for file in files]
        return _json(
            {
                "_id": "1",
                "id": name,
                "sha": _sha(files),
                "private": repository.private,
                "siblings": siblings,
                "tags": [],
            }
        )
    if what == "tree":
        files = _find(repository, argument) or {}
        return _json([_entry(file, *stored) for file, stored in files.items()])
    if what == "resolve":
        for revision in (*repository.branches, *map(_sha, repository.branches.values())):
            files = _find(repository, revision)
            if files is not None and argument.removeprefix(f"{revision}/") in files and argument.startswith(revision):
                content, _ = files[argument.removeprefix(f"{revision}/")]
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                return 200, {"ETag": etag, "X-Repo-Commit": _sha(files)}, content
        return _error(404, "Entry not found", "EntryNotFound")
    pull_request = "create_pr" in query
    if not _may_write(who, name) and not pull_request:
        return _error(403, "Forbidden: you may not write to this repository")
    if what == "branch":
        if argument in repository.branches:
            return _error(409, "Reference already exists")
        repository.branches[argument] = dict(repository.branches["main"])
        return _json({})
    if argument not in repository.branches:
        return _error(404, "Invalid rev id", "RevisionNotFound")
    if what == "preupload":
        asked = json.loads(body)["files"]
        stored = repository.branches[argument]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
                "oid": _oid(*stored[file["path"]]) if file["path"] in stored else None,
            }
            for file in asked
        ]
        return _json({"files": modes})
    return _commit(state, name, repository, argument, pull_request, body)


def _oid(content: bytes, large: bool) -> str:
    return hashlib.sha256(content).hexdigest() if large else _blob(content)


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(file: str, content: bytes, large: bool) -> dict:
    entry: dict = {"type": "file", "path": file, "size": len(content), "oid": _blob(content)}
    if large:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


def _commit(state: StandIn, name: str, repository: Repository, branch: str, pull_request: bool, body: bytes) -> Answer:
    lines = [json.loads(line) for line in body.splitlines()]
    files = dict(repository.branches[branch])
    for line in lines:
        value = line["value"]
        if line["key"] == "header":
            repository.messages.append(value["summary"])
        elif line["key"] == "file":
            files[value["path"]] = (base64.b64decode(value["content"]), False)
        elif line["key"] == "lfsFile":
            if value["oid"] not in state.large:
                return _error(400, f"LFS object {value['oid']} was never uploaded")
            files[value["path"]] = (state.large[value["oid"]], True)
    url = None
    if pull_request:
        number = sum(key.startswith("refs/pr/") for key in repository.branches) + 1
        branch, url = f"refs/pr/{number}", f"{state.url}/{name}/discussions/{number}"
    repository.branches[branch] = files
    sha = _sha(files)
    return _json({"commitUrl": f"{state.url}/{name}/commit/{sha}", "commitOid": sha, "pullRequestUrl": url})
