"""Public names of a package that are imported on first use (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module


def lazily(package: str, exports: Mapping[str, str]) -> Callable[[str], object]:
    """Make the `__getattr__` of a package whose public names cost nothing until they are used.

    Args:
        package: its `__name__`.
        exports: public name -> module that defines it.
    """

    def getattribute(name: str) -> object:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(exports[name]), name)

    return getattribute
