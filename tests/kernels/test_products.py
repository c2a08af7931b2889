"""Products, whichever library makes them."""

from __future__ import annotations

import pytest
import torch

from neuron_methods.kernels import products
from neuron_methods.kernels.products import times
from tests.support.accelerator import DEVICE, accelerator
from tests.support.tensors import randoms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 1, 1), (64, 300, 33), (0, 4, 2), (3, 0, 2), (3, 4, 0)])
@pytest.mark.parametrize("library", ["best", "torch's"])
def test_times_is_the_product_with_the_transpose(shape, dtype, library, monkeypatch):
    if library != "best":
        monkeypatch.setattr(products, "_ONEDNN", None)
    n, k, m = shape
    for x, y in (
        (randoms((n, k), 1)[0], randoms((m, k), 1)[0]),
        (randoms((k, n), 1)[0].T, randoms((k, 2 * m), 1)[0][:, ::2].T),
    ):
        expected = x.double() @ y.double().T
        found = times(x.to(dtype), y.to(dtype))
        assert found.dtype == dtype and found.shape == (n, m)
        assert torch.allclose(found.double(), expected, atol=1e-5 * k**0.5)


def test_times_stays_on_a_device():
    x, y = randoms((4, 6), 2)
    with accelerator():
        assert torch.allclose(times(x.to(DEVICE), y.to(DEVICE)).cpu(), x @ y.T, atol=1e-6)
