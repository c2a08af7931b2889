"""Merges on a device that is not the CPU: each method's are those of the CPU, bit for bit."""

from __future__ import annotations

import pytest

from neuron_methods.kernels import products
from tests.support.accelerator import DEVICE, accelerator
from tests.support.checkpoints import configuration
from tests.support.merges import merged, same

CASES = {
    "all in neuro_merging": (
        "neuro_merging",
        {"lambda_parallel": 0.5, "lambda_orthogonal": "norm", "rank_energy": 0.9},
    ),
    "a threshold for each tensor": ("neuro_merging", {"trim": "tensor", "spectral_exponent": 0.5}),
    "what differs": ("neuro_merging", {"trim": "differing", "lambda_orthogonal": 1.0, "density": 0.5}),
    "min_merging": ("min_merging", {}),
    "min_merging by ties": ("min_merging", {"rest": "ties", "density": 0.5}),
    "neuron_response": ("neuron_response", {}),
    "mergekit's ties": ("ties", {"weight": 1.0, "density": 0.5}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_merge_there_is_that_of_the_cpu(workspace, case, monkeypatch):
    monkeypatch.setattr(products, "_ONEDNN", None)  # another library's products, of the CPU alone, differ by rounding
    workspace("llama-tied")
    method, parameters = CASES[case]
    source = configuration(method, parameters=parameters)
    expected = merged(source, out="here")
    with accelerator():
        assert same(merged(source, out="there", device=DEVICE.type), expected)
