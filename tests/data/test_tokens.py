"""Which tokens repeat others."""

from __future__ import annotations

import torch

from neuron_methods.data.batching import pad
from neuron_methods.data.tokens import SeenLately, prefix_identity, sequence_identity


def test_a_token_counts_once_for_each_identity_and_batch():
    ids, mask = pad([[5, 6, 7], [5, 6, 8, 9], [5, 6, 7]])
    identity = prefix_identity(ids)
    assert identity[0, 1] == identity[1, 1] and identity[0, 2] != identity[1, 2]
    valid = mask.flatten().nonzero().squeeze(1)
    seen = SeenLately()
    assert seen.fresh(identity, valid).tolist() == [0, 1, 2, 6, 7]
    assert seen.fresh(identity, valid).tolist() == []


def test_a_token_read_both_ways_depends_on_its_whole_sequence():
    ids, mask = pad([[5, 6, 7], [5, 6, 8], [5, 6, 7], [5, 6]])
    identity = sequence_identity(ids, mask)
    assert (identity[0, :3] == identity[2, :3]).all()
    assert len(set(identity[0, :3].tolist() + identity[1, :3].tolist() + identity[3, :2].tolist())) == 8
    alone, _ = pad([[5, 6]])
    assert (sequence_identity(alone, torch.ones(1, 2, dtype=torch.bool)) == identity[3, :2]).all()
