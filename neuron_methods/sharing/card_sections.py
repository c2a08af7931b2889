"""Put a card together, and a section into one that is there, the rest of it as its author has it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from huggingface_hub import ModelCardData

from neuron_methods.support.sources import Kin, Source
from neuron_methods.support.text import markdown


def card_text(data: ModelCardData, sections: Iterable[str]) -> str:
    """Write a card: front matter, then sections."""
    return "\n\n".join([f"---\n{data.to_yaml(line_break=chr(10))}\n---", *sections]) + "\n"


def code(name: str) -> str:
    """Write a name as code."""
    return f"`{name}`" if re.fullmatch(r"[\w .,:@+/-]+", name) else f"<code>{markdown(name)}</code>"


def own_section(own: Sequence[str], source: Source | None, kin: Sequence[Kin] = ()) -> str:
    """Tell what of a method is ours, and which methods of others it resembles; empty where there is neither.

    Args:
        own: clauses.
        source: what it is after; None where the method is ours.
        kin: methods of others.
    """
    whose = "Ours, where its paper or the code beside it does otherwise, or no source was found:"
    if source is None:
        whose = "A method of mergekit-neuron, which no paper describes. Ours beside what it shares with its kin:"
    parts = ["\n".join([whose, "", *(f"- {clause}" for clause in own)])] if own else []
    shared = [f"- [{one.source.line}]({one.source.url}): {one.shares}" for one in kin]
    return "\n\n".join([*parts, *(["\n".join(["Its kin:", "", *shared])] if shared else [])])


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
