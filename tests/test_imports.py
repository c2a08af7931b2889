"""The map of rooms in CONTRIBUTING, held to what the package imports: one way, no exception, no circle.

Every import counts, wherever it stands: at the top, in a function, under TYPE_CHECKING, and a module's full name in a
string, by which packages and the command import lazily. `neuron_methods` itself (its version, `register`, the start-up
hook) lies outside of the rooms: all may import it, and what it names by strings is its job.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "neuron_methods"
LINES = 400


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def room_of(module: str) -> str | None:
    """The room of a module; None for what lies outside of the rooms."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and f"{PACKAGE}.{parts[1]}" in ROOMS else None


def imports_of(module: str) -> Iterator[tuple[str, int]]:
    """(module of the package, line) of every import and of every module's name in a string."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            source = ".".join(filter(None, (above, node.module)))
            names = [f"{source}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value.partition(":")[0]]
        else:
            continue
        for name in names:
            # `from package import name` imports a module of that name, or what the package's __init__ defines.
            found = next((n for n in (name, name.rpartition(".")[0]) if n in MODULES), None)
            if found is not None and found != PACKAGE:
                yield found, node.lineno


ROOMS = {f"{PACKAGE}.{path.parent.name}" for path in (ROOT / PACKAGE).glob("*/__init__.py")}
IMPORTS = {module: sorted(set(imports_of(module))) for module in MODULES}


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    """Room -> rooms that it may import, in the order of the table."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)/` \|.*\| ([^|]*) \|$", text, re.M)
    assert rows
    return {room: [] if may == "–" else may.split(", ") for room, may in rows}


def test_the_table_has_every_room_and_goes_one_way(table):
    assert {f"{PACKAGE}.{room}" for room in table} == ROOMS
    order = list(table)
    for room, may in table.items():
        assert may == [other for other in order[: order.index(room)] if other in may], room


def test_a_room_imports_what_the_table_lets_it(table):
    wrong = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {found}"
        for module, imports in IMPORTS.items()
        for found, line in imports
        if (room := room_of(module)) and room_of(found) not in (None, room, *table[room])
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_the_table_lets_no_room_import_what_it_does_not(table):
    used = {room: {room_of(f) for m, i in IMPORTS.items() if room_of(m) == room for f, _ in i} for room in table}
    idle = {room: left for room, may in table.items() if (left := [other for other in may if other not in used[room]])}
    assert not idle


def test_no_two_modules_import_each_other_in_a_circle():
    circles, done = [], set()

    def visit(module: str, way: list[str]) -> None:
        if module in way:
            circles.append(" -> ".join([*way[way.index(module) :], module]))
        elif module not in done:
            for found in dict.fromkeys(found for found, _ in IMPORTS[module] if room_of(found) and found != module):
                visit(found, [*way, module])
            done.add(module)

    for module in IMPORTS:
        if room_of(module):
            visit(module, [])
    assert not circles, "\n" + "\n".join(circles)


def test_modules_are_read_in_one_sitting():
    long = {name: count for name, path in MODULES.items() if (count := path.read_text().count("\n")) > LINES}
    assert not long
