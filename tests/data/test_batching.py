"""Sequences side by side, and which of them go together."""

from __future__ import annotations

import pytest
import torch

from neuron_methods.data.batching import batched, by_length, pad


@pytest.mark.parametrize("left", [False, True])
def test_padding_stands_beside_the_tokens(left: bool) -> None:
    ids, mask = pad([[5, 6, 7], [8], []], 9, left=left)
    rows = [[5, 6, 7], [9, 9, 8], [9, 9, 9]] if left else [[5, 6, 7], [8, 9, 9], [9, 9, 9]]
    assert ids.tolist() == rows and ids.dtype == torch.int64
    assert mask.tolist() == [[True] * 3, [False, False, True] if left else [True, False, False], [False] * 3]


def test_a_batch_of_empty_sequences_has_one_place() -> None:
    ids, mask = pad([[], []])
    assert ids.tolist() == [[0], [0]] and not mask.any()


def test_the_longest_come_first_and_equals_keep_their_order() -> None:
    assert by_length([2, 5, 2, 7]) == [3, 1, 0, 2]


def test_the_last_batch_may_be_shorter() -> None:
    assert list(batched(iter(range(5)), 2)) == [[0, 1], [2, 3], [4]]
    assert list(batched([], 2)) == []
