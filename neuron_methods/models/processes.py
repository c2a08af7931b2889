"""The processes of ``accelerate launch`` (or torchrun), and what they tell each other; on its own a process is all."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object, reduce
from torch import Tensor

from neuron_methods.support.memory import NoRoom, check_room

Value = TypeVar("Value")


def process_state() -> PartialState:
    """Find out which process this is, of how many, and its device.

    Without a GPU, accelerate finds the other processes only if it is told that the CPU is meant.
    """
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return PartialState(cpu=wants_cpu or not torch.accelerator.is_available())


def add_up(values: Tensor) -> Tensor:
    """Add up a tensor over all processes, on the device where it is."""
    state = process_state()
    if state.num_processes == 1:
        return values
    return reduce(values.to(state.device), "sum").to(values.device)


def collect(values: Tensor) -> Tensor:
    """Stack a tensor of all processes, one behind the other along the first axis."""
    state = process_state()
    if state.num_processes == 1:
        return values
    return gather(values.to(state.device).contiguous()).to(values.device)


def of_first(value: Value) -> Value:
    """Give every process what the first one has; each calls this."""
    if process_state().num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


def check_room_of_all(need: int, what: str) -> None:
    """Make sure that something fits which every process takes for itself and can do without; each calls this.

    Args:
        need: bytes in one process, beyond what it holds already.
        what: needs it.

    Raises:
        NoRoom: it does not, in this process or in another.
    """
    state, shortage = process_state(), ""
    try:
        check_room(need * int(os.environ.get("LOCAL_WORLD_SIZE", "1")), what)
    except NoRoom as error:
        shortage = str(error)
    if state.num_processes > 1:
        shortage = next(filter(None, gather_object([shortage])), "")
    if shortage:
        raise NoRoom(shortage)
