"""Short names for local paths. Imports nothing heavy."""

from __future__ import annotations

import ntpath
import re
from collections.abc import Iterable


def local_names(paths: Iterable[str]) -> dict[str, str]:
    """Give local paths short names: the last component, or the last that tells those apart which end alike.

    `experts/math/full` and `experts/code/full` become `math` and `code`.
    """
    parts = {path: components(path) for path in paths}
    names: dict[str, str] = {}
    for path, own in parts.items():
        alike = [other for other in parts.values() if other[-1] == own[-1]]
        at_depth = {d: [other[-min(d, len(other))] for other in alike] for d in range(1, max(map(len, alike)) + 1)}
        depth = next((d for d, found in at_depth.items() if len(set(found)) == len(found)), 1)
        name = own[-min(depth, len(own))]
        names[path] = f"{name}-{len(names) + 1}" if name in names.values() else name
    return names


def components(path: str) -> list[str]:
    """List the parts of a path, of any system, that are names; `model` where there is none, and for a user's home."""
    drive, rest = ntpath.splitdrive(path)
    parts = re.split(r"[\\/]", rest if drive.endswith(":") else path)
    names = [part for part in parts if part not in ("", ".", "..", "~")]
    if len(names) == 2 and rest[:1] in ("/", "\\") and names[0].lower() in ("home", "users"):
        return ["model"]  # and no user's name
    return names or ["model"]
