"""JSON files of this package: written whole or not at all, read with their format and version checked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuron_methods.support.errors import UserError


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write a file beside `path` and move it into place.

    Raises:
        UserError: it cannot be written; what was at `path` is still there.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".writing")
    try:
        beside.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        beside.unlink(missing_ok=True)


def read_json(path: str | os.PathLike[str], what: str, *, format: str, version: int, again: str) -> dict[str, Any]:
    """Read a file that says its format and version.

    Args:
        path: the file.
        what: what it is to the user, for messages: "groups", "profile".
        format: the value its key `format` must have.
        version: likewise.
        again: how to make such a file.

    Raises:
        UserError: it is missing, truncated, of another format or version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what} {path}: cannot be read ({error.strerror or error}); check the path") from None
    except ValueError:
        raise UserError(f"{what} {path}: truncated, or not valid JSON; {again}") from None
    if not isinstance(content, dict) or content.get("format") != format:
        raise UserError(f"{what} {path}: not a file of the format {format!r}; {again}")
    if content.get("version") != version:
        raise UserError(
            f"{what} {path}: version {content.get('version')!r}, but this release reads version {version}; {again}"
        )
    return content
