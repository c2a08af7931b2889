"""Where an adapter's files are, and reading their tensors one by one."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from neuron_methods.adapters.config import CONFIG_NAME
from neuron_methods.models.headers import HeaderFiles, check_length
from neuron_methods.models.hub import hub_file
from neuron_methods.models.model_files import check_files
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import first_line

SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


def adapter_directory(path: str, revision: str | None = None, cache_dir: str | None = None) -> str:
    """The local directory of an adapter, weights included; downloaded if it is a repository of the hub.

    Raises:
        UserError: there is no adapter at `path`.
    """
    if os.path.isdir(path):
        if not os.path.exists(os.path.join(path, CONFIG_NAME)):
            raise UserError(f"{path}: no {CONFIG_NAME} in it, so this is no adapter; check the path after the +")
        return path
    found = hub_file(path, CONFIG_NAME, revision, cache_dir)
    if not found:
        raise UserError(
            f"{path}: neither a directory nor a repository of the hub with an {CONFIG_NAME}; check the adapter's path"
        )
    if not hub_file(path, SAFETENSORS_NAME, revision, cache_dir):
        hub_file(path, PICKLE_NAME, revision, cache_dir)
    return os.path.dirname(found)


class AdapterWeights:
    """The tensors of one adapter: names and shapes from the header, values when asked for. Safe between threads."""

    def __init__(self, directory: str, where: str | None = None, allow_pickle: bool = False) -> None:
        """Open the file.

        Args:
            directory: local directory of the adapter.
            where: how to call the adapter in messages.
            allow_pickle: read adapter_model.bin where there is no safetensors file; restricted to plain tensors.

        Raises:
            UserError: no weights, weights that cannot be read, or only a pickle file that was not allowed.
        """
        self.where = where or directory
        self._lock = threading.Lock()
        self._tensors: Mapping[str, Tensor] | None = None
        self._file: Any = None
        path = Path(directory) / SAFETENSORS_NAME
        check_files(directory, directory)
        if path.exists():
            self.path = path
            self._open()
            headers = HeaderFiles().all_of(str(path))
            self.shapes = {key: header.shape for key, header in headers.items()}
            self._refuse_integers({key: header.dtype for key, header in headers.items()})
            return
        self.path = Path(directory) / PICKLE_NAME
        if not self.path.exists():
            raise UserError(
                f"{self.where}: {CONFIG_NAME} is there, but no {SAFETENSORS_NAME}; complete the download or save the "
                "adapter again"
            )
        if not allow_pickle:
            raise UserError(
                f"{self.path}: a pickle file, which is read only on request; save the adapter as safetensors, or "
                "allow it with --lazy-unpickle"
            )
        self._tensors = _unpickle(self.path)
        self.shapes = {key: tuple(tensor.shape) for key, tensor in self._tensors.items()}
        self._refuse_integers({key: tensor.dtype for key, tensor in self._tensors.items()})

    def tensor(self, key: str) -> Tensor:
        """Read one tensor in its stored dtype, on the CPU. Not to be changed in place."""
        if self._tensors is not None:
            return self._tensors[key]
        with self._lock:
            check_length(self.path, self._length)
            return self._file.get_tensor(key)

    def _refuse_integers(self, dtypes: Mapping[str, torch.dtype]) -> None:
        for key, dtype in dtypes.items():
            if "lora_" in key and not dtype.is_floating_point:
                raise UserError(
                    f"{self.path}: {key} is stored as {str(dtype).removeprefix('torch.')}, but factors are floating "
                    "point; save the adapter again"
                )

    def _open(self) -> None:
        try:
            self._file = safe_open(self.path, framework="pt")
            self._length = self.path.stat().st_size
        except (SafetensorError, OSError) as error:
            size = self.path.stat().st_size if self.path.is_file() else 0
            raise UserError(
                f"{self.path}: truncated or not a safetensors file ({size} bytes, {error}); download or save it again"
            ) from None


def _unpickle(path: Path) -> Mapping[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read as plain tensors ({first_line(error)}); save the adapter as safetensors"
        ) from None
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path}: holds something else than tensors by name; save the adapter again")
    return content
