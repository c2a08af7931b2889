"""What is measured is kept on the device of the model that is measured."""

from __future__ import annotations

import torch

from neuron_methods.profiling.exemplars import TopActivations
from neuron_methods.profiling.sketch import InputSketch
from neuron_methods.profiling.statistics import NeuronSums
from tests.support.accelerator import DEVICE, OnDevice, accelerator

VECTORS = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))


def sketched(where: str | torch.device, rows: int) -> InputSketch:
    sketch = InputSketch(6, rows, where)
    for vectors in VECTORS.to(where).split(7):
        sketch.add(vectors)
    return sketch


def test_inputs_are_sketched_there():
    for rows in (3, 6):
        expected = sketched("cpu", rows).factor()
        with accelerator():
            found = sketched(DEVICE, rows).factor()
            assert isinstance(found, OnDevice)
            assert torch.equal(found.cpu(), expected)


def test_statistics_are_summed_there():
    def sums(where: str | torch.device) -> NeuronSums:
        made = NeuronSums(6, gradients=True, device=where)
        made.add(VECTORS.to(where).abs())
        made.add_firing(VECTORS.to(where))
        made.add_taylor(VECTORS.to(where), VECTORS.to(where))
        return made

    expected = sums("cpu").means()
    with accelerator():
        found = sums(DEVICE)
        assert all(isinstance(values, OnDevice) for values in found.sums.values())
        assert found.first_nonfinite() is None
        means = found.means()
    assert all(torch.equal(means[name], expected[name]) for name in expected)


def test_exemplars_are_kept_there():
    with accelerator():
        assert all(isinstance(v, OnDevice) for v in TopActivations(6, 2, 3, DEVICE).entries.values())
