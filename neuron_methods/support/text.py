"""Words for messages and columns for the screen."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: object) -> str:
    """Join the lines of a text, or of an exception's message, without blank ones."""
    return " ".join(line.strip() for line in str(text).splitlines() if line.strip())


def first_line(error: BaseException) -> str:
    """Take the first line of an exception's message that says something; its type where none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shortened(value: object, most: int = 80, *, quote: bool = True) -> str:
    """Show a value out of a file in one line: escaped, so that no terminal obeys it, and cut where it is long."""
    shown = repr(value) if quote else _in_line(str(value))
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def printable(text: str) -> str:
    """Write as escapes what a terminal obeys (controls but line breaks, marks of direction), and surrogates."""
    return _OBEYED.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def _in_line(text: str) -> str:
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Suggest the most similar known word, as `; did you mean 'x'?`; "" where none is similar."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown(what: str, word: object, known: Iterable[str]) -> str:
    """Say that there is no such word, and which one is similar or which ones there are."""
    known = list(known)
    return f"unknown {what} {shortened(word)}" + (did_you_mean(word, known) or f" (there are: {', '.join(known)})")


def listed(names: Sequence[object], most: int = 3) -> str:
    """List the first few names, and how many more there are."""
    shown = ", ".join(map(str, names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def columns(rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Lay rows out as lines with their cells under each other.

    Args:
        rows: of equally many cells, the heading first.
        left: columns that are flush left; the others are flush right.
    """
    rows = [[_in_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def format_bytes(count: float) -> str:
    """Write a number of bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def markdown(name: str) -> str:
    """Write a name so that Markdown and HTML show it as it is, in one line."""
    return re.sub(r"([\\`*\[\]<>|&])", lambda found: f"&#{ord(found[1])};", shortened(name, 200, quote=False))
