"""Where the page reads and writes: from a directory on, and, where that is closed, nowhere outside of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuron_methods.models.reference import ModelName
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import shortened
from neuron_methods.support.yaml_source import YamlSource


@dataclass(frozen=True)
class Root:
    """The directory that paths start from.

    Attributes:
        place: absolute, without links.
        closed: whether nothing outside of it may be named.
    """

    place: Path
    closed: bool = False

    def path(self, text: str, what: str) -> Path:
        """Find what a path names.

        Raises:
            UserError: it names nothing, or something outside.
        """
        if not text.strip() or "\0" in text:
            raise UserError(f"{what}: name a directory")
        found = self.place / os.path.expanduser(text.strip())
        if self.closed and not self._holds(str(found)):
            raise UserError(f"{what}: {shortened(text)} is outside of the page's directory, and nothing there is read")
        return found

    def check_words(self, text: str, what: str) -> None:
        """Make sure that whatever in a text could be a path leads nowhere outside; raises UserError."""
        if self.closed:
            for part in _parts(text):
                self.path(part, what)

    def check_model(self, text: str, what: str) -> None:
        """Make sure that a model is inside or on the Hub, and so is the base that an adapter's config names.

        Raises:
            UserError: part of it is outside, or it cannot be found out what it is.
        """
        self.check_words(text, what)
        if self.closed:
            for place in ModelName.find(text).here():
                self.path(place, what)

    def check_yaml(self, text: str, name: str) -> None:
        """Make sure that whatever a YAML says could be a path leads nowhere outside, nor what adapters in it name.

        Raises:
            UserError: naming it; or the YAML cannot be read.
        """
        if not self.closed:
            return
        content = YamlSource.parse(text, name, "keys such as merge_method and models").content
        for word in _words(content):
            self.check_words(word, name)
        for model in _models(content):
            self.check_model(model, name)

    def _holds(self, path: str) -> bool:
        try:
            found = Path(os.path.realpath(path))
        except (OSError, ValueError):
            return False
        return found == self.place or self.place in found.parents


def _parts(text: str) -> Iterator[str]:
    """Whatever in a text may be taken for a path: all of it, and what a + or an @ parts."""
    found = {text, *text.split("+")}
    yield from (part for part in found | {part.partition("@")[0] for part in found} if part.strip())


def _words(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _words(key)
            yield from _words(value)
    elif isinstance(content, list):
        for value in content:
            yield from _words(value)
    elif isinstance(content, str):
        yield content


def _models(content: Any) -> Iterator[str]:
    """All models of a YAML, as they are written; a mapping of path and revision has its path."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in ("model", "base_model", "lora", "path") and isinstance(value, str):
                yield value
            else:
                yield from _models(value)
    elif isinstance(content, list):
        for value in content:
            yield from _models(value)
