"""Shards of the output, written by a thread while the next tensor is merged.

mergekit 0.1.5 keeps what it has merged until a shard is full, 5 GB by default, and merges nothing while it writes. Here
a tensor is on its way to the disk as soon as it is merged, and two at most wait for it: one that is being written, and
one in the queue.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, BinaryIO, NamedTuple

import torch
from mergekit.io.tensor_writer import TensorWriter
from torch import Tensor

from neuron_methods.models.headers import spelled_dtype
from neuron_methods.plugin.seam import writing_with

#: Merged tensors that are held at most until they are written, beside the one that is merged.
WAITING = 2

_WRITTEN = torch.empty(0)  # in place of a tensor that this object no longer holds
# Of the data's beginning in a file of safetensors, and of every tensor that holds numbers of this size.
_ALIGNMENT = 8
_METADATA = {"__metadata__": {"format": "pt"}}


class PlannedShape(NamedTuple):
    """A tensor that will be written: its name, its shape and its bytes, as far as they are known before."""

    name: str
    shape: tuple[int, ...]
    bytes: int


class ShardWriter(TensorWriter):
    """Takes merged tensors as mergekit's writer does, and leaves the same shards and index, by safetensors alone.

    A shard is `shard.part` until it is complete. Its header stands in room that is kept before the data, filled up with
    spaces.
    """

    def __init__(self, out_path: str, max_shard_size: int, planned: Iterable[PlannedShape]) -> None:
        """Begin.

        Args:
            out_path: directory; made where it is missing.
            max_shard_size: bytes of tensors in one file, unless a single one has more.
            planned: the tensors that will come, in this order as far as it is known; a shard ends where its header is
                full.
        """
        super().__init__(out_path, max_shard_size)
        self._planned = {tensor.name: tensor for tensor in planned}
        self._room = self._left = 0
        self._steps: Queue[Callable[[], None] | None] = Queue(maxsize=WAITING - 1)
        self._thread: Thread | None = None
        self._failure: Exception | None = None
        # These belong to the thread.
        self._file: BinaryIO | None = None
        self._begin = 0
        self._entries: dict[str, dict[str, Any]] = {}
        self._misfits: list[tuple[str, Tensor]] = []

    def save_tensor(self, name: str, tensor: Tensor, clone: bool = False) -> None:
        """Have a tensor written; wait where two others wait already.

        Args:
            name: of the tensor.
            tensor: any shape and device.
            clone: of no meaning here, as tensors that share memory are written one by one.

        Raises:
            Exception: what has kept an earlier one from being written.
        """
        size, entry = tensor.numel() * tensor.element_size(), _entry_bytes(name, tensor.shape)
        with self._lock:
            over = self.max_shard_size > 0 and self.current_shard_size + size > self.max_shard_size
            if self.current_shard and (over or entry > self._left):
                self._flush_current_shard()
            if not self.current_shard:
                self._left = self._room_for_header(entry)
                self._do(partial(self._open, 8 + self._left))
            self.current_shard[name] = _WRITTEN
            self.current_shard_size += size
            self._left -= entry
            self._planned.pop(name, None)
            self.weight_map[name] = self._shard_name()
            self._do(partial(self._append, name, tensor))

    def _flush_current_shard(self) -> None:
        """End the shard; the thread completes its file."""
        if not self.current_shard:
            return
        self._do(partial(self._end, Path(self.out_path) / self._shard_name()))
        self.total_size += self.current_shard_size
        self.current_shard, self.current_shard_size = {}, 0
        self.shards_written += 1

    def finalize(self) -> None:
        """End the last shard, wait for the thread, name the files and write their index.

        Raises:
            Exception: what has kept a tensor from being written.
        """
        with self._lock:
            self._flush_current_shard()
        self.close()
        self._raise()
        super().finalize()

    def close(self) -> None:
        """End the thread once it has done what it was given, and let go of the file; idempotent."""
        if self._thread is not None:
            self._steps.put(None)
            self._thread.join()
            self._thread = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def abandon(self) -> None:
        """End the thread without writing what waits."""
        self._failure = self._failure or RuntimeError("the merge has ended")
        self.close()

    def _room_for_header(self, first: int) -> int:
        """Bytes that the header of a new shard takes at most, if tensors come as planned; for the first in any case."""
        room = len(json.dumps(_METADATA)) + first
        size = 0
        for tensor in self._planned.values():
            room += _entry_bytes(tensor.name, tensor.shape)
            size += tensor.bytes
            if 0 < self.max_shard_size < size:
                break
        return room + -room % _ALIGNMENT

    def _shard_name(self) -> str:
        prefix, extension = self._get_name_components()
        return f"{prefix}-{self.shards_written + 1}.{extension}"

    def _do(self, step: Callable[[], None]) -> None:
        self._raise()
        if self._thread is None:
            self._thread = Thread(target=self._work, name="shard writer", daemon=True)
            self._thread.start()
        self._steps.put(step)

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while (step := self._steps.get()) is not None:
            try:
                if self._failure is None:
                    step()
            except Exception as error:  # raised again where the merge meets the writer next
                self._failure = error
            del step  # and with it the tensor

    def _open(self, begin: int) -> None:
        self._file, self._begin = (Path(self.out_path) / "shard.part").open("wb"), begin
        self._file.seek(begin)

    def _append(self, name: str, tensor: Tensor) -> None:
        if tensor.numel() * tensor.element_size() % _ALIGNMENT:
            # What comes behind it would not be aligned: it comes last, as safetensors has it.
            self._misfits.append((name, tensor))
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        assert self._file is not None
        begin = self._file.tell() - self._begin
        self._file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._entries[name] = {
            "dtype": spelled_dtype(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [begin, self._file.tell() - self._begin],
        }

    def _end(self, place: Path) -> None:
        for name, tensor in sorted(self._misfits, key=lambda pair: (-pair[1].element_size(), pair[0])):
            self._write(name, tensor)
        assert self._file is not None
        header = _json({**_METADATA, **self._entries}).ljust(self._begin - 8)
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.close()
        os.replace(self._file.name, place)
        self._file, self._entries, self._misfits = None, {}, []


def _json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _entry_bytes(name: str, shape: Iterable[int]) -> int:
    """What a header takes for a tensor at most, its offsets having thirteen digits, its dtype four, and a comma."""
    return len(_json({name: {"dtype": "BF16", "shape": list(shape), "data_offsets": [10**12, 10**12]}})) - 1


@contextmanager
def streamed_shards(planned: Callable[[], Iterable[PlannedShape]]) -> Iterator[None]:
    """Let mergekit's merges within the block write safetensors through a `ShardWriter`; its thread ends with the block.

    Args:
        planned: lists the tensors that will be written, once the first of them is to be merged.
    """
    writers: list[ShardWriter] = []

    def around(own: Callable[..., TensorWriter]) -> Callable[..., TensorWriter]:
        def writer(out_path: str, *, safe_serialization: bool = True, **options: Any) -> TensorWriter:
            if not safe_serialization or options.get("override_basename"):
                return own(out_path, safe_serialization=safe_serialization, **options)
            writers.append(ShardWriter(out_path, options["max_shard_size"], planned()))
            return writers[-1]

        return writer

    try:
        with writing_with(around):
            yield
    finally:
        for opened in writers:
            opened.abandon()
