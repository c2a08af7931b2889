"""Keeping the strongest tokens of a stream, against sorting everything at the end."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_methods.data.tokens import SeenLately, TokenBatch
from neuron_methods.profiling.exemplars import NOBODY, TopActivations

NEURONS, LENGTH, WIDTH = 5, 4, 3


def stream(seed: int, samples: int, kinds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations (samples, LENGTH, NEURONS) of tokens with one of `kinds` identities; some activations are 0."""
    generator = torch.Generator().manual_seed(seed)
    identities = torch.randint(1, kinds + 1, (samples, LENGTH), generator=generator)
    of_kind = torch.randn(kinds + 1, NEURONS, generator=generator)
    of_kind[torch.rand(of_kind.shape, generator=generator) < 0.2] = 0
    return of_kind[identities], identities


def feed(top: TopActivations, activations, identities, orders: list[int], size: int, seen: bool) -> TopActivations:
    """Let the samples `orders` through in batches of `size`; the second token of odd ones is padding.

    Unless `seen`, nothing is remembered from batch to batch.
    """
    lately = SeenLately(8)
    for start in range(0, len(orders), size):
        order = torch.tensor(orders[start : start + size])
        ids = identities[order]
        places = [(b, t) for b in range(len(order)) for t in range(LENGTH) if t != 1 or order[b] % 2 == 0]
        valid = torch.tensor([b * LENGTH + t for b, t in places])
        tokens = (lately if seen else SeenLately(8)).fresh(ids, valid)
        payload = (order[:, None] * 10 + torch.arange(LENGTH))[:, :, None].expand(-1, -1, WIDTH).int()
        batch = TokenBatch(order, order + 100, payload, ids, valid)
        rows = activations[order].flatten(0, 1)[tokens]
        top.update(rows, rows.abs(), tokens, batch, LENGTH)
    return top


def sorted_at_the_end(activations, identities, top: int) -> list[list[tuple[float, int, int]]]:
    """Per neuron (activation, order, position) of the strongest tokens, the first of each identity."""
    first: dict[int, tuple[int, int]] = {}
    for order in range(len(activations)):
        for position in range(LENGTH):
            if position != 1 or order % 2 == 0:
                first.setdefault(int(identities[order, position]), (order, position))
    result = []
    for neuron in range(NEURONS):
        found = [(activations[o, p, neuron].item(), o, p) for o, p in first.values()]
        found = sorted((f for f in found if f[0] != 0), key=lambda f: -abs(f[0]))
        result.append(found[:top])
    return result


def kept(top: TopActivations) -> list[list[tuple[float, int, int]]]:
    entries = top.entries
    result = []
    for neuron in range(NEURONS):
        columns = (entries[field][neuron].tolist() for field in ("activation", "order", "position"))
        places = list(zip(*columns, strict=True))
        filled = [place for place in places if place[1] != NOBODY]
        assert all(place[0] == 0 for place in places[len(filled) :])  # empty places come last
        result.append(filled)
    return result


cases = {
    "seed": st.integers(0, 10_000),
    "samples": st.integers(1, 30),
    "kinds": st.integers(1, 60),
    "top": st.integers(1, 6),
    "size": st.integers(1, 12),
    "seen": st.booleans(),
}


@settings(max_examples=60, deadline=None)
@given(**cases)
def test_one_process_keeps_what_sorting_everything_gives(seed, samples, kinds, top, size, seen):
    activations, identities = stream(seed, samples, kinds)
    tops = feed(TopActivations(NEURONS, top, WIDTH), activations, identities, list(range(samples)), size, seen)
    assert kept(tops) == sorted_at_the_end(activations, identities, top)
    entries = tops.entries
    filled = entries["order"] != NOBODY
    assert (entries["row"][filled] == entries["order"][filled] + 100).all()
    assert (entries["payload"][filled][:, 0] == (entries["order"] * 10 + entries["position"])[filled]).all()


@settings(max_examples=40, deadline=None)
@given(processes=st.integers(2, 4), **cases)
def test_several_processes_keep_the_same(processes, seed, samples, kinds, top, size, seen):
    activations, identities = stream(seed, samples, kinds)
    tops = [
        feed(
            TopActivations(NEURONS, top, WIDTH), activations, identities, list(range(p, samples, processes)), size, seen
        )
        for p in range(processes)
    ]
    collected = {field: torch.cat([t.entries[field] for t in tops]) for field in tops[0].entries}
    asked = iter(tops[0].entries)
    tops[0].gather(lambda values: collected[next(asked)])
    assert kept(tops[0]) == sorted_at_the_end(activations, identities, top)
