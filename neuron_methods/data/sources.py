"""Where the data comes from: ``NAME=SOURCE`` on the command line, samples read as a stream.

SOURCE is one of

- ``LOCAL[:[SPLIT:]COLUMNS]``: a json, jsonl, parquet, csv, tsv or txt file (a line is a sample; may end in .gz), a
  folder of images (with sub-folders as labels, or metadata beside them), or a folder with a data set's files;
- ``HUB-ID[@CONFIG]:SPLIT[:COLUMNS]``: a data set of the hub, such as ``openai/gsm8k@main:train:question,answer``.

COLUMNS is one column or two with a comma: ``text``, ``input,target`` for text-to-text and instruction data,
``image,label`` or ``image,text`` for images. A local path is taken letter by letter and read here; data sets of the
hub are read by `datasets`.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuron_methods.data.files import format_of
from neuron_methods.data.folders import Table, open_table
from neuron_methods.models.reference import looks_local
from neuron_methods.support.errors import UserError
from neuron_methods.support.fingerprints import tree_state
from neuron_methods.support.text import first_line, listed, shortened

_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<config>[\w.-]+))?")
_SPLIT = re.compile(r"[\w.-]+")
_SYNTAX = "NAME=LOCAL[:[SPLIT:]COLUMNS] or NAME=HUB-ID[@CONFIG]:SPLIT[:COLUMNS]"

# Rows drawn ahead of, so that their order is random. Images are not decoded before they are needed.
SHUFFLE_BUFFER = 1000
_PATHS_BUFFER = 100_000
#: Characters that a text may have, which a tokenizer turns into some hundred times as many bytes.
MOST_TEXT = 8 << 20
_LOOKED_AT = 100  # rows that tell which columns there are


@dataclass(frozen=True)
class DataSource:
    """One named source of samples, not opened yet.

    Attributes:
        name: what the profile calls it.
        location: local path or hub id.
        local: whether it is a path.
        config: the hub data set's configuration.
        split: None for the only one a local file has.
        columns: none (then by default), one or two.
        role: what messages call it.
        told_by: where the user names the columns, for messages.
    """

    name: str
    location: str
    local: bool
    config: str | None = None
    split: str | None = None
    columns: tuple[str, ...] = ()
    role: str = "data source"
    told_by: str = "--data"

    @property
    def shown(self) -> str:
        """How it is named in files and messages: without the directories of a local path."""
        place = shortened(Path(self.location).resolve().name, 200, quote=False) if self.local else self.location
        place += f"@{self.config}" if self.config else ""
        return ":".join(part for part in (place, self.split, ",".join(self.columns)) if part)

    @property
    def fingerprint(self) -> str:
        """Tells apart sources that are shown alike."""
        place = str(Path(self.location).resolve()) if self.local else self.location
        text = repr((place, self.config, self.split, self.columns))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def state(self) -> str:
        """Tells a local file or folder from what it was before it was written anew; "" of the Hub's."""
        return hashlib.sha256(repr(tree_state(self.location)).encode()).hexdigest()[:16] if self.local else ""


@dataclass(frozen=True)
class Sample:
    """One sample: `order` counts the samples read, `row` is its row in the data set, `values` are its columns."""

    order: int
    row: int
    values: tuple[Any, ...]


def parse_source(text: str) -> DataSource:
    """Read ``NAME=SOURCE``; nothing is opened yet.

    Raises:
        UserError: it has another form, or names a file that is not there.
    """
    name, equals, source = text.partition("=")
    where = f"--data {shortened(text, 200, quote=False)}"
    if not equals or not source or not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{where}: expected {_SYNTAX}, where NAME is of letters, digits, '.', '_' and '-'")
    location, fields = _split_off_fields(source)
    if len(fields) > 2 or not all((location, *fields)):
        raise UserError(f"{where}: expected {_SYNTAX}")
    local = is_local(location, where)
    if not local and not fields:
        raise UserError(
            f"{where}: there is no file or folder {shortened(location)}, and a data set of the hub needs a split: "
            f"{name}={shortened(location, quote=False)}:train"
        )
    config = ""
    if local:
        split, given = fields[0] if len(fields) == 2 else None, fields[-1:]
    else:
        location, _, config = location.partition("@")
        split, *given = fields
    if split is not None and not _SPLIT.fullmatch(split):
        raise UserError(f"{where}: {shortened(split)} is no name of a split; expected {_SYNTAX}")
    columns = tuple(column.strip() for column in given[0].split(",")) if given else ()
    if len(columns) > 2 or not all(columns):
        raise UserError(f"{where}: expected one column or two with a comma between, found {shortened(given[0])}")
    return DataSource(name, location, local, config or None, split, columns)


def _split_off_fields(source: str) -> tuple[str, list[str]]:
    """Tell a location, which may hold colons itself where it is there, from the fields behind it."""
    parts = source.split(":")
    for count in range(3):
        location = ":".join(parts[: len(parts) - count])
        if location and os.path.exists(location):
            return location, parts[len(parts) - count :]
    return parts[0], parts[1:]


def is_local(location: str, where: str) -> bool:
    """Tell whether a source is a file or folder; False for what may be a data set of the hub.

    Raises:
        UserError: it can only be a file or folder, and is not there; `where` is for the message.
    """
    if os.path.exists(location):
        return True
    if not _HUB_ID.fullmatch(location) or format_of(location) or looks_local(location):
        raise UserError(f"{where}: there is no file or folder {shortened(location)}")
    return False


def is_empty(value: Any) -> bool:
    """Tell whether there is nothing in a row's value."""
    return value is None or (isinstance(value, str) and not value.strip())


def has_empty(values: tuple[Any, ...]) -> bool:
    """Tell whether one of a sample's values is empty."""
    return any(map(is_empty, values))


class SourceReader:
    """An opened source: its columns are known, its rows are not read yet.

    Attributes:
        columns: the columns that a sample's values come from, one or two.
        labels: the names behind integer labels of the second column, if the data set has them.
        left_out: rows left out of the samples drawn last, as they are empty.
    """

    def __init__(self, source: DataSource, default_columns: tuple[str, ...]) -> None:
        """Open `source`.

        Args:
            source: what to open.
            default_columns: what a sample needs, by the names taken where the source names none: the first must be
                there, the second is left out where there is no such column.

        Raises:
            UserError: it cannot be opened, is empty, or has no such split or column.
        """
        self.source, self.left_out = source, 0
        self._table = self._open()
        found = tuple(dict.fromkeys(column for _, row in itertools.islice(self.rows(), _LOOKED_AT) for column in row))
        if not found:
            raise UserError(f"{self.label}: it is empty")
        self.columns = source.columns or tuple(column for column in default_columns if column in found)
        missing = [column for column in (self.columns or default_columns[:1]) if column not in found]
        if missing:
            raise UserError(f"{self.label}: there is no column {missing[0]!r} (there are: {listed(found, 20)})")
        self.labels: list[str] | None = self._table.labels.get(self.columns[-1])

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.source.role} {self.source.name!r} ({self.source.shown})"

    def samples(
        self,
        limit: int,
        seed: int,
        *,
        start: int = 0,
        stop: int | None = None,
        leave_out: Callable[[tuple[Any, ...]], bool] = has_empty,
    ) -> Iterator[Sample]:
        """Draw up to `limit` samples (0: all) in an order that depends on `seed` alone.

        The order is random within a buffer that is refilled as rows come in. Rows count from `start` to before `stop`,
        unless `leave_out` says that a sample's values are too empty, which by default they are if one is.
        """
        self.left_out = 0

        def kept() -> Iterator[tuple[int, tuple[Any, ...]]]:
            for row, columns in itertools.islice(self.rows(), start, stop):
                values = tuple(columns.get(column) for column in self.columns)
                for column, value in zip(self.columns, values, strict=True):
                    if isinstance(value, str) and len(value) > MOST_TEXT:
                        found = f"a text of {len(value)} characters, more than {MOST_TEXT}"
                        raise UserError(
                            f"{self.label}: column {column!r} of row {row} holds {found}; cut it into several samples"
                        )
                if leave_out(values):
                    self.left_out += 1
                else:
                    yield row, values

        drawn = shuffled(kept(), _PATHS_BUFFER if self._table.images else SHUFFLE_BUFFER, seed)
        for order, (row, values) in enumerate(itertools.islice(drawn, limit or None)):
            yield Sample(order, row, values)

    def _open(self) -> Table:
        source = self.source
        try:
            return open_table(Path(source.location), source.split) if source.local else _of_the_hub(source)
        except UserError as error:
            raise UserError(f"{self.label}: cannot open it: {error}") from None

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read all rows, in their order, with their numbers."""
        rows = self._table.rows()
        for number in itertools.count():
            try:
                row = next(rows)
            except StopIteration:
                return
            except UserError as error:
                raise UserError(f"{self.label}: cannot read on at row {number}: {error}") from None
            yield number, row


def _of_the_hub(source: DataSource) -> Table:
    """Open a data set of the hub, with its images as paths and bytes, for whoever needs them to decode."""
    import datasets

    if "/" not in source.location and hasattr(datasets.packaged_modules, source.location):
        raise UserError(f"{source.location!r} is no data set but a format; name a file")
    arguments: dict[str, Any] = {"path": source.location, "name": source.config, "split": source.split or "train"}
    with _raising_user_errors():
        rows = datasets.load_dataset(**arguments, streaming=True)
        for column, feature in (rows.features or {}).items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
    named = {column: getattr(feature, "names", None) for column, feature in (rows.features or {}).items()}

    def read() -> Iterator[dict[str, Any]]:
        with _raising_user_errors():
            yield from rows

    return Table(read, {column: names for column, names in named.items() if names})


@contextmanager
def _raising_user_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever datasets, fsspec, pyarrow and the network raise
        raise UserError(f"{type(error).__name__}: {first_line(error)}") from error


def shuffled(rows: Iterator[Any], size: int, seed: int) -> Iterator[Any]:
    """Draw the rows, each at random from the next `size` ones."""
    generator = random.Random(seed)
    buffer = list(itertools.islice(rows, size))
    generator.shuffle(buffer)
    for row in rows:
        place = generator.randrange(size)
        buffer[place], row = row, buffer[place]
        yield row
    yield from buffer
