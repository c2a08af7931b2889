"""A loader of mergekit's kind that forms an expert from a base and an adapter, tensor by tensor, when asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping

import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from torch import Tensor
from transformers import PretrainedConfig

from neuron_methods.adapters.checkpoint_names import StoredNames
from neuron_methods.adapters.own_head import OwnHead
from neuron_methods.adapters.updates import TensorUpdate
from neuron_methods.kernels.task_vectors import LowRankTaskVector
from neuron_methods.models.headers import Header, HeaderFiles
from neuron_methods.support.errors import UserError


class BaseCheckpoint:
    """The base's tensors behind a loader of mergekit's, with shapes and dtypes from the files' headers.

    Attributes:
        where: the base as the user named it.
        loader: shared with whoever else reads the base.
        names: of its tensors.
    """

    def __init__(self, loader: LazyTensorLoader, where: str, config: Callable[[], PretrainedConfig]) -> None:
        self.loader = loader
        self.where = where
        self.names = StoredNames(loader.index.tensor_paths, config)
        self._headers: dict[str, Header] = {}
        self._files = HeaderFiles()

    def shape(self, name: str) -> tuple[int, ...]:
        """Read the shape of a tensor."""
        return self.header(name).shape

    def header(self, name: str) -> Header:
        """Read the header of a tensor; only a pickled tensor is read itself.

        Raises:
            UserError: the file cannot be read, or the tensor is of a dtype that nothing merges.
        """
        if name not in self._headers:
            self._headers[name] = self._files.behind(self.loader, name)
        return self._headers[name]

    def tensor(self, name: str, device: str = "cpu") -> Tensor:
        """Read one tensor in its stored dtype."""
        return self.loader.get_tensor(name, device=device)


class AdapterLoader:
    """Hands out the tensors of `base + adapter`, as mergekit's `LazyTensorLoader` hands out a checkpoint's.

    Tensors that the adapter leaves alone are the base's own, in its dtype. The others are formed on demand in float32,
    whatever the base is stored in: rounded to bfloat16, much of an update would be lost. Nothing is kept.

    Attributes:
        index: the base's, with the tensors that the adapter unties.
        updates: {tensor: what the adapter does to it}.
        untied: {tensor the base does not store: tensor it is tied to there}.
        base: the base's checkpoint, shared.
        head: that the adapter brings along, the base having none or one of another size.
        by_peft: why peft had to merge the adapter into a temporary directory; None where it had not to.
    """

    def __init__(
        self,
        base: BaseCheckpoint,
        updates: Mapping[str, TensorUpdate],
        untied: Mapping[str, str],
        where: str,
        head: OwnHead | None = None,
        by_peft: str | None = None,
    ) -> None:
        self.base = base
        self.updates = updates
        self.untied = untied
        self.where = where
        self.head = head
        self.by_peft = by_peft
        self.lock = threading.Lock()
        stored = base.loader.index
        paths = {**stored.tensor_paths, **{new: stored.tensor_paths[old] for new, old in untied.items()}}
        # mergekit asks for the file of each tensor, and none of the base's holds the head.
        paths |= dict.fromkeys(self.head_names, next(iter(stored.tensor_paths.values())))
        self.index = ShardedTensorIndex(stored.base_path, stored.is_safetensors, paths, stored.shards)
        for name in updates:
            self._check_dtype(self.origin(name))

    def touches(self, name: str) -> bool:
        """Tell whether the adapter changes this tensor, or stores it where the base does not."""
        return name in self.updates or name in self.untied or name in self.head_names

    @property
    def head_names(self) -> Collection[str]:
        """Names of the tensors of the head that the adapter brings along."""
        return self.head.keys if self.head is not None else ()

    def origin(self, name: str) -> str:
        """Name what the base stores and this tensor starts from."""
        if name in self.updates:
            return self.updates[name].origin
        return self.untied.get(name, name)

    def header(self, name: str) -> Header:
        """Tell shape and dtype of what `get_tensor` returns, without reading it."""
        if self.head is not None and name in self.head.keys:
            return self.head.header(name)
        header = self.base.header(self.origin(name))
        return Header(header.shape, torch.float32) if name in self.updates else header

    def task_vector(self, name: str, device: str = "cpu") -> Tensor | None:
        """Form what the adapter adds to the base's tensor: τ = θ − θ₀, from the factors themselves.

        Returns:
            float32, shape of the tensor; None where the adapter leaves it alone.
        """
        update = self.updates.get(name)
        if update is None:
            return None
        return update.task_vector(lambda: self.base.tensor(update.origin, device), device)

    def low_rank(self, name: str, device: str = "cpu") -> LowRankTaskVector | None:
        """Give what the adapter adds to the base's tensor as B·A; None where it is not of that kind.

        What the adapter leaves alone is of rank 0.
        """
        header = self.header(name)
        if name not in self.updates:
            if len(header.shape) < 2:
                return None
            outer, inner = header.shape[0], header.entries // max(header.shape[0], 1)
            none = torch.zeros(outer, 0, device=device), torch.zeros(0, inner, device=device)
            return LowRankTaskVector.of(*none, header.shape)
        return self.updates[name].low_rank(device)

    def get_tensor(
        self,
        key: str,
        device: str = "cpu",
        aliases: list[str] | None = None,
        raise_on_missing: bool = True,
    ) -> Tensor | None:
        """Read or form one tensor; see mergekit's `LazyTensorLoader.get_tensor`."""
        if key not in self.index.tensor_paths:
            key = next((alias for alias in aliases or () if alias in self.index.tensor_paths), key)
        if self.head is not None and key in self.head.keys:
            return self.head.tensor(key).to(device)
        update = self.updates.get(key)
        if update is not None:
            return update.weights(lambda: self.base.tensor(update.origin, device), device)
        return self.base.loader.get_tensor(self.untied.get(key, key), device, raise_on_missing=raise_on_missing)

    def flush(self) -> None:
        """Close the base's open shard; mergekit's `LoaderCache.flush_all` calls it."""
        self.base.loader.flush()

    def _check_dtype(self, name: str) -> None:
        dtype = self.base.header(name).dtype
        if not dtype.is_floating_point:
            raise UserError(
                f"{self.base.where}: {name} is stored as {str(dtype).removeprefix('torch.')}; {self.where} cannot be "
                "applied to quantised weights: name the base in bfloat16, float16 or float32"
            )
