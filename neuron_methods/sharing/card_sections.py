"""Put a card together, and a section into one that is there, the rest of it as its author has it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

from huggingface_hub import ModelCardData

from neuron_methods.support.text import shortened


def card_text(data: ModelCardData, sections: Iterable[str]) -> str:
    """Write a card: front matter, then sections."""
    return "\n\n".join([f"---\n{data.to_yaml(line_break=chr(10))}\n---", *sections]) + "\n"


def markdown(name: str) -> str:
    """Write a name so that Markdown and HTML show it as it is, in one line."""
    return re.sub(r"([\\`*\[\]<>|&])", lambda found: f"&#{ord(found[1])};", shortened(name, 200, quote=False))


def code(name: str) -> str:
    """Write a name as code."""
    return f"`{name}`" if re.fullmatch(r"[\w .,:@+/-]+", name) else f"<code>{markdown(name)}</code>"


def with_section(card: str, section: str, before: str = "## How to load it") -> str:
    """Put a section of level two into a card, in place of an earlier one with the same heading.

    Args:
        card: text of the card.
        section: Markdown that begins with its heading, `## …`.
        before: heading of the section that a new one goes before; at the end where there is none.
    """
    heading = section.strip().splitlines()[0]
    starts = [0, *(match.start() for match in re.finditer(r"^## ", _masked(card), flags=re.MULTILINE))]
    texts = [card[start:end] for start, end in pairwise([*starts, len(card)])]
    placed = [index for index, text in enumerate(texts) if text.startswith(heading + "\n") or text.strip() == heading]
    if placed:
        texts[placed[0]] = section.strip() + "\n\n"
        return "".join(texts).rstrip() + "\n"
    place = next((index for index, text in enumerate(texts) if text.startswith(before)), len(texts))
    texts[:place] = ["".join(texts[:place]).rstrip() + "\n\n"]
    texts.insert(1, section.strip() + "\n\n")
    return "".join(texts).rstrip() + "\n"


def _masked(card: str) -> str:
    """The card with code blocks blanked out, so that a `## ` in them is no heading; of the same length."""
    return re.sub(
        r"^```.*?^```", lambda block: re.sub(r"[^\n]", " ", block.group()), card, flags=re.MULTILINE | re.DOTALL
    )
