"""The steps of an update, against their definitions entry by entry."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from neuron_methods.adapters.updates import (
    Dora,
    LowRank,
    Replacement,
    Rows,
    Shift,
    TensorUpdate,
    dora_factors,
    low_rank_delta,
)


class Source:
    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def tensor(self, key: str) -> Tensor:
        return self.tensors[key]


def never() -> Tensor:
    raise AssertionError("the base was read")


def test_low_rank_delta_of_matrices() -> None:
    a, b = torch.randn(3, 5), torch.randn(4, 3)
    delta = torch.tensor([[sum(0.5 * b[o, r] * a[r, i] for r in range(3)).item() for i in range(5)] for o in range(4)])
    torch.testing.assert_close(low_rank_delta(a, b, 0.5, "linear", (4, 5)), delta)
    torch.testing.assert_close(low_rank_delta(a, b, 0.5, "transposed", (5, 4)), delta.T)
    torch.testing.assert_close(low_rank_delta(a, b, 0.5, "embedding", (5, 4)), delta.T)


def test_low_rank_delta_of_a_convolution_is_the_two_convolutions_in_a_row() -> None:
    a, b, image = torch.randn(3, 2, 4, 4), torch.randn(5, 3, 1, 1), torch.randn(1, 2, 8, 8)
    delta = low_rank_delta(a, b, 2.0, "convolution", (5, 2, 4, 4))
    in_a_row = torch.nn.functional.conv2d(torch.nn.functional.conv2d(image, a), b) * 2.0
    torch.testing.assert_close(torch.nn.functional.conv2d(image, delta), in_a_row, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["experts", "experts_transposed"])
def test_low_rank_delta_of_experts(layout: str) -> None:
    experts, rank, inputs, outputs = 2, 3, 4, 5
    a, b = torch.randn(experts * rank, inputs), torch.randn(outputs, rank * experts)
    expected = torch.zeros(experts, outputs, inputs)
    for e, o, i, r in itertools.product(range(experts), range(outputs), range(inputs), range(rank)):
        expected[e, o, i] += 0.5 * b[o, r * experts + e] * a[e * rank + r, i]
    if layout == "experts_transposed":
        expected = expected.transpose(1, 2)
    torch.testing.assert_close(low_rank_delta(a, b, 0.5, layout, tuple(expected.shape)), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_factors_give_every_neuron_its_magnitude(axis: int) -> None:
    weights, magnitude = torch.randn(3, 4), torch.rand(3 if axis == 0 else 4) + 1
    scaled = dora_factors(weights, magnitude, axis) * weights
    torch.testing.assert_close(scaled.norm(dim=1 - axis), magnitude)


def test_updates_without_the_base() -> None:
    source = Source(a=torch.randn(2, 4), b=torch.randn(3, 2), bias=torch.randn(3))
    update = TensorUpdate((LowRank(source, "a", "b", 2.0, "linear", (3, 4)),) * 2, "w")
    torch.testing.assert_close(update.task_vector(never), 4 * source.tensors["b"] @ source.tensors["a"])
    shift = TensorUpdate((Shift(source, "bias", 3.0),), "bias")
    torch.testing.assert_close(shift.task_vector(never), 3 * source.tensors["bias"])


def test_a_step_leaves_what_it_reads_alone() -> None:
    base = torch.randn(3, 4)
    source = Source(
        a=torch.randn(2, 4), b=torch.randn(3, 2), v=torch.randn(3, 4), m=torch.rand(3), row=torch.ones(1, 4)
    )
    before = {key: value.clone() for key, value in source.tensors.items()} | {"base": base.clone()}
    low_rank = LowRank(source, "a", "b", 1.0, "linear", (3, 4))
    for steps in ((low_rank, Dora(source, "m", 0)), (Replacement(source, "v"), low_rank), (Rows(source, "row", (1,)),)):
        update = TensorUpdate(steps, "w")
        torch.testing.assert_close(update.weights(lambda: base), base + update.task_vector(lambda: base))
    assert torch.equal(base, before.pop("base"))
    for key, value in before.items():
        assert torch.equal(source.tensors[key], value)


def test_dora_task_vector() -> None:
    base = torch.randn(3, 4, dtype=torch.float64)
    source = Source(a=torch.randn(2, 4) * 1e-3, b=torch.randn(3, 2), m=base.norm(dim=1).float() * 1.001)
    update = TensorUpdate((LowRank(source, "a", "b", 1.0, "linear", (3, 4)), Dora(source, "m", 0)), "w")
    adapted = base.float().double() + source.tensors["b"].double() @ source.tensors["a"].double()
    scaled = adapted * (source.tensors["m"].double() / adapted.norm(dim=1)).unsqueeze(1)
    found = update.task_vector(lambda: base).double()
    torch.testing.assert_close(found, scaled - base.float().double(), rtol=1e-3, atol=1e-6)


def test_replacement_hands_out_the_stored_values_themselves() -> None:
    values = torch.tensor([1e-8, 1.0])
    update = TensorUpdate((Replacement(Source(v=values), "v"),), "w")
    assert torch.equal(update.weights(lambda: torch.tensor([1.0, 1.0])), values)
    assert torch.equal(update.task_vector(lambda: torch.tensor([1.0, 1.0])), values - 1)


def test_rows_change_only_their_rows() -> None:
    base, rows = torch.randn(4, 3), torch.randn(2, 3)
    update = TensorUpdate((Rows(Source(rows=rows), "rows", (3, 1)),), "w")
    task_vector = update.task_vector(lambda: base.bfloat16())
    assert torch.equal(task_vector[[0, 2]], torch.zeros(2, 3))
    torch.testing.assert_close(task_vector[[3, 1]], rows - base.bfloat16().float()[[3, 1]])
