"""Threads that work side by side: results in order, few pieces begun at a time, errors where they are asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from neuron_methods.kernels import devices
from neuron_methods.kernels.devices import Crew, threads_of


@pytest.fixture
def three() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_what_is_found_comes_in_the_order_of_the_pieces(three: None) -> None:
    by = set()

    def work(piece: int) -> tuple[int, int]:
        by.add(threading.current_thread().name)
        time.sleep(0.02 * (piece % 3 == 0))
        return piece, torch.get_num_threads()

    with Crew() as crew:
        assert list(crew.work(work, range(12))) == [(piece, 1) for piece in range(12)]
        assert len(by) == 3 and threading.current_thread().name not in by
        by.clear()
        assert [piece for piece, _ in crew.work(work, range(12), alone=True)] == [*range(12)]
        assert by == {threading.current_thread().name}
    assert torch.get_num_threads() == 3
    assert list(crew.work(work, [1, 2])) == [(1, 3), (2, 3)]  # of nobody but the caller
    assert list(crew.work(work, [])) == []


def test_nothing_is_differentiated(three: None) -> None:
    weights = torch.ones(3, requires_grad=True)
    with Crew() as crew:
        assert not any(found.requires_grad for found in crew.work(lambda piece: piece * weights, range(4)))


def test_no_more_is_begun_than_is_taken(three: None) -> None:
    begun = []
    with Crew() as crew:
        found = crew.work(begun.append, range(100))
        next(found)
        time.sleep(0.05)
        assert len(begun) <= 7


def test_an_error_comes_where_its_piece_would_have(three: None) -> None:
    def work(piece: int) -> int:
        if piece == 2:
            raise ValueError("of this one")
        return piece

    with pytest.raises(ValueError, match="of this one"), Crew() as crew:
        found = crew.work(work, range(50))
        assert [next(found), next(found)] == [0, 1]
        next(found)
    assert torch.get_num_threads() == 3


def test_one_thread_is_enough_for_a_gpu_and_few_for_a_large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert (threads_of("cuda"), threads_of("cpu")) == (1, devices.THREADS)
