"""How a command starts: torch, transformers and mergekit are imported without looking for garbage among them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Import within the block: nothing is collected there, and what it has brought is not searched for garbage later.

    A merge imports 700,000 objects that stay until its end. Python would look at all of them again each time their
    number has grown by a quarter, which takes a quarter of the processor time of merging a small model.
    """
    collects, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        if collects:
            gc.enable()
