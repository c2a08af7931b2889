"""What of a merge is finished, and lies beside its place until all is: what an interrupted merge goes on from.

A merge is made in pieces: sets of whole tensors, each written as one safetensors file, with a record of what the file
was then and what the merge of its tensors told. A piece is there as a whole or not at all. What they all were made from
stands in a file of its own. The output is put together from the pieces at the end, in an order that the plan alone
decides, so that it is the same however often the merge was interrupted, and whoever made the pieces.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from neuron_methods.plugin.shards import PlannedShape, ShardWriter
from neuron_methods.support.documents import read_object
from neuron_methods.support.errors import UserError, explained_by
from neuron_methods.support.files import write_json
from neuron_methods.support.fingerprints import file_state
from neuron_methods.support.runs import claimed, hidden, note, remove
from neuron_methods.support.text import listed

_BEGUN = "begun.json"


@dataclass(frozen=True, eq=False)
class Piece:
    """Some tensors of an output, merged and written.

    Attributes:
        file: a safetensors file.
        traces: {tensor: what its merge told; for JSON}, of all tensors that the piece is of, in their order.
    """

    file: Path
    traces: dict[str, dict[str, Any]]


@dataclass
class _Making:
    names: tuple[str, ...]
    file: Path
    writer: ShardWriter | None
    tensors: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    traces: dict[str, dict[str, Any]] = field(default_factory=dict)
    written: int = 0


class Work:
    """The unfinished output of a merge.

    Args:
        target: where the output will be.
        resumable: whether a later run may go on with what is finished.

    Attributes:
        groups: the tensors that are stored together, in order; set by who plans the output.
        shapes: of these tensors, as far as they are known, if they are stored as they are and written one by one.
        place: the directory of the pieces.
        pieces: {tensor: the finished piece that it is in}.
        seed: drawn when the merge was begun, for methods that leave something to chance.
        told: {tensor: what its merge told, for JSON}, of those that are merged and not taken yet.
        verified: whether all are finished and were found sound, so that whatever fails now is no fault of theirs.
        held: the merged tensors, by their keys in files, where they stay in memory; None: they are written.
    """

    held: dict[str, Tensor] | None = None

    def __init__(self, target: Path, *, resumable: bool = True) -> None:
        self.target = target
        self._resumable = resumable
        self.place = hidden(target, "unfinished")
        self.groups: list[list[str]] = []
        self.shapes: dict[str, PlannedShape] = {}
        self.pieces: dict[str, Piece] = {}
        self.seed = 0
        self.told: dict[str, dict[str, Any]] = {}
        self.verified = False
        self._making: dict[str, _Making] = {}
        self._writers: list[ShardWriter] = []
        self._lock = threading.Lock()
        self._is_open = False

    @explained_by("interrupted")
    def open(self, made_from: Mapping[str, Any], shown: object, *, resume: bool, anew: bool) -> None:
        """Find what there is of this merge, or begin it.

        Args:
            made_from: everything that the output depends on, for JSON.
            shown: what messages call the output.
            resume: go on with what is there.
            anew: whether what is there may go, unless it is gone on with.

        Raises:
            UserError: an unfinished merge of this plan is there and neither is said, one of another plan is to be gone
                on with, or what is there is somebody's own.
        """
        self._refuse_foreign()
        made_from = json.loads(json.dumps(made_from))
        self.read()
        if self.pieces:
            begun = self._begun()
            if resume and begun is None:
                raise UserError(
                    f"{shown}: {self.place.name}/{_BEGUN}, which says what the unfinished merge was begun from, is "
                    "damaged; leave --resume out to begin anew"
                )
            differing = [f"its {_BEGUN} is damaged"] if begun is None else _differing(begun["made_from"], made_from)
            finished = f"{len({*self.pieces.values()})} of its pieces are finished"
            if resume and differing:
                raise UserError(
                    f"{shown}: the unfinished merge there was begun otherwise ({listed(differing)}); leave --resume "
                    "out to begin anew, or make it as it was"
                )
            if not resume and not differing and not anew:
                raise UserError(
                    f"{shown}: an unfinished merge of this plan is there, and {finished}; --resume goes on with it, "
                    "--force begins anew"
                )
            if resume and begun is not None:
                self._tidy()
                self.seed, self._is_open = begun["seed"], True
                return
            if not anew:
                what = "" if begun is None else " of another plan"
                note(f"{shown}: an unfinished merge{what} was there ({listed(differing)}); begun anew")
        self._remove()
        self.seed, self._is_open = secrets.randbits(32), True
        self.place.mkdir()
        _write(self.place / _BEGUN, {"seed": self.seed, "made_from": made_from})

    def join(self, seed: int) -> bool:
        """Find the work that another process has opened; False where this one does not see it."""
        begun = self._begun()
        if begun is None or begun["seed"] != seed:
            return False
        self.seed = seed
        self.read()
        return True

    def read(self) -> None:
        """Take note of the pieces that are finished and as they were when they were."""
        self.pieces = {}
        for record in sorted(self.place.glob("*.json")) if self.place.is_dir() else ():
            content, file = _read(record), record.with_suffix(".safetensors")
            if file.is_symlink() or record.is_symlink():  # of nobody's making here, and no file of an output
                continue
            if content.keys() == {"file", "tensors"} and content["file"] == file_state(file):
                piece = Piece(file, content["tensors"])
                self.pieces.update(dict.fromkeys(piece.traces, piece))

    def bytes_there(self) -> int:
        """Count the bytes of finished pieces that need no room again: they become files of the output, or go."""
        self.read()
        return sum(piece.file.stat().st_size for piece in {*self.pieces.values()}) if self.shapes else 0

    def start(self, groups: Iterable[Sequence[str]]) -> None:
        """Say which pieces are made now, and of which tensors; `take` gets them one by one."""
        # Named by its first tensor, which is in no other piece.
        order = {name: number for number, name in enumerate(name for names in self.groups for name in names)}
        for names in groups:
            file = self.place / f"{order[names[0]]:06d}.safetensors"
            writer = ShardWriter(file, [self.shapes[name] for name in names]) if self.shapes else None
            self._writers += [writer] if writer is not None else []
            self._making.update(dict.fromkeys(names, _Making(tuple(names), file, writer)))

    def take(self, name: str, tensors: Mapping[str, Tensor], **more: Any) -> None:
        """Take what is stored of one tensor, and have it written in the order of its piece.

        Args:
            name: of the merged tensor.
            tensors: what is stored of it, by their keys in the file, contiguous, on the CPU.
            **more: what goes with them, for JSON.
        """
        with self._lock:
            making = self._making.pop(name)
            making.tensors[name] = tensors
            making.traces[name] = {**self.told.pop(name, {}), **more}
            if making.writer is not None:
                self._stream(making, making.writer)
            elif len(making.traces) == len(making.names):
                stored = {key: tensor for of_one in making.tensors.values() for key, tensor in of_one.items()}
                save_tensors(stored, beside := making.file.with_suffix(".part"))
                os.replace(beside, making.file)
                self._record(making)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within the block pieces are made; after it they are written, and no thread goes on."""
        try:
            yield
            for writer in self._writers:
                writer.close()
        finally:
            for writer in self._writers:
                writer.abandon()

    def traces(self) -> dict[str, dict[str, Any]]:
        """List what the merges of all tensors told, in the order of the plan."""
        return {name: self.pieces[name].traces[name] for names in self.groups for name in names}

    def leave(self, *, keep: bool) -> None:
        """Remove what is there, or keep the finished pieces, if a run may go on with them, and say so.

        What has not been opened is left alone.
        """
        if not self._is_open:
            return
        self.read()
        if keep and self._resumable and self.pieces:
            finished, tensors = len({*self.pieces.values()}), sum(map(len, self.groups))
            note(
                f"{self.target.name}: {finished} finished piece{'s' * (finished > 1)}, {len(self.pieces)} of {tensors} "
                "tensors, kept; the same command with --resume goes on"
            )
        else:
            self._remove()

    def _stream(self, making: _Making, writer: ShardWriter) -> None:
        """Have all written that comes next in a piece; what came before its turn has waited."""
        while making.written < len(making.names) and (name := making.names[making.written]) in making.tensors:
            for key, tensor in making.tensors.pop(name).items():
                writer.save_tensor(key, tensor)
            making.written += 1
        if making.written == len(making.names):
            writer.finish(partial(self._record, making))

    def _record(self, making: _Making) -> None:
        traces = {name: making.traces[name] for name in making.names}
        _write(making.file.with_suffix(".json"), {"file": file_state(making.file), "tensors": traces})
        self.pieces.update(dict.fromkeys(traces, Piece(making.file, traces)))

    def _refuse_foreign(self) -> None:
        """Refuse what no merge has left; a run that was killed as it began leaves nothing whole."""
        if not os.path.lexists(self.place):
            return
        own = self.place.is_dir() and not self.place.is_symlink()
        left = {name for name in os.listdir(self.place) if not name.endswith(".partial")} if own else set()
        if not own or (left and _BEGUN not in left):
            raise UserError(f"{self.place}: is in the way, and was left by no merge; move it away")

    def _tidy(self) -> None:
        """Remove what is no finished piece."""
        kept = {file for piece in self.pieces.values() for file in (piece.file, piece.file.with_suffix(".json"))}
        for path in self.place.iterdir() if self.place.is_dir() else ():
            if path not in kept and path.name != _BEGUN:
                remove(path)

    def _remove(self) -> None:
        """Remove everything, and last of all what tells that a merge has left it: this, too, may be broken off."""
        self.pieces = {}
        self._tidy()
        remove(self.place)

    def _begun(self) -> dict[str, Any] | None:
        """Read what stands in the file of what the pieces are made from; None where it is damaged."""
        content = _read(self.place / _BEGUN)
        return content if content.keys() == {"seed", "made_from"} else None


class HeldWork(Work):
    """An output of which nothing is written: the merged tensors stay in memory."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull))
        self.held = {}

    def take(self, name: str, tensors: Mapping[str, Tensor], **more: Any) -> None:
        """Keep what is stored of one tensor, in memory of its own: it may be an input's, mapped from a file."""
        copied = {key: tensor.clone() for key, tensor in tensors.items()}
        with self._lock:
            self.told.pop(name, None)
            self.held |= copied


def forget(target: Path) -> None:
    """Remove the finished pieces that an interrupted merge has left for one that goes on; what is not ours stays.

    Args:
        target: where the output would have been.

    Raises:
        UserError: another run writes there.
    """
    target = target.resolve()
    with claimed(target):
        place = Work(target).place
        if (place / _BEGUN).is_file():
            remove(place)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file as mergekit does: what shares memory is written as often as it is named."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except RuntimeError as error:
        if "share memory" not in str(error):
            raise
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def stored_in(pieces: Iterable[Piece]) -> dict[str, Tensor]:
    """Read all that pieces store, by its keys, mapped from their files."""
    found: dict[str, Tensor] = {}
    for piece in dict.fromkeys(pieces):
        with safe_open(piece.file, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    return found


def put(file: Path, place: Path) -> None:
    """Let a finished file be at another place, too; on a file system without links, instead."""
    try:
        os.link(file, place)
    except OSError:
        os.rename(file, place)


def _differing(before: Mapping[str, Any], made_from: Mapping[str, Any]) -> list[str]:
    """Name what is not as it was when the pieces there were made."""
    return sorted(key for key in {*before, *made_from} if before.get(key) != made_from.get(key))


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object that tells whether it was changed."""
    write_json(file, {**content, "digest": _digest(content)})


def _read(file: Path) -> dict[str, Any]:
    """Read a JSON object of ours; an empty one where it is not as it was written."""
    try:
        content = read_object(file)
    except UserError:
        return {}
    return content if content.pop("digest", None) == _digest(content) else {}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
