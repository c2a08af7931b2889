"""Batches of sequences: those of like length together, padded to one length."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def pad(sequences: Sequence[Sequence[int]], fill: int = 0, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Lay sequences of token ids side by side.

    Args:
        sequences: of any lengths.
        fill: stands where a sequence is shorter than the longest.
        left: fill before a sequence instead of behind it.

    Returns:
        Ids, int64 (B, T), and a mask, bool (B, T): true where a token is.
    """
    width = max(1, *map(len, sequences))
    gaps = [[fill] * (width - len(tokens)) for tokens in sequences]
    rows = [[*gap, *tokens] if left else [*tokens, *gap] for tokens, gap in zip(sequences, gaps, strict=True)]
    lengths = torch.tensor([len(tokens) for tokens in sequences])[:, None]
    places = torch.arange(width)
    return torch.tensor(rows), places >= width - lengths if left else places < lengths


def by_length(lengths: Sequence[int]) -> list[int]:
    """Order places by length, the longest first: batches of like length, and one that does not fit fails at once."""
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Cut a stream into lists of `size`; the last one may be shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch
