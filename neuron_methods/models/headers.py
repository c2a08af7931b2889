"""Shapes and dtypes of stored tensors, read without their data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from neuron_methods.support.errors import UserError
from neuron_methods.support.files import read_object

# As safetensors spells the dtypes that a merge can take.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Header(NamedTuple):
    """Shape and dtype of a stored tensor, without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Header:
        """Take the header of a tensor in memory."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def entries(self) -> int:
        """Number of entries."""
        return int(torch.Size(self.shape).numel())

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return self.entries * self.dtype.itemsize


class HeaderFiles:
    """Headers of tensors in safetensors files, each file opened once."""

    def __init__(self) -> None:
        self._files: dict[str, Any] = {}

    def read(self, path: str, name: str) -> Header:
        """Read the header of a tensor.

        Raises:
            UserError: the file is missing or damaged, lacks the tensor, or holds it in a dtype that nothing merges.
        """
        if path not in self._files:
            self._files[path] = open_safetensors(path)
        try:
            stored = self._files[path].get_slice(name)
        except safetensors.SafetensorError:
            raise UserError(f"{path}: the index promises tensor {name}, but the file does not hold it") from None
        dtype = _DTYPES.get(stored.get_dtype())
        if dtype is None:
            raise UserError(
                f"{path}: tensor {name} is stored as {stored.get_dtype()}, which no merge method takes; save the model "
                "in bfloat16, float16 or float32"
            )
        return Header(tuple(stored.get_shape()), dtype)

    def behind(self, loader: Any, name: str) -> Header:
        """Read the header of a tensor behind a loader of mergekit's kind; errors as in `read`.

        Args:
            loader: has `index` and `get_tensor`; only a pickled tensor is read.
            name: under which it is stored.
        """
        path = os.path.join(loader.index.base_path, loader.index.tensor_paths[name])
        return self.read(path, name) if path.endswith(".safetensors") else Header.of(loader.get_tensor(name))


def open_safetensors(path: str | os.PathLike[str]) -> Any:
    """Open a safetensors file for lazy reading.

    Raises:
        UserError: the file is missing, truncated or not safetensors.
    """
    try:
        return safetensors.safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, but the checkpoint's index names it") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}); download or save it again") from None


def stored_headers(directory: Path, stem: str = "model.safetensors") -> dict[str, Header]:
    """Read the headers of all tensors of a directory, by its index or its single file.

    Args:
        directory: of a model or an adapter.
        stem: the single file's name, and the index's without `.index.json`; a pickle's ends in `.bin`.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    index, whole = directory / f"{stem}.index.json", directory / stem
    safe = stem.endswith(".safetensors")
    if index.exists():
        weight_map: dict[str, str] = read_object(index).get("weight_map") or {}
    elif whole.exists():
        weight_map = dict.fromkeys(open_safetensors(whole).keys() if safe else _unpickled(whole), stem)
    else:
        raise UserError(f"{whole}: no such file, and no index of shards")
    if safe:
        headers = HeaderFiles()
        return {name: headers.read(str(directory / file), name) for name, file in weight_map.items()}
    tensors: dict[str, Tensor] = {}
    for file in set(weight_map.values()):
        tensors |= _unpickled(directory / file)
    return {name: Header.of(tensors[name]) for name in weight_map if name in tensors}


def _unpickled(file: Path) -> Mapping[str, Tensor]:
    """Tensors without data."""
    try:
        return torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        raise UserError(f"{file}: cannot be read back ({type(error).__name__})") from None
