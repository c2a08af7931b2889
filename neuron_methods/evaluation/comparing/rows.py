"""Rows that are finished, a file each with what it was made from; and which of a method's points is its row."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from neuron_methods.evaluation.tuning.search import Point
from neuron_methods.support.documents import read_object
from neuron_methods.support.files import write_json

AGAIN = "remove it, or give --force to begin anew"


def best_point(tried: Iterable[tuple[float, Point]]) -> tuple[float, Point]:
    """Choose the point with the highest value on validation data, of several the one that was tried first."""
    return max(tried, key=lambda pair: pair[0])


class Rows:
    """Results by name, each with the key of what it was made from, written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        """`folder` need not be there yet."""
        self.folder = folder

    def place(self, name: str) -> Path:
        """Say which file a row is in: names differ where their shortened forms do not."""
        short = re.sub(r"[^\w-]+", "_", name)[:60]
        return self.folder / f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.json"

    def check(self, content: Mapping[str, Any], place: Path) -> None:
        """Raise UserError where a file is no row."""

    def read(self, name: str, key: Mapping[str, Any]) -> Any:
        """Read the result of that name and key; None where there is none."""
        place = self.place(name)
        if not place.is_file():
            return None
        content = read_object(place, again=AGAIN)
        self.check(content, place)
        return content["result"] if content["key"] == as_stored(key) else None

    def make(self, name: str, key: Mapping[str, Any], build: Callable[[], Any]) -> Any:
        """Give the result as it is kept, or build and keep it now."""
        result = self.read(name, key)
        if result is None:
            result = as_stored(build())
            write_json(self.place(name), {"key": as_stored(key), "result": result})
        return result


def as_stored(content: Any) -> Any:
    """What is read back of something that is written as JSON."""
    return json.loads(json.dumps(content))
