"""Routing computes where the base's states are."""

from __future__ import annotations

import pytest
import torch

from neuron_methods.routing.pooling import _pool
from tests.support.accelerator import DEVICE, OnDevice, accelerator

STATES = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "moments", "first", "last"])
def test_states_are_pooled_there(pooling, masked):
    expected = _pool(STATES, MASK if masked else None, pooling)
    with accelerator():
        found = _pool(STATES.to(DEVICE), MASK.to(DEVICE) if masked else None, pooling)
        assert isinstance(found, OnDevice)
        assert torch.equal(found.cpu(), expected)
