"""Shards of the output, written by a thread while the next tensor is merged.

mergekit 0.1.5 keeps what it has merged until a shard is full, 5 GB by default, and merges nothing while it writes. Here
a tensor is on its way to the disk as soon as it is merged, and two at most wait for it: one that is being written, and
one in the queue.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from neuron_methods.models.headers import spelled_dtype

#: Merged tensors that are held at most until they are written, beside the one that is merged.
WAITING = 2

# Of the data's beginning in a file of safetensors, and of every tensor that holds numbers of this size.
_ALIGNMENT = 8
_METADATA = {"__metadata__": {"format": "pt"}}


class PlannedShape(NamedTuple):
    """A tensor that will be written: its name and its shape, as far as it is known before."""

    name: str
    shape: tuple[int, ...]


class ShardWriter:
    """Writes one file of safetensors, tensor by tensor in the order in which they come.

    It ends in `.part` until it is complete. Its header stands in room that is kept before the data, filled up with
    spaces: it depends on what is planned alone, and the file on the order as well.
    """

    def __init__(self, place: Path, planned: Iterable[PlannedShape]) -> None:
        """Begin.

        Args:
            place: of the file.
            planned: the tensors that the room of the header is for; not all of them have to come.
        """
        self.place = place
        room = len(_json(_METADATA)) + sum(_entry_bytes(tensor.name, tensor.shape) for tensor in planned)
        self._begin = 8 + room + -room % _ALIGNMENT
        # Queues whose waiting a signal may end at any moment: one of `queue.Queue` can be left locked, and the merge
        # that is ended by the signal then waits for its writer for ever.
        self._steps: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()
        for _ in range(WAITING):
            self._room.put(None)
        self._thread: Thread | None = None
        self._failure: Exception | None = None
        self._finished = False
        # These belong to the thread.
        self._file: BinaryIO | None = None
        self._entries: dict[str, dict[str, Any]] = {}
        self._misfits: list[tuple[str, Tensor]] = []

    def save_tensor(self, name: str, tensor: Tensor) -> None:
        """Have a tensor of any shape and device written; wait where two others wait already.

        Raises:
            Exception: what has kept an earlier one from being written.
        """
        self._do(partial(self._append, name, tensor))

    def finish(self, then: Callable[[], None] = lambda: None) -> None:
        """Have the file completed and put into its place, and something done then; this does not wait for it."""
        self._do(self._end)
        self._do(then)
        self._finished = True

    def close(self) -> None:
        """End the thread once it has done what it was given; idempotent.

        Raises:
            Exception: what has kept a tensor from being written.
        """
        self._stop()
        self._raise()

    def abandon(self) -> None:
        """End the thread without writing what waits, unless that is all that the file lacks."""
        if not self._finished:
            self._failure = self._failure or RuntimeError("the merge has ended")
        self._stop()

    def _stop(self) -> None:
        self._steps.put(None)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _do(self, step: Callable[[], None]) -> None:
        self._raise()
        if self._thread is None:
            thread = Thread(target=self._work, name="shard writer", daemon=True)
            thread.start()  # before it is known: a signal may end the merge in between, and then there is none to join
            self._thread = thread
        self._room.get()
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
            self._room.put(None)

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._file = self.place.with_suffix(".part").open("wb")
            self._file.seek(self._begin)
        return self._file

    def _append(self, name: str, tensor: Tensor) -> None:
        if tensor.numel() * tensor.element_size() % _ALIGNMENT:
            # What comes behind it would not be aligned: it comes last, as safetensors has it.
            self._misfits.append((name, tensor))
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        file = self._opened()
        begin = file.tell() - self._begin
        file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._entries[name] = {
            "dtype": spelled_dtype(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [begin, file.tell() - self._begin],
        }

    def _end(self) -> None:
        for name, tensor in sorted(self._misfits, key=lambda pair: (-pair[1].element_size(), pair[0])):
            self._write(name, tensor)
        file = self._opened()
        header = _json({**_METADATA, **self._entries}).ljust(self._begin - 8)
        assert len(header) == self._begin - 8  # offsets are planned with more digits than they have
        file.seek(0)
        file.write(len(header).to_bytes(8, "little") + header)
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(file.name, self.place)
        self._file, self._entries, self._misfits = None, {}, []


def _json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _entry_bytes(name: str, shape: Iterable[int]) -> int:
    """What a header takes for a tensor at most, its offsets having thirteen digits, its dtype four, and a comma."""
    return len(_json({name: {"dtype": "BF16", "shape": list(shape), "data_offsets": [10**12, 10**12]}})) - 1
