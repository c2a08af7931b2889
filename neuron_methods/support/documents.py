"""The door: everything that is read as a document comes in here, JSON, YAML, lines of JSON, metadata of tensors.

Nobody knows who wrote a file. So it must be a regular file (a pipe would be waited for, a device has no end), no longer
than its kind may be, UTF-8, nested no deeper than anyone means it, without a key twice, and of the shape that its
pydantic schema gives. Whatever it is instead is one line that names file, key, what was found and what to do.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from neuron_methods.support.errors import UserError
from neuron_methods.support.text import format_bytes, shortened

Schema = TypeVar("Schema")

# Longest files, in bytes. The index of a model of 400 B parameters has 1 MB, the largest tokenizer.json about 40 MB.
MOST_JSON = 256 << 20
MOST_YAML = 1 << 20  # PyYAML reads about 100 kB a second
MOST_LINE = 64 << 20
_DEEPEST = 100
_SURROGATE = r"(?i)\\ud[89a-f]"  # an escape of one, which may be alone
_MOST_BITS = 4096  # of a whole number in YAML
_MOST_NODES = 100_000  # of a YAML, with its aliases followed


class Given(BaseModel):
    """What our own formats are read as: what is unknown is refused, a number is no text and a text no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Foreign(BaseModel):
    """What others' formats are read as: only what we use is checked, the rest goes by."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


def read_bytes(path: str | os.PathLike[str], what: str = "", *, most: int = MOST_JSON) -> bytes:
    """Read a regular file.

    Args:
        path: the file; a link stands for what it points to.
        what: what it is to the user, for messages: "groups", "profile".
        most: the longest it may be, in bytes.

    Raises:
        UserError: it is not there, is a directory, pipe, socket or device, or is longer.
    """
    shown = f"{what} {path}".strip()
    with open_file(path, shown) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise UserError(
                f"{shown}: {format_bytes(size)} long, but no such file has more than {format_bytes(most)}; check what "
                "it is"
            )
        return file.read(most + 1)


def open_file(path: str | os.PathLike[str], shown: str) -> BinaryIO:
    """Open a regular file to read it piece by piece; the path is taken letter by letter, `shown` is for messages.

    Raises:
        UserError: it is not there, is a directory, pipe, socket or device.
    """
    descriptor = None
    try:
        # O_NONBLOCK: the opening of a pipe that nobody writes to returns at once.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise UserError(f"{shown}: no regular file but a pipe, socket or device; give a file")
        return os.fdopen(descriptor, "rb")
    except BaseException as error:
        if descriptor is not None:
            os.close(descriptor)
        if not isinstance(error, (OSError, ValueError)):  # ValueError: a null byte in the path
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{shown}: cannot be read ({reason}); check the path") from None


def check_regular(file: str | os.PathLike[str]) -> None:
    """Make sure that a path is a regular file, or a link to one, before it is opened: a pipe would be waited for.

    Raises:
        UserError: it is something else, or is not there.
    """
    try:
        mode = os.stat(file).st_mode
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error}); check it") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{file}: a directory, but a file of that name is expected there")
    if not stat.S_ISREG(mode):
        raise UserError(f"{file}: no regular file but a pipe, socket or device; put the file itself there")


def read_text(path: str | os.PathLike[str], what: str = "", *, most: int = MOST_JSON) -> str:
    """Read a regular file as text; arguments and errors as in `read_bytes`.

    Raises:
        UserError: it is not UTF-8, too.
    """
    try:
        return read_bytes(path, what, most=most).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{f'{what} {path}'.strip()}: cannot be read (not UTF-8); save it as UTF-8") from None


def parse_json(text: str | bytes, shown: str, again: str = "make it again") -> Any:
    """Parse JSON.

    Args:
        text: of it.
        shown: what messages begin with: the file, and the line or key where it stands.
        again: what to do where it is damaged: how to make such a file.

    Raises:
        UserError: it is truncated or no JSON, has a key twice, or is nested too deeply.
    """
    try:
        content = json.loads(text, object_pairs_hook=_without_repetition)
        _check_depth(content)
        if re.search(_SURROGATE if isinstance(text, str) else _SURROGATE.encode(), text):
            json.dumps(content, ensure_ascii=False).encode()
    except _Repeated as error:
        raise UserError(f"{shown}: key {shortened(error.key)} appears twice in one object; {again}") from None
    except RecursionError:
        raise UserError(f"{shown}: nested more than {_DEEPEST} deep; {again}") from None
    except UnicodeEncodeError:
        raise UserError(f"{shown}: holds half of a surrogate pair, which is no character; {again}") from None
    except ValueError:
        raise UserError(f"{shown}: truncated, or not valid JSON; {again}") from None
    return content


def read_object(path: str | os.PathLike[str], what: str = "", again: str = "make it again") -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: the file.
        what: what it is to the user, for messages: "groups", "profile".
        again: what to do where it is damaged: how to make such a file.

    Raises:
        UserError: it is missing, truncated, or holds something else.
    """
    shown = f"{what} {path}".strip()
    content = parse_json(read_text(path, what), shown, again)
    if not isinstance(content, dict):
        raise UserError(f"{shown}: expected a JSON object, found a {type(content).__name__}; {again}")
    return content


def read_json(path: str | os.PathLike[str], what: str, *, format: str, version: int, again: str) -> dict[str, Any]:
    """Read a file that says its format and version; `what` and `again` are as for `read_object`.

    Raises:
        UserError: it is missing, truncated, of another format or version.
    """
    content = read_object(path, what, again)
    if content.get("format") != format:
        raise UserError(f"{what} {path}: not a file of the format {format!r}; {again}")
    if content.get("version") != version:
        raise UserError(
            f"{what} {path}: version {shortened(content.get('version'))}, but this release reads version {version}; "
            f"{again}"
        )
    return content


def read_lines(path: str | os.PathLike[str], what: str = "", again: str = "make it again") -> Iterator[tuple[str, Any]]:
    """Read a file of one JSON per line; empty lines are passed over.

    Yields:
        Where it stands, for messages ("FILE, line 3"), and what it says.

    Raises:
        UserError: the file cannot be read, or a line is no JSON.
    """
    for number, line in enumerate(read_bytes(path, what).split(b"\n"), 1):
        if line.strip():
            where = f"{what} {path}, line {number}".strip()
            yield where, parse_json(line, where, again)


def validated(content: Any, schema: type[Schema] | Any, shown: str, again: str = "make it again") -> Schema:
    """Check what a document says against its schema.

    Args:
        content: as parsed.
        schema: a pydantic model, a dataclass, or any type that pydantic validates.
        shown: what messages begin with: the file.
        again: what to do where it is wrong.

    Raises:
        UserError: naming the first key that is wrong, what was expected and what was found.
    """
    try:
        return TypeAdapter(schema).validate_python(content)
    except ValidationError as error:
        first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        raise UserError(f"{shown}: {problem_of(first)}; {again}") from None
    except RecursionError:
        raise UserError(f"{shown}: nested more than {_DEEPEST} deep; {again}") from None


def problem_of(error: Mapping[str, Any]) -> str:
    """Say what pydantic found wrong first: key, problem, and the value where it is short to say."""
    location = [part for part in error["loc"] if part != "[key]"]
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{shortened(p, quote=False)}" for p in location)
    where = f"{key.removeprefix('.')}: " if location else ""
    if error["type"] == "missing":
        return f"{where}missing"
    if error["type"] == "extra_forbidden":
        return f"{where}unknown key"
    found = error.get("input")
    if isinstance(found, (dict, list, tuple)):
        told = f", found a {type(found).__name__}"
    else:
        told = f", found {shortened(found)}"
    return where + error["msg"].removeprefix("Value error, ") + told


def compose_yaml(text: str, shown: str) -> yaml.Node | None:
    """Parse YAML into nodes, which are no larger than the text is long and no deeper than anyone means.

    Raises:
        UserError: naming the line where it is unreadable, repeats a key, or refers to itself.
    """
    if len(text) > MOST_YAML:
        raise UserError(f"{shown}: {format_bytes(len(text))} of YAML; no more than {format_bytes(MOST_YAML)} is read")
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None:
            _count(node, shown, {}, ())
        return node
    except yaml.YAMLError as error:
        raise _yaml_error(error, shown) from None
    except RecursionError:
        raise UserError(f"{shown}: nested more than {_DEEPEST} deep") from None
    except ValueError as error:  # of the reader: characters that YAML does not allow
        raise UserError(f"{shown}: not readable as YAML: {error}") from None


def construct_yaml(node: yaml.Node | None, shown: str) -> Any:
    """Turn nodes into mappings, lists and values.

    Raises:
        UserError: naming the line of a value that is none of its kind: a date that is no date.
    """
    constructor = _Constructor("")
    try:
        return None if node is None else constructor.construct_document(node)
    except yaml.YAMLError as error:
        raise _yaml_error(error, shown) from None
    except (ValueError, TypeError, AttributeError) as error:
        # Of dates and numbers that have the form of one and are none.
        raise UserError(f"{shown}: not readable as YAML: {error}; put it in quotes") from None


def parse_yaml(text: str, shown: str) -> Any:
    """Parse one YAML document; errors as in `compose_yaml` and `construct_yaml`."""
    return construct_yaml(compose_yaml(text, shown), shown)


def front_matter(text: str, shown: str) -> dict[str, Any]:
    """Parse the YAML that a README begins with; {} where there is none.

    Raises:
        UserError: it is none that can be read, or no mapping.
    """
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, flags=re.DOTALL | re.MULTILINE)
    content = parse_yaml(found[1], shown) if found else None
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{shown}: its front matter is a {type(content).__name__}, expected keys and values")
    return content or {}


class _Constructor(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that appears twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"key {key.value!r} appears twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = super().construct_yaml_int(node)
        if number.bit_length() > _MOST_BITS:  # in hexadecimal they may be too long to be printed
            problem = f"a whole number of {number.bit_length()} bits"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return number


_Constructor.add_constructor("tag:yaml.org,2002:int", _Constructor.construct_yaml_int)


def _yaml_error(error: yaml.YAMLError, shown: str) -> UserError:
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    reading = "" if "appears twice" in problem else "not readable as YAML: "
    return UserError(f"{shown}{where}: {reading}{problem}")


def _count(node: yaml.Node, shown: str, counted: dict[int, int], above: tuple[int, ...]) -> int:
    """Nodes below and with this one, each alias counted where it stands."""
    if id(node) in counted:
        return counted[id(node)]
    where = f"{shown}, line {node.start_mark.line + 1}"
    if id(node) in above:
        raise UserError(f"{where}: an alias refers to what it stands in")
    if len(above) > _DEEPEST:
        raise UserError(f"{where}: nested more than {_DEEPEST} deep")
    number = 1
    if isinstance(node, yaml.CollectionNode):
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        for part in parts:
            number += _count(part, shown, counted, (*above, id(node)))
    if number > _MOST_NODES:
        raise UserError(f"{where}: stands for more than {_MOST_NODES} values, with its aliases written out")
    counted[id(node)] = number
    return number


class _Repeated(Exception):
    def __init__(self, key: str) -> None:
        self.key = key


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Repeated(key)
            seen.add(key)
    return content


def _check_depth(content: Any) -> None:
    """Raise RecursionError for what is nested deeper than other programs can follow."""
    level = [content]
    for _ in range(_DEEPEST):
        level = [
            part
            for value in level
            if isinstance(value, (dict, list))
            for part in (value.values() if isinstance(value, dict) else value)
            if isinstance(part, (dict, list))
        ]
        if not level:
            return
    raise RecursionError
