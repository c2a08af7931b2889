"""Checkpoints behind mergekit's loaders: every tensor is the one that transformers would read.

mergekit 0.1.5 takes the index before a single file, where transformers 5 takes the single file; and it takes a tensor
from whichever shard is open, where transformers takes every tensor of the shards in the order of their names, the last
one of a name. It reads names as they stand; here what `torch.compile` and `DistributedDataParallel` put into them goes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex, ShardInfo
from mergekit.io.loader import TensorLoader
from torch import Tensor

from neuron_methods.models.headers import check_length, open_safetensors, pickled_headers, weight_files, weight_map
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import first_line

_SAFETENSORS, _PICKLE = "model.safetensors", "pytorch_model.bin"
#: Bytes of a file that stay mapped, before it is opened anew: what has been read of it counts as the process's memory.
MAPPED_BYTES = 2**26
# Part of a name -> who puts it there: before all names, or before those of the module that was compiled.
_WRAPPERS = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile"}


class CheckpointLoader(LazyTensorLoader):
    """Reads a checkpoint as transformers 5 does.

    Attributes:
        wrappers: what was taken out of all names, in words; empty where nothing was.
        on_read: called with this loader and the name of a tensor before it is read.
    """

    on_read: Callable[[CheckpointLoader, str], None] | None = None

    def __init__(self, index: ShardedTensorIndex, spelled: Mapping[str, str], lazy_unpickle: bool = True) -> None:
        super().__init__(index, lazy_unpickle)
        self._spelled = spelled
        self._open_file: str | None = None
        self._length = self._mapped = 0
        found = [part for part in _WRAPPERS if any(part in name for name in spelled.values())]
        self.wrappers = " and ".join(f"{part} (of {_WRAPPERS[part]})" for part in found)

    @classmethod
    def open(cls, directory: str, lazy_unpickle: bool = True) -> CheckpointLoader:
        """Open a directory's weights.

        Raises:
            UserError: a file is missing or damaged, or holds something else than a model's tensors.
            RuntimeError: there are no weights, as mergekit's own loader says.
        """
        index = _index(directory)
        spelled = _without_wrappers(index.tensor_paths)
        if spelled:
            index.tensor_paths = {new: index.tensor_paths[old] for new, old in spelled.items()}
        return cls(index, spelled, lazy_unpickle)

    def stored_as(self, name: str) -> str:
        """Give the name of a tensor within its file."""
        return self._spelled.get(name, name)

    def file_of(self, name: str) -> Path:
        """Give the file that a tensor lies in."""
        return Path(self.index.base_path, self.index.tensor_paths[name])

    def get_tensor(
        self, key: str, device: str = "cpu", aliases: list[str] | None = None, raise_on_missing: bool = True
    ) -> Tensor | None:
        """Read one tensor from the file that `index` names; see mergekit's `LazyTensorLoader.get_tensor`."""
        paths = self.index.tensor_paths
        key = next((name for name in (key, *(aliases or ())) if name in paths), key)
        if key not in paths:
            if raise_on_missing:
                raise KeyError(key)
            return None
        file = str(self.file_of(key))
        if self.on_read is not None:
            self.on_read(self, key)
        with self.lock:
            if self._open_file != paths[key]:
                self.current_shard, self._open_file = None, None
                with _reading(file):
                    self.current_shard = TensorLoader.get(file, use_lazy_unpickle=self.lazy_unpickle, device=device)
                self._open_file, self._length, self._mapped = paths[key], os.path.getsize(file), 0
            check_length(file, self._length)
            with _reading(file):
                tensor = self.current_shard.get_tensor(self.stored_as(key))
            self._mapped += tensor.nbytes
            if self.index.is_safetensors and self._mapped > MAPPED_BYTES:
                self.current_shard, self._open_file = None, None  # unmapped once no tensor of it is left
            return tensor.to(device)

    def flush(self) -> None:
        """Close the open file."""
        super().flush()
        self._open_file = None


@contextmanager
def _reading(file: str) -> Iterator[None]:
    """Say which file it is that a library fails on: of pickles only the reading of a tensor shows what is damaged."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever zip files and pickles are damaged by
        raise UserError(f"{file}: cannot be read ({first_line(error)}); download or save it again") from error


def _index(directory: str) -> ShardedTensorIndex:
    place = Path(directory)
    stem = next((s for s in (_SAFETENSORS, _PICKLE) for n in (s, f"{s}.index.json") if (place / n).is_file()), None)
    if stem is None:
        return ShardedTensorIndex.from_disk(directory)  # which says so
    paths: dict[str, str] = {}
    if not (place / stem).is_file():
        paths |= weight_map(place / f"{stem}.index.json")  # what no shard holds is missed by name later
    for file in weight_files(place, stem):
        held = open_safetensors(file).keys() if stem == _SAFETENSORS else pickled_headers(file)
        paths |= dict.fromkeys(held, file.name)
    if not paths:
        raise UserError(f"{place / stem}: holds no tensors; download or save the model again")
    shards = [ShardInfo(name, [n for n in paths if paths[n] == name]) for name in dict.fromkeys(paths.values())]
    return ShardedTensorIndex(directory, stem == _SAFETENSORS, paths, shards)


def _without_wrappers(names: Mapping[str, str]) -> dict[str, str]:
    """{name without wrappers: name as it is stored}; empty where none are in the way."""
    clean = {name: name.replace("_orig_mod.", "") for name in names}
    while clean and all(name.startswith("module.") for name in clean.values()):
        clean = {old: new.removeprefix("module.") for old, new in clean.items()}
    changed = any(old != new for old, new in clean.items())
    return {new: old for old, new in clean.items()} if changed and len({*clean.values()}) == len(clean) else {}
