"""Kernels compute where their inputs are: no tensor is made on the CPU only because nobody said where."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import neuron_methods
from neuron_methods.kernels.groups import domain_shares
from neuron_methods.kernels.trim import ThresholdSearch
from tests.support.accelerator import DEVICE, accelerator

FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"}
FACTORIES |= {"tensor", "zeros"}
KERNELS = sorted((Path(neuron_methods.__file__).parent / "kernels").glob("*.py"))


@pytest.mark.parametrize("module", KERNELS, ids=lambda path: path.stem)
def test_every_new_tensor_says_where_it_is(module):
    calls = [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Call)]
    made = [call for call in calls if ast.unparse(call.func) in {f"torch.{name}" for name in FACTORIES}]
    assert not [ast.unparse(call) for call in made if "device" not in {keyword.arg for keyword in call.keywords}]


def search(where: str | torch.device) -> ThresholdSearch:
    found = ThresholdSearch(0.2)
    while True:
        found.count_zeros(50)
        found.count(torch.linspace(-1, 1, 101).to(where))
        if found.finish():
            return found


def test_zeros_that_nobody_reads_may_come_before_a_tensor_of_the_device():
    expected = search("cpu")
    with accelerator():
        assert search(DEVICE) == expected


def test_groups_are_found_on_the_device():
    top = [torch.tensor([[3.0, 0.5], [0.0, 0.0]]), torch.tensor([[2.0, 1.0], [4.0, 1.0]])]
    expected = domain_shares(top, [10, 5])
    with accelerator():
        assert torch.equal(domain_shares([values.to(DEVICE) for values in top], [10, 5]).cpu(), expected)


def test_the_device_takes_no_tensor_of_the_cpu_beside_its_own():
    with accelerator():
        here = torch.ones(3).to(DEVICE)
        assert torch.equal((here + torch.tensor(1.0)).cpu(), torch.full((3,), 2.0))
        with pytest.raises(RuntimeError, match="is on the CPU, others are not"):
            here + torch.ones(3)
