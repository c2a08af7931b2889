"""Shapes and dtypes of stored tensors, read without their data."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import safetensors
import torch
from pydantic import Field
from torch import Tensor

from neuron_methods.models.model_files import beside, check_link
from neuron_methods.support.documents import Foreign, check_regular, parse_json, read_object, validated
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import first_line

Found = TypeVar("Found")

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


_SPELLED = {dtype: spelled for spelled, dtype in _DTYPES.items()}


def spelled_dtype(dtype: torch.dtype) -> str:
    """Spell a dtype that a merge can take as safetensors does."""
    return _SPELLED[dtype]


class IndexFile(Foreign):
    """What is read of a *.index.json."""

    weight_map: Annotated[dict[str, str], Field(min_length=1)]


class HeaderEntry(Foreign):
    """What the header of a safetensors file says of one tensor."""

    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = Field(strict=False)


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

    def all_of(self, path: str) -> dict[str, Header]:
        """Read the headers of all tensors of a file; errors as in `read`."""
        if path not in self._files:
            self._files[path] = open_safetensors(path)
        return {name: self.read(path, name) for name in self._files[path].keys()}  # noqa: SIM118 - no mapping

    def behind(self, loader: Any, name: str) -> Header:
        """Read the header of a tensor behind a loader of mergekit's kind; errors as in `read`.

        Args:
            loader: has `index` and `get_tensor`, and `stored_as` where its names are not those of its files; only a
                pickled tensor is read.
            name: in its index.
        """
        path = os.path.join(loader.index.base_path, loader.index.tensor_paths[name])
        stored = loader.stored_as(name) if hasattr(loader, "stored_as") else name
        return self.read(path, stored) if path.endswith(".safetensors") else Header.of(loader.get_tensor(name))


def open_safetensors(path: str | os.PathLike[str]) -> Any:
    """Open a safetensors file for lazy reading.

    Raises:
        UserError: the file is missing, truncated or not safetensors.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file, but the checkpoint's index names it")
    check_regular(path)
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}); download or save it again") from None


def header_entries(path: Path) -> tuple[int, dict[str, HeaderEntry]]:
    """Read the header of a safetensors file by hand.

    Returns:
        Where the data begins, in bytes, and {tensor: dtype, shape and place within the data}.

    Raises:
        UserError: the file is missing, truncated or not safetensors.
    """
    check_regular(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise UserError(f"{path}: not a complete safetensors file; download or save it again")
        content = parse_json(file.read(length), f"{path}: its header", "download or save it again")
    if isinstance(content, dict):
        content.pop("__metadata__", None)
    entries = validated(content, dict[str, HeaderEntry], f"{path}: its header", "download or save it again")
    if not all(
        first <= last <= size - 8 - length for first, last in (entry.data_offsets for entry in entries.values())
    ):
        raise UserError(f"{path}: not a complete safetensors file; download or save it again")
    return 8 + length, entries


def check_length(path: str | os.PathLike[str], length: int) -> None:
    """Make sure that a file is still as long as it was, before a tensor of it is read.

    It is mapped into memory: where it has been cut short, the system ends the process that looks.

    Raises:
        UserError: it is shorter now, or gone.
    """
    try:
        now = os.stat(path).st_size
    except OSError:
        now = 0
    if now < length:
        raise UserError(
            f"{path}: was cut short or removed while it was read ({length} bytes, now {now}); put it back and run again"
        )


def weight_files(directory: Path, stem: str = "model.safetensors") -> list[Path]:
    """List the files that transformers 5 reads a directory's weights from: the single file, else those of the index.

    Args:
        directory: of a model or an adapter.
        stem: the single file's name, and the index's without `.index.json`.

    Raises:
        UserError: there are none, or the index is damaged.
    """
    whole, index = directory / stem, directory / f"{stem}.index.json"
    if os.path.lexists(whole):
        check_regular(whole)
        check_link(directory, stem, str(directory))
        return [whole]
    if not os.path.lexists(index):
        if any(directory.glob("*.bin")):
            raise UserError(
                f"{directory}: its weights are a pickle (.bin), which can run code when it is loaded, so it is not "
                "read; save it as safetensors, or merge it again without --no-safe-serialization"
            )
        raise UserError(f"{directory}: no weights in it ({stem} or its index); is it complete?")
    return [beside(index, name, "weight_map") for name in sorted(set(weight_map(index).values()))]


def weight_map(index: Path) -> dict[str, str]:
    """Read which shard an index names for each tensor.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    again = "download or save the model again"
    return validated(read_object(index, again=again), IndexFile, str(index), again).weight_map


def stored_count(directory: Path) -> int:
    """Count the tensors of a directory, as far as it holds safetensors that can be read; 0 where it does not."""
    try:
        return sum(len(header_entries(file)[1]) for file in weight_files(directory))
    except UserError:
        return 0


def stored_headers(directory: Path, stem: str = "model.safetensors") -> dict[str, Header]:
    """Read the headers of all tensors that transformers 5 would read from a directory.

    Args:
        directory: of a model or an adapter.
        stem: as for `weight_files`; a pickle's ends in `.bin`.

    Raises:
        UserError: naming the file that is missing or damaged, or the tensor that files and index disagree about.
    """
    files = HeaderFiles()

    def read(file: Path) -> Mapping[str, Header]:
        return files.all_of(str(file)) if stem.endswith(".safetensors") else pickled_headers(file)

    return _in_all_files(directory, stem, read)


def headers_of(
    directory: Path, stem: str = "model.safetensors", held: Mapping[str, Tensor] | None = None
) -> dict[str, Header]:
    """Tell the headers of a directory's tensors, or of `held`, which stand for its files of weights in memory."""
    return stored_headers(directory, stem) if held is None else {n: Header.of(tensor) for n, tensor in held.items()}


def stored_names(directory: Path, stem: str = "model.safetensors") -> list[str]:
    """List the tensors of a directory, whatever dtypes they are stored in; arguments and errors as `stored_headers`."""

    def read(file: Path) -> Mapping[str, Any]:
        pickled = not stem.endswith(".safetensors")
        return pickled_headers(file) if pickled else dict.fromkeys(open_safetensors(file).keys())

    return list(_in_all_files(directory, stem, read))


def _in_all_files(directory: Path, stem: str, read: Callable[[Path], Mapping[str, Found]]) -> dict[str, Found]:
    """What `read` finds in each file of weights, which must be what their index says."""
    headers: dict[str, Found] = {}
    for file in weight_files(directory, stem):
        found = read(file)
        if twice := sorted(headers.keys() & found.keys()):
            raise UserError(f"{file}: tensor {twice[0]} is in another shard, too; save the model again")
        headers |= found
    index = directory / f"{stem}.index.json"
    if not (directory / stem).is_file():
        lost = sorted(weight_map(index).keys() - headers.keys())
        if lost:
            raise UserError(f"{index}: it promises tensor {lost[0]}, but no shard holds it; save the model again")
    return headers


def pickled_headers(file: Path) -> dict[str, Header]:
    """Read the headers of a pickle's tensors, which are not read themselves; no code in it is run.

    Raises:
        UserError: it is damaged, or holds something else than a model's tensors by name.
    """
    check_regular(file)
    try:
        content = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # whatever torch makes of foreign bytes
        raise UserError(
            f"{file}: cannot be read back as a pickle of tensors and nothing else: {first_line(error)}"
        ) from None
    if isinstance(content, Mapping) and "state_dict" in content:
        raise UserError(
            f"{file}: a training checkpoint with the weights under 'state_dict', which transformers does not read; "
            "save them alone: torch.save(torch.load(FILE)['state_dict'], FILE)"
        )
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"{file}: holds something else than tensors by name; save the model again")
    return {str(name): Header.of(tensor) for name, tensor in content.items()}
