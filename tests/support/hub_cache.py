"""The Hub's cache as its client fills it, made by hand; and a process whose every way out is watched."""

import os
import shutil
from pathlib import Path

_GUARD = """
import os, socket
def _tell(what):
    def told(*args, **_):
        with open(os.environ["ASKED"], "a") as file:
            file.write(f"{what} {args[-1] if what == 'connect' else args[:2]}\\n")
        raise OSError(101, "Network is unreachable")
    return told
socket.getaddrinfo = _tell("look up")
socket.socket.connect = socket.socket.connect_ex = _tell("connect")
"""


def cache(home: Path, repository: str, source: Path) -> Path:
    """Put a directory into the cache under `home` as the newest snapshot of a repository; files are links to blobs."""
    place = home / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / ("0123abcd" * 5)
    for folder in (place / "blobs", place / "refs", snapshot):
        folder.mkdir(parents=True)
    (place / "refs" / "main").write_text(snapshot.name)
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        name = file.relative_to(source)
        blob = place / "blobs" / name.as_posix().replace("/", "_")
        shutil.copy(file, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


def watched(folder: Path, home: Path) -> dict[str, str]:
    """Variables for a process that finds `home` for the Hub's and no network; `asked` lists what it tried."""
    guard = folder / "guard"
    guard.mkdir(exist_ok=True)
    (guard / "sitecustomize.py").write_text(_GUARD)
    (folder / "asked").write_text("")
    path = os.pathsep.join(filter(None, [str(guard), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "ASKED": str(folder / "asked"), "HF_HOME": str(home)}


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text().splitlines()
