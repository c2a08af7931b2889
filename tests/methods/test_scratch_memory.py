"""Scratch memory of the merge: bounded whatever the tensor, and without a say in the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from neuron_methods.kernels.neuro import NeuroOptions, merge_neurons
from neuron_methods.methods.contract import Inputs, PlannedTensor
from neuron_methods.methods.neuron_response import NeuronResponse
from tests.support.tensors import randoms


class Allocations(TorchDispatchMode):
    """Follows the bytes that operations allocate beyond what exists when it starts."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        inputs = {t.untyped_storage()._cdata for t in self._tensors((arguments, keywords or {}))}
        result = function(*arguments, **(keywords or {}))
        for tensor in self._tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in inputs:
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: value for key, value in self._live.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result

    def _tensors(self, value: object) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from self._tensors(list(value.values()))
        elif isinstance(value, list | tuple):
            for item in value:
                yield from self._tensors(item)


def scratch_of(tensors: Sequence[Tensor], scratch_bytes: int, **options: float) -> tuple[int, Tensor]:
    base, *experts = tensors
    merged = torch.empty_like(base)
    with Allocations() as allocations:
        merge_neurons(
            base,
            experts,
            merged,
            NeuroOptions(
                thresholds=[0.5] * len(experts),
                weights=[1.0] * len(experts),
                lambda_orthogonal=1.0,
                scratch_bytes=scratch_bytes,
                **options,
            ),
        )
    return allocations.peak, merged


@pytest.mark.parametrize("parallel", [0.0, 0.7])
@pytest.mark.parametrize(("width", "experts"), [(200, 2), (3, 8), (2000, 3)])
def test_scratch_memory_is_bounded_whatever_the_tensor(width: int, experts: int, parallel: float) -> None:
    bound = 1 << 18
    peaks = []
    for blocks in (5, 20):
        neurons = blocks * bound // (4 * width * experts + 64 * experts**2)
        tensors = randoms((neurons, width), experts + 1, scale=0.5)
        peak, _ = scratch_of(tensors, bound, lambda_parallel=parallel)
        # All neurons' parallel coefficients are held at once, for their ties.
        coefficients = neurons * experts * 8 * 6 if parallel else 0
        assert peak <= bound + coefficients, (peak, neurons)
        peaks.append(peak)
    assert max(peaks) > bound // 8  # the measure does see what is allocated


@pytest.mark.parametrize("scratch", [1, 1000, 5000, 1 << 20])
def test_small_blocks_give_the_same_merge(scratch: int) -> None:
    tensors = randoms((50, 40), 4, scale=0.5)
    _, expected = scratch_of(tensors, 1 << 28, lambda_parallel=0.7)
    _, found = scratch_of(tensors, scratch, lambda_parallel=0.7)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("ridge", ["auto", 0.0, 1e-6])
@pytest.mark.parametrize("toward", ["mean", "zero"])
@pytest.mark.parametrize(("shape", "rows"), [((300, 200), 0), ((500, 400), 60), ((200, 900), 64), ((60, 500), 0)])
def test_a_merge_by_response_takes_what_it_says(
    shape: tuple[int, int], rows: int, toward: str, ridge: float | str
) -> None:
    base, *experts = randoms(shape, 3, scale=0.5)
    method = NeuronResponse()
    given = {"toward": toward, "rows": rows, "ridge": ridge}
    shared = {p.name: given.get(p.name, p.default) for p in method.spec.shared_parameters}
    own = {p.name: dict.fromkeys(range(2), p.default) for p in method.spec.input_parameters}
    tensors = (base, dict(enumerate(experts)))
    prepared = method.prepare([PlannedTensor("w", lambda: tensors, shared, own)])
    with Allocations() as allocations:
        prepared.merge_tensor(Inputs("w", *tensors), {**shared, **own}, torch.float32)
    said = prepared.scratch("w", shape, 2)
    assert said / 5 < allocations.peak <= said
