"""Function signatures of Python's standard library, and the shortest call each of them allows.

The library is read as source (`ast`), never imported.
"""

from __future__ import annotations

import ast
import functools
import sys
import sysconfig
from pathlib import Path

from neuron_methods.support.errors import UserError

#: Parts of the library that are tests, applications or not plain Python modules.
_SKIPPED = {"test", "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip", "encodings", "distutils"}

#: Longest signature taken, in characters: about 25 tokens.
MAX_SIGNATURE = 64


def library_files(root: Path) -> list[Path]:
    """List source files of the standard library's public modules, one folder deep, in a fixed order."""
    files = sorted(root.glob("*.py")) + sorted(root.glob("*/*.py"))
    return [
        path
        for path in files
        if (top := path.relative_to(root).parts[0].removesuffix(".py")) in sys.stdlib_module_names
        and not top.startswith("_")
        and top not in _SKIPPED
    ]


def signatures_in(source: bytes | str) -> list[tuple[str, str, str]]:
    """Find public functions and methods of one module, as (name, signature, shortest call).

    Taken are those with something to leave out (a default, ``*args``, ``**kwargs`` or a keyword with a default), for
    which the shortest call is unambiguous: no positional-only parameters, no required keywords, no decorated methods.
    ``self`` stands in the signature and not in the call.
    """
    found: list[tuple[str, str, str]] = []

    def visit(body: list[ast.stmt], in_class: bool) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                visit(node.body, True)
            elif isinstance(node, ast.FunctionDef) and (call := shortest_call(node, in_class)) is not None:
                found.append((node.name, f"def {node.name}({ast.unparse(node.args)}):", call))

    visit(ast.parse(source).body, False)
    return found


def shortest_call(function: ast.FunctionDef, is_method: bool) -> str | None:
    """Write ``name(a, b)`` with only the parameters a caller must give; None where the demo does not ask for it."""
    arguments = function.args
    if function.name.startswith("_") or arguments.posonlyargs or None in arguments.kw_defaults:
        return None
    takes_self = bool(arguments.args) and arguments.args[0].arg == "self"
    if takes_self != is_method or (is_method and function.decorator_list):
        return None
    optional = len(arguments.defaults) + len(arguments.kwonlyargs)
    optional += (arguments.vararg is not None) + (arguments.kwarg is not None)
    if not optional:
        return None
    required = [a.arg for a in arguments.args[: len(arguments.args) - len(arguments.defaults)]]
    if is_method:
        required = required[1:]
    return f"{function.name}({', '.join(required)})"


@functools.cache
def library_signatures(root: Path | None = None) -> tuple[tuple[str, str, str], ...]:
    """List (name, signature, shortest call) of the standard library, distinct signatures, in a fixed order.

    Raises:
        UserError: where Python has no readable standard library source (frozen or zipped interpreters).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found: dict[str, tuple[str, str, str]] = {}
    for path in library_files(root):
        try:
            entries = signatures_in(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # a distribution's stray file is no reason to stop: thousands of others remain
        for entry in entries:
            if len(entry[1]) <= MAX_SIGNATURE:
                found.setdefault(entry[1], entry)
    if len(found) < 100:
        raise UserError(
            f"{root}: only {len(found)} function signatures found in Python's standard library; the demo reads its "
            "source files: use a Python installation that has them (not a frozen or zipped one)"
        )
    return tuple(found.values())
