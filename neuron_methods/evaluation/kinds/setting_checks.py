"""What the settings of a task may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import regex

#: From a setting's value to what is expected in its place; None: the value will do.
Check = Callable[[Any], str | None]


def whole_number(least: int = 1) -> Check:
    """Expect a whole number from `least` on, and no larger than anything is counted."""

    def check(value: Any) -> str | None:
        sound = isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31
        return None if sound else f"a whole number from {least} on"

    return check


def one_of(*words: str) -> Check:
    """Expect one of a few words."""
    return lambda value: None if value in words else " or ".join(words)


def truth() -> Check:
    """Expect true or false."""
    return lambda value: None if isinstance(value, bool) else "true or false"


def string(what: str = "text", *, empty: bool = False) -> Check:
    """Expect a text, which messages call `what`; `empty`: it may hold nothing."""
    return lambda value: None if isinstance(value, str) and (value or empty) else what


def pattern() -> Check:
    """Expect a regular expression with one group at most."""

    def check(value: Any) -> str | None:
        try:
            sound = isinstance(value, str) and value and regex.compile(value).groups <= 1
        except (regex.error, RecursionError, OverflowError):
            sound = False
        return None if sound else "a regular expression with one group at most"

    return check


def different_labels(*types: type) -> Check:
    """Expect a list of different labels of these types."""

    def check(value: Any) -> str | None:
        sound = isinstance(value, list) and value and all(isinstance(v, types) and v is not True for v in value)
        return None if sound and len({*value}) == len(value) else "a list of different labels"

    return check
