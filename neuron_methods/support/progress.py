"""Progress of long work on stderr: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from neuron_methods.support.text import shortened

#: Seconds between two lines where stderr is no terminal, unless the environment says otherwise.
LINE_INTERVAL = 10.0
LINE_VARIABLE = "MERGEKIT_NEURON_LINE_SECONDS"

_COUNTED = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} elapsed, {remaining} to go{postfix}"
_OPEN = "{desc}: {n_fmt} {unit}s, {elapsed} elapsed{postfix}"


class Counted(NamedTuple):
    """What a line of progress says: what is going on, and how many of how many units are done."""

    what: str
    done: int
    total: int

    @classmethod
    def read(cls, line: str) -> Counted | None:
        """Read a line that a bar has written; None: it is another one."""
        found = re.match(r"(.+): (\d+) of (\d+) \S+s, .* elapsed, .* to go", line)
        return cls(found[1], int(found[2]), int(found[3])) if found else None


def line_interval() -> float:
    """Tell how many seconds pass between two lines."""
    try:
        return max(0.0, float(os.environ[LINE_VARIABLE]))
    except (KeyError, ValueError):
        return LINE_INTERVAL


class _Lines:
    """A stream that ends what tqdm would overwrite, so that a log holds whole lines and no carriage returns."""

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write what is visible of `text` as a line of its own."""
        line = text.replace("\r", "").strip()
        if line:
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        """Flush the stream below."""
        self._stream.flush()


_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


@contextmanager
def without_bars() -> Iterator[None]:
    """Show no bars while the block lasts, whoever opens them."""
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


class _LineBar(tqdm):
    """A bar in lines, which tells the end as soon as it is known."""

    @property
    def format_dict(self) -> dict[str, Any]:
        """What a line is made of."""
        return {**super().format_dict, "bar_format": _OPEN if self.total is None else _COUNTED}


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    what: str,
    unit: str,
    shown: bool = True,
    leave: bool = True,
) -> tqdm:
    """Open a bar; where stderr is no terminal, a line now and at most one every ten seconds take its place.

    Args:
        iterable: what to run through; None: the caller calls `update`.
        total: how many units there are, where the iterable does not tell.
        what: is going on.
        unit: what is counted, in the singular.
        shown: False: nothing is shown; neither is it within `without_bars`.
        leave: whether a terminal keeps the finished bar.

    Returns:
        A bar of tqdm, to be closed.
    """
    what = shortened(what, quote=False)
    if not shown or _hidden.get():
        return tqdm(iterable, total=total, disable=True)
    if sys.stderr.isatty():
        return tqdm(iterable, total=total, desc=what, unit=unit, leave=leave)
    if total is None and iterable is not None:
        total = len(iterable) if hasattr(iterable, "__len__") else None
    return _LineBar(
        iterable,
        total=total,
        desc=what,
        unit=unit,
        leave=False,
        file=_Lines(sys.stderr),
        mininterval=line_interval(),
        miniters=1,
    )
