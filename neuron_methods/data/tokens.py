"""Tokens of a batch as those who watch neurons need them: their places, what is shown of them, which are repetitions.

Where an activation depends on the tokens read so far alone, samples that begin alike (a prompt's template, the token
that opens every sequence) repeat the same activations. Each token therefore carries an *identity*, a hash of all its
activations depend on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Entries = dict[str, Tensor]

_PRIME = 0x100000001B3  # of the FNV hash


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of one batch that one stack of layers reads, as the exemplars need them.

    B samples, T positions; token b·T + t stands at position t of sample b. Images have no identities of their own
    (None: every token is a new one) and leave T to the model.

    Attributes:
        order: int64 (B,), the samples' place in reading order.
        row: int64 (B,), the samples' rows in their data set.
        payload: int32 (B, T, width) or, the same for all tokens of a sample, (B, 1, width).
        identity: int64 (B, T), or None.
        valid: int64 (V,), the tokens that are not padding; None: all.
        fresh: int64 (F,), those of `valid` whose identity was not seen lately; None: all of `valid`.
    """

    order: Tensor
    row: Tensor
    payload: Tensor
    identity: Tensor | None = None
    valid: Tensor | None = None
    fresh: Tensor | None = None

    def to(self, device: torch.device) -> TokenBatch:
        """Move everything to `device`."""
        return TokenBatch(**{k: None if v is None else v.to(device) for k, v in vars(self).items()})

    def entries(self, tokens: Tensor, length: int) -> Entries:
        """Look up everything but the activation of the given tokens (any shape), samples being `length` tokens long."""
        sample, position = tokens // length, tokens % length
        order = self.order[sample]
        identity = order * (1 << 20) + position if self.identity is None else self.identity[sample, position]
        column = position if self.payload.shape[1] > 1 else torch.zeros_like(position)
        return {
            "identity": identity,
            "order": order,
            "row": self.row[sample],
            "position": position.int(),
            "payload": self.payload[sample, column],
        }


class SeenLately:
    """Tells tokens whose identity came by before, in a table of fixed size; what it forgets costs time only."""

    def __init__(self, size: int = 1 << 18) -> None:
        self._table = torch.zeros(size, dtype=torch.int64)

    def fresh(self, identity: Tensor, valid: Tensor) -> Tensor:
        """Find the `valid` tokens, int64 (V,), that are the first of their identity, int64 (B, T); in order."""
        hashes = identity.flatten()[valid]
        known = self._table[hashes % len(self._table)] == hashes
        self._table[hashes % len(self._table)] = hashes
        _, inverse = hashes.unique(return_inverse=True)
        first = torch.full((int(inverse.max()) + 1 if len(inverse) else 0,), len(hashes), dtype=torch.int64)
        first.scatter_reduce_(0, inverse, torch.arange(len(hashes)), "amin")
        is_first = first[inverse] == torch.arange(len(hashes))
        return valid[is_first & ~known]


def prefix_identity(ids: Tensor) -> Tensor:
    """Hash every token and all before it, int64 (B, T)."""
    powers = torch.full((ids.shape[1],), _PRIME).cumprod(0)  # wraps around at 64 bits, as do the sums
    return _mixed(((ids + 1) * powers).cumsum(1))


def sequence_identity(ids: Tensor, mask: Tensor) -> Tensor:
    """Hash every token's place and its whole sequence, int64 (B, T)."""
    powers = torch.full((ids.shape[1],), _PRIME).cumprod(0)
    whole = ((ids + 1) * mask * powers).sum(1, keepdim=True)
    return _mixed(whole * _PRIME + torch.arange(ids.shape[1]))


def decoder_identity(ids: Tensor, read: Tensor) -> Tensor:
    """Hash every token that a decoder is given, all before it, and `read`, what its encoder read, int64 (B, T)."""
    return prefix_identity(ids) * _PRIME + read[:, :1]


def _mixed(values: Tensor) -> Tensor:
    """The same values with all bits stirred (a round of splitmix64), so that a part of them is a good hash."""
    values = (values ^ (values >> 30)) * -0x40A7B892E31B1A47
    return values ^ (values >> 27)
