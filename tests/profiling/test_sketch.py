"""Input vectors in bounded memory, against the second moment of all of them in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from neuron_methods.profiling.module_inputs import input_vectors, input_width
from neuron_methods.profiling.sketch import InputSketch

BATCHES = [7, 1, 30, 64, 3, 0, 95]


def stream(width: int, seed: int = 0) -> list[torch.Tensor]:
    """Batches of vectors, some directions a thousand times as strong as others."""
    generator = torch.Generator().manual_seed(seed)
    strengths = torch.logspace(0, -3, width)
    return [torch.randn(count, width, generator=generator) * strengths for count in BATCHES]


def sketched(batches: list[torch.Tensor], rows: int) -> InputSketch:
    sketch = InputSketch(batches[0].shape[1], rows)
    for batch in batches:
        sketch.add(batch)
    return sketch


def moment(batches: list[torch.Tensor]) -> torch.Tensor:
    whole = torch.cat(batches).double()
    return whole.T @ whole / len(whole)


@pytest.mark.parametrize("rows", [200, 500])
def test_vectors_that_fit_are_kept_as_they_are(rows):
    batches = stream(300)
    sketch = sketched(batches, rows)
    factor = sketch.factor()
    assert torch.equal(factor, torch.cat(batches) / 200**0.5)
    assert (sketch.tokens, sketch.loss) == (200, 0)


@pytest.mark.parametrize(("width", "rows"), [(12, 12), (12, 40), (1, 1), (20, 500)])
def test_narrow_vectors_lose_nothing(width, rows):
    batches = stream(width)
    sketch = sketched(batches, rows)
    factor = sketch.factor().double()
    assert factor.shape == (min(width, 200), width)
    expected = moment(batches)
    torch.testing.assert_close(factor.T @ factor, expected, rtol=1e-5, atol=1e-7 * float(expected.trace()))
    assert sketch.loss == 0


@pytest.mark.parametrize(("width", "rows"), [(64, 16), (64, 63), (300, 5), (40, 1)])
def test_wide_vectors_lose_no_more_than_is_said(width, rows):
    batches = stream(width)
    sketch = sketched(batches, rows)
    factor = sketch.factor().double()
    assert len(factor) <= rows
    short = torch.linalg.eigvalsh(moment(batches) - factor.T @ factor) * 200
    whole = torch.cat(batches).double()
    rounding = 1e-6 * sketch.energy
    assert sketch.energy == pytest.approx(float(whole.square().sum()), rel=1e-6)
    assert short[0] >= -rounding
    assert 0 < short[-1] <= sketch.loss + rounding
    tail = torch.linalg.svdvals(whole).square().flip(0).cumsum(0).flip(0)  # ‖F − F_k‖² at k
    for k in range(min(rows + 1, len(tail))):
        assert sketch.loss <= float(tail[k]) / (rows + 1 - k) + rounding


def test_memory_stays_within_twice_the_rows():
    sketch = InputSketch(64, 10)
    for batch in stream(64):
        sketch.add(batch)
        assert len(sketch._kept) <= 20


@pytest.mark.parametrize(("width", "rows"), [(12, 16), (300, 500), (64, 16)])
def test_streams_merge_as_if_they_were_one(width, rows):
    """Two sketches, each taking the other's part for what its process is told."""
    batches = stream(width)
    parts = [sketched(batches[:4], rows), sketched(batches[4:], rows)]
    kept = [part.state()["kept"] for part in parts]
    numbers = sum(part.state()["numbers"] for part in parts)
    longest = max(map(len, kept))
    padded = torch.cat([torch.cat((k, k.new_zeros(longest - len(k), width))) for k in kept])

    def collect(values: torch.Tensor) -> torch.Tensor:
        return torch.tensor([len(k) for k in kept]) if values.ndim == 1 else padded

    parts[0].merge(lambda _: numbers, collect)
    factor = parts[0].factor().double()
    assert parts[0].tokens == 200 and len(factor) <= rows
    gap = torch.linalg.eigvalsh(moment(batches) - factor.T @ factor) * 200
    assert parts[0].loss <= parts[0].energy / (rows + 1)
    assert gap[0] >= -1e-5 * parts[0].energy / width and gap[-1] <= parts[0].loss + 1e-6 * parts[0].energy


@pytest.mark.parametrize(("width", "rows"), [(12, 16), (64, 16)])
def test_a_sketch_goes_on_from_its_state(width, rows):
    batches = stream(width)
    whole, half, rest = sketched(batches, rows), sketched(batches[:4], rows), InputSketch(width, rows)
    rest.load_state(half.state())
    for batch in batches[4:]:
        rest.add(batch)
    torch.testing.assert_close(rest.factor(), whole.factor())
    assert (rest.tokens, rest.energy, rest.loss) == pytest.approx((whole.tokens, whole.energy, whole.loss))
    rest.missing = 3
    whole.load_state(rest.state())
    assert whole.missing == 3


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(6, 5),
        Conv1D(5, 6),
        nn.Conv1d(3, 5, 4, stride=2, padding=1, dilation=2),
        nn.Conv2d(3, 5, (2, 3), stride=(2, 1)),
        nn.Conv2d(3, 5, (3, 2), padding="same", dilation=(2, 1)),
        nn.Conv2d(3, 5, (2, 3), padding=(0, 2), padding_mode="reflect"),
        nn.Conv3d(3, 5, (1, 2, 3), stride=(1, 2, 3), padding=(0, 1, 0)),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_weight_times_its_inputs_is_the_output(module):
    axes = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}.get(type(module))
    given = torch.randn(2, 4, 6) if axes is None else torch.randn(2, 3, *[10, 9, 8][:axes])
    vectors = input_vectors(module, given)
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight.flatten(1)
    assert vectors.shape[-1] == input_width(module) == weight.shape[1]
    output = module(given) if axes is None else module(given).movedim(1, -1)
    torch.testing.assert_close(vectors @ weight.T + module.bias, output, rtol=1e-4, atol=1e-5)
