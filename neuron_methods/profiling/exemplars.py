"""The tokens that drive each neuron furthest, kept while the data streams by, in memory that does not grow.

An exemplar is one token in one sample. Per layer and neuron the `top` exemplars with the largest |activation| are
kept, each with a *payload* of fixed width: the token ids around it, or the name of its image. Nothing else of the data
is held back, so the memory is neurons × top × (payload + 32 bytes), whatever the number of samples.

Of tokens with one identity (see `data.tokens`) the first in reading order counts, so that repetitions do not crowd out
the rest, and the outcome does not depend on how the data is split into batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from neuron_methods.data.tokens import Entries, TokenBatch

NOBODY = torch.iinfo(torch.int64).max  # the order of an empty place: after everything

_DTYPES = {
    "activation": torch.float32,
    "identity": torch.int64,
    "order": torch.int64,
    "row": torch.int64,
    "position": torch.int32,
    "payload": torch.int32,
}


class TopActivations:
    """The exemplars of one layer's neurons, by descending |activation|; places still empty have activation 0.

    `entries` holds one tensor per field, (neurons, top), the payload (neurons, top, width).
    """

    def __init__(self, neurons: int, top: int, width: int, device: torch.device | str = "cpu") -> None:
        self.top = top
        self.entries: Entries = {
            field: torch.zeros((neurons, top) + ((width,) if field == "payload" else ()), dtype=dtype, device=device)
            for field, dtype in _DTYPES.items()
        }
        self.entries["order"].fill_(NOBODY)

    def update(self, activations: Tensor, sizes: Tensor, tokens: Tensor | None, batch: TokenBatch, length: int) -> None:
        """Let the tokens of a batch compete for the places.

        After the first batches few neurons see a token that beats what they have: only these are looked at.

        Args:
            activations: (tokens, neurons), any float dtype.
            sizes: their absolute values.
            tokens: int64 (tokens,), which tokens of the batch the rows are, no two of one identity; None: all of
                them, in order.
            batch: what is known of the tokens.
            length: the number of tokens per sample, T.
        """
        if not self.top or not len(sizes):
            return
        contested = (sizes.amax(0) > self.entries["activation"][:, -1].abs()).nonzero().squeeze(1)
        if not len(contested):
            return
        competing = sizes if len(contested) == sizes.shape[1] else sizes.index_select(1, contested)
        places = competing.T.contiguous().topk(min(self.top, len(sizes)), dim=1).indices
        candidates = batch.entries(places if tokens is None else tokens[places], length)
        candidates["activation"] = activations[places, contested[:, None]].float()
        self._compete(contested, candidates)

    def _compete(self, neurons: Tensor, candidates: Entries) -> None:
        """Keep the best of what `neurons` have and of their candidates, the earlier one of equal identities."""
        held = {field: values[neurons] for field, values in self.entries.items()}
        same = candidates["identity"][:, :, None] == held["identity"][:, None, :]
        earlier = candidates["order"][:, :, None] < held["order"][:, None, :]
        held_size = held["activation"].abs().masked_fill((same & earlier).any(1), 0)
        candidate_size = candidates["activation"].abs().masked_fill((same & ~earlier).any(2), 0)

        size, places = torch.cat((held_size, candidate_size), dim=1).topk(self.top, dim=1)
        for field, values in held.items():
            pool = torch.cat((values, candidates[field]), dim=1)
            index = places if pool.ndim == 2 else places[:, :, None].expand(-1, -1, pool.shape[2])
            held[field] = pool.gather(1, index)
        empty = size == 0
        held["activation"] = held["activation"].masked_fill(empty, 0)
        held["order"] = held["order"].masked_fill(empty, NOBODY)
        held["identity"] = held["identity"].masked_fill(empty, 0)
        for field, values in held.items():
            self.entries[field][neurons] = values

    def gather(self, collect: Callable[[Tensor], Tensor]) -> None:
        """Merge with all other processes; `collect` stacks a tensor of every process along its first axis."""
        if not self.top:
            return
        neurons = len(self.entries["order"])
        collected = {field: collect(values).split(neurons) for field, values in self.entries.items()}
        own, *others = (dict(zip(collected, parts, strict=True)) for parts in zip(*collected.values(), strict=True))
        self.entries = {field: values.clone() for field, values in own.items()}
        for other in others:
            self._compete(torch.arange(neurons, device=other["order"].device), other)
