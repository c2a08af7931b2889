"""Devices by name."""

import pytest
import torch

from neuron_methods.models.devices import check_multi_gpu, resolve_device
from neuron_methods.support.errors import UserError


def test_the_processor_is_always_there():
    assert resolve_device("cpu") == "cpu"


def test_auto_is_a_device_that_works():
    assert torch.zeros(1, device=resolve_device("auto")).item() == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "--device nonsense: no such kind of device"),
        ("cpu:x", "--device cpu:x: no such kind of device"),
        ("cuda:99", "--device cuda:99: not available here"),
        ("meta", "--device meta: not available here"),
    ],
)
def test_devices_that_are_not_there(name, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve_device(name)
    assert "\n" not in str(caught.value)


def test_the_message_names_the_option_that_was_given():
    with pytest.raises(UserError, match=r"^--gpu-rich: not available here"):
        resolve_device("cuda:99", "--gpu-rich")


def test_several_accelerators_need_one():
    if torch.accelerator.is_available():
        check_multi_gpu(1)
    else:
        with pytest.raises(UserError, match="--multi-gpu: no accelerator here"):
            check_multi_gpu(1)


def test_each_of_several_processes_has_its_own_accelerator():
    with pytest.raises(UserError, match=r"^--multi-gpu: one process uses several GPUs .*; leave it out$"):
        check_multi_gpu(2)
