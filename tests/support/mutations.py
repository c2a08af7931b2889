"""What is done to files to see what becomes of them: JSON that says something else, bytes that are lost or flipped."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

import yaml

NESTED: Any = 0
for _ in range(120):
    NESTED = [NESTED]

#: Values that nobody expects, one of each kind.
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    10**6,
    10**12,
    10**30,
    0.5,
    -2.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "/etc/passwd",
    "a\nb\x1b[31m\0",
    "é" * 300,
    "(a+)+$",
    [],
    [1],
    ["x", None],
    {},
    {"x": 1},
    {"": {}},
    NESTED,
)


def places(content: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values within a JSON, its own first; of a long list or object the first few."""
    yield above
    if isinstance(content, (dict, list)):
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        for key in keys[:40]:
            yield from places(content[key], (*above, key))


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """The JSON with another value at a place."""
    if not place:
        return value
    content = copy.deepcopy(content)
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    return content


def without(content: Any, place: tuple[Any, ...]) -> Any:
    """The JSON without what is at a place."""
    content = copy.deepcopy(content)
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    del holder[place[-1]]
    return content


def mutated_json(text: bytes, generator: random.Random) -> bytes:
    """A JSON with one value dropped, replaced, nested, or a key given twice."""
    content = json.loads(text)
    place = generator.choice(list(places(content)))
    how = generator.choice(["drop", "replace", "replace", "replace", "nest", "twice"])
    if how == "drop" and place:
        content = without(content, place)
    elif how == "nest":
        held = content
        for key in place:
            held = held[key]
        content = changed(content, place, generator.choice([[held], {"x": held}]))
    elif how == "twice" and isinstance(content, dict) and content:
        key = generator.choice(list(content))
        return (json.dumps(content)[:-1] + f", {json.dumps(key)}: 1}}").encode()
    else:
        content = changed(content, place, generator.choice(ODD))
    return json.dumps(content).encode()


def mutated_bytes(data: bytes, generator: random.Random) -> bytes:
    """Bytes cut short, or with a few of them flipped."""
    if generator.random() < 0.4:
        return data[: generator.randrange(len(data) + 1)]
    found = bytearray(data)
    for _ in range(generator.choice([1, 1, 3, 20])):
        within = min(len(found), generator.choice([16, 400, len(found)]))
        found[generator.randrange(within)] ^= 1 << generator.randrange(8)
    return bytes(found)


def mutated_safetensors(data: bytes, generator: random.Random) -> bytes:
    """A safetensors file whose header says something else."""
    length = struct.unpack("<Q", data[:8])[0]
    header = mutated_json(data[8 : 8 + length], generator)
    said = generator.choice([len(header)] * 6 + [0, 2**40, 2**63])
    return struct.pack("<Q", said) + header + data[8 + length :]


def mutated(name: str, data: bytes, generator: random.Random) -> bytes:
    """What a file of this name becomes."""
    if name.endswith(".jsonl"):
        lines = data.splitlines()
        number = generator.randrange(len(lines))
        lines[number] = mutated_json(lines[number], generator)
        return b"\n".join(lines) + b"\n"
    if name.endswith(".yml") and generator.random() < 0.8:  # JSON is YAML
        return mutated_json(json.dumps(yaml.safe_load(data)).encode(), generator)
    if name.endswith(".json") and generator.random() < 0.85:
        return mutated_json(data, generator)
    if name.endswith(".safetensors") and generator.random() < 0.5:
        return mutated_safetensors(data, generator)
    return mutated_bytes(data, generator)
