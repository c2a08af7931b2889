"""Short names for local paths. Imports nothing heavy."""

from __future__ import annotations

import ntpath
import re
from collections.abc import Iterable


def local_names(paths: Iterable[str]) -> dict[str, str]:
    """Give local paths short names: the last component, or the last that tells those apart which end alike.

    `experts/math/full` and `experts/code/full` become `math` and `code`.
    """
    paths = list(dict.fromkeys(paths))
    names = {path: components(path)[-1] for path in paths}
    for name in set(names.values()):
        alike = [path for path in paths if names[path] == name]
        if len(alike) > 1:
            names.update(_told_apart(alike))
    for index, path in enumerate(paths):  # whatever is still alike
        if names[path] in [names[other] for other in paths[:index]]:
            names[path] = f"{names[path]}-{index + 1}"
    return names


def _told_apart(paths: list[str]) -> dict[str, str]:
    parts = {path: components(path) for path in paths}
    for depth in range(2, max(map(len, parts.values())) + 1):
        found = {path: own[-min(depth, len(own))] for path, own in parts.items()}
        if len(set(found.values())) == len(paths):
            return found
    return {path: own[-1] for path, own in parts.items()}


def components(path: str) -> list[str]:
    """List the parts of a path, of any system, that are names; `model` where there is none."""
    drive, rest = ntpath.splitdrive(path)
    parts = re.split(r"[\\/]", rest if drive.endswith(":") else path)
    return [part for part in parts if part not in ("", ".", "..", "~")] or ["model"]
