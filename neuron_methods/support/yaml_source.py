"""YAML as its author wrote it: keys with their lines, a key that appears twice refused instead of taken.

Every YAML that a user writes for us is read here: merges, routed models, tasks, recipes that are searched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from neuron_methods.support.documents import MOST_YAML, compose_yaml, parse_yaml, read_text
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import did_you_mean, shortened, unknown

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class YamlSource:
    """A YAML document and where each of its parts stands.

    Attributes:
        name: file name for messages.
        text: as it was read.
        content: what it says, a mapping.
    """

    name: str
    text: str
    content: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path, expected: str) -> YamlSource:
        """Read a file; see `parse`.

        Raises:
            UserError: it cannot be read, too.
        """
        return cls.parse(read_text(path, most=MOST_YAML), str(path), expected)

    @classmethod
    def parse(cls, text: str, name: str, expected: str) -> YamlSource:
        """Parse a YAML whose top level is a mapping.

        Args:
            text: of the YAML.
            name: file name for messages.
            expected: what it has to hold, for messages: "the key tasks with a list of tasks".

        Raises:
            UserError: naming the line where it is unreadable or repeats a key, or what was found instead of a mapping.
        """
        content = parse_yaml(text, name)
        if not isinstance(content, dict):
            found = "it is empty" if content is None else f"found a {type(content).__name__}"
            raise UserError(f"{name}: expected {expected}; {found}")
        return cls(name, text, content)

    def line_of(self, location: Sequence[str | int]) -> int:
        """Find the line, from 1 on, of the deepest part of `location` that is there.

        Args:
            location: keys and positions in lists, from the top.
        """
        node = compose_yaml(self.text, self.name)
        assert node is not None  # an empty document has no content to be wrong
        line = node.start_mark.line + 1
        for part in location:
            if isinstance(node, yaml.MappingNode):
                found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
                if found is None:
                    break
                line, node = found[0].start_mark.line + 1, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line + 1
        return line

    def validated(self, schema: type[Model], context: Any = None) -> Model:
        """Turn the content into a pydantic model, whose validators see `context`.

        Raises:
            UserError: naming file, line and key of the first problem; an unknown key comes before what is missing by
                its fault.
        """
        try:
            return schema.model_validate(self.content, context=context)
        except ValidationError as error:
            first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        location = tuple(part for part in first["loc"] if part != "[key]")
        shown = "".join(f"[{p}]" if isinstance(p, int) else f".{shortened(p, quote=False)}" for p in location)
        shown = shown.removeprefix(".")
        where = f"{self.name}, line {self.line_of(location)}: {shown}: " if location else f"{self.name}: "
        if first["type"] == "extra_forbidden":
            known = _known_keys(schema, location[:-1])
            hint = did_you_mean(location[-1], known) or f" (known: {', '.join(known)})"
            raise UserError(f"{where}unknown key{hint}")
        if first["type"] == "missing":
            raise UserError(f"{where}missing")
        found = first.get("input")
        told = f", found {shortened(found)}" if isinstance(found, (str, int, float)) and location else ""
        raise UserError(where + first["msg"].removeprefix("Value error, ") + told)

    def error(self, location: Sequence[str | int], problem: str) -> UserError:
        """Make the error about the part at `location`; it names file and line."""
        return UserError(f"{self.name}, line {self.line_of(location)}: {problem}")


@dataclass(frozen=True)
class YamlPart:
    """A part of a YAML that is being read, for messages about it.

    Attributes:
        source: the YAML.
        location: keys and positions in lists that lead to the part, from the top.
        shown: what messages begin with, after file and line: "task 'sums': ".
    """

    source: YamlSource
    location: tuple[str | int, ...] = ()
    shown: str = ""

    def at(self, *location: str | int, shown: str) -> YamlPart:
        """Go on to a part of this part, which adds `shown` to what messages begin with."""
        return YamlPart(self.source, (*self.location, *location), self.shown + shown)

    def error(self, problem: str, *keys: str | int) -> UserError:
        """Make the error about what `keys` lead to from here."""
        return self.source.error((*self.location, *keys), self.shown + problem)

    def check_keys(self, content: Iterable[Any], known: Iterable[str]) -> None:
        """Raise a UserError about the first key that is none of the known ones."""
        known = list(known)
        for key in content:
            if key not in known:
                raise self.error(unknown("key", key, known), str(key))


def _known_keys(schema: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue
        annotation = schema.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        schema = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(schema.model_fields)
