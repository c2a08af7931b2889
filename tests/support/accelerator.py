"""A device that this machine does not have: what computes on an accelerator can be run, and held to the CPU's result.

Its tensors say that they are on `meta`, the one device that every build of torch knows beside the CPU, and hold their
numbers apart. As on CUDA, no operation takes a tensor of the CPU beside one of the device, unless it is a single number
or an index, or is copied; so what is made on the CPU by default, beside a tensor of the device, is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
ATEN = torch.ops.aten

# Operations that go from one device to another, or index one with numbers of the other, on CUDA, too.
_ACROSS = (ATEN._to_copy, ATEN.copy_, ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_)


class OnDevice(Tensor):
    """A tensor of the device; `inner` has its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.inner})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> OnDevice:
        return OnDevice(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, dict(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, dict(kwargs or {}))


class _Calls(TorchFunctionMode):
    """What torch does with numbers of Python before any operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func is Tensor.new_tensor and isinstance(args[0], OnDevice):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(DEVICE)
        if func is Tensor.tolist and isinstance(args[0], OnDevice):
            return args[0].inner.tolist()
        if func in (Tensor.__getitem__, Tensor.__setitem__):  # which make an index of a list where the tensor is
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
            args = (args[0], index, *args[2:])
        return func(*args, **kwargs)


@contextmanager
def accelerator() -> Iterator[None]:
    """Have the device while the block lasts."""
    autocast = torch.autocast
    torch.autocast = lambda device_type, **options: (  # which knows no such device, and mergekit switches off
        nullcontext() if device_type == DEVICE.type else autocast(device_type, **options)
    )
    try:
        with _Calls(), _Operations():
            yield
    finally:
        torch.autocast = autocast


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = any(isinstance(tensor, OnDevice) for tensor in tensors)
    if any(tensor.is_meta and not isinstance(tensor, OnDevice) for tensor in tensors):
        raise RuntimeError(f"{func}: a tensor is on {DEVICE} that did not come from here, and has no numbers")
    if here and func.overloadpacket not in _ACROSS:
        strangers = [t for t in tensors if not isinstance(t, OnDevice) and t.dim() > 0]
        if strangers:
            raise RuntimeError(f"{func}: a tensor of shape {list(strangers[0].shape)} is on the CPU, others are not")
    asked = kwargs.get("device")
    if asked is not None:
        here = torch.device(asked) == DEVICE
        kwargs["device"] = torch.device("cpu")
    elif func.overloadpacket is ATEN.copy_:
        here = isinstance(args[0], OnDevice)
    inner_args, inner_kwargs = tree_map(_inner, args), tree_map(_inner, kwargs)
    result = func(*inner_args, **inner_kwargs)
    if not here:
        return args[0] if func.overloadpacket is ATEN.copy_ else result
    outer = tree_map(lambda value: OnDevice(value) if isinstance(value, Tensor) else value, result)
    return return_and_correct_aliasing(func, args, kwargs, outer)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value
