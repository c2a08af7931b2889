"""A family found from the tensors alone owns what it owns by its config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neuron_methods.neurons import infer_neurons, neuron_map
from neuron_methods.support.errors import UserError
from tests.neurons.test_neurons import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_names_and_shapes_tell_what_neurons_own(case: Case, tmp_path: Path) -> None:
    tensors = case.checkpoint(tmp_path)
    known = neuron_map(case.build().config)
    inferred = infer_neurons(tensors, lambda name: tensors[name].shape)
    for name in tensors:
        expected, found = known.owner_of(name), inferred.owner_of(name)
        assert (expected is None) == (found is None), name
        if expected is not None and found is not None:
            assert (found.layer.neurons, found.axis, found.roles) == (
                expected.layer.neurons,
                expected.axis,
                expected.roles,
            )
            assert found.layer.index == expected.layer.index


def test_names_of_no_family_are_refused() -> None:
    with pytest.raises(UserError, match="fit no family"):
        infer_neurons(["encoder.weight"], lambda name: torch.Size([2, 2]))
