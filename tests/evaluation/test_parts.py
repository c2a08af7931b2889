"""Recombining a merge from its parts, on tensors that are made up here."""

from __future__ import annotations

import pytest
import torch

from neuron_methods.evaluation.tuning import NotAffine, find_parts


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(20, 30, generator=generator) for name in ("base", "a", "b")}


def test_any_point_from_three_merges_and_a_check(tensors):
    asked = []

    def merged(values):
        asked.append(values)
        both = tensors["base"] + values["x"] * tensors["a"] * 0.01 + values["y"] * tensors["b"] * 0.01
        return {"both": both, "x-only": values["x"] * tensors["a"], "none": tensors["base"]}

    parts = find_parts(["x", "y"], merged, {"x": 3.0, "y": 2.25})
    assert asked == [{"x": 0.0, "y": 0.0}, {"x": 1.0, "y": 0.0}, {"x": 0.0, "y": 1.0}, {"x": 3.0, "y": 2.25}]
    found = dict(parts.combine({"x": -1.7, "y": 0.4}))
    expected = merged({"x": -1.7, "y": 0.4})
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert "x-only" not in parts.directions["y"]
    assert "none" not in {*parts.directions["x"], *parts.directions["y"]}
    assert parts.bytes == 4 * 600 * 6


@pytest.mark.parametrize(
    "bend",
    [
        lambda x, y: x * y,
        lambda x, y: x + 0.001 * x**2,
        lambda x, y: x * (1 + 0.002 * y),
        lambda x, y: abs(x - 2),
        lambda x, y: float("nan") if x > 2 else x,
    ],
)
def test_what_is_no_sum_of_parts_is_found_out(tensors, bend):
    def merged(values):
        return {"w": tensors["base"] + bend(values["x"], values["y"]) * tensors["a"] * 0.01 + values["y"] * 0.01}

    with pytest.raises(NotAffine, match=r"^w differs by .* at x=3, y=2.25"):
        find_parts(["x", "y"], merged, {"x": 3.0, "y": 2.25})


def test_chance_is_found_out(tensors):
    def merged(values):
        return {"w": tensors["base"] + values["x"] * torch.rand(20, 30)}

    with pytest.raises(NotAffine):
        find_parts(["x"], merged, {"x": 2.0})
