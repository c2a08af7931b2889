"""Rows of local files, as a stream: their paths letter by letter, no line longer and no document larger than allowed.

A reader of others would take a bracket in a path for a pattern, `::` and `hf://` for addresses, and a line that
unpacks to gigabytes for one that fits into memory.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from neuron_methods.support.documents import MOST_JSON, MOST_LINE, open_file, parse_json
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import first_line, format_bytes, shortened

Row = dict[str, Any]

FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".text": "text",
}

_INFERRED = 10_000  # rows by which the columns of a CSV are told to be numbers or text
_OF_PARQUET = 64  # rows at a time
_AGAIN = "mend the file"
csv.field_size_limit(MOST_LINE)


def format_of(name: str) -> str | None:
    """Tell a file's format by its name; None for one that is not read."""
    return FORMATS.get(Path(name.removesuffix(".gz")).suffix.lower())


def rows_of(path: Path) -> Iterator[Row]:
    """Read a file's rows, in their order.

    Raises:
        UserError: it is no regular file, is damaged, or has a line or document that is too long.
    """
    shown, kind = shortened(path.name, quote=False), format_of(path.name)
    try:
        with open_file(path, shown) as raw:
            if not path.name.endswith(".gz"):
                yield from _READERS[str(kind)](raw, path, shown)
                return
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield from _READERS[str(kind)](unpacked, path, shown)  # type: ignore[arg-type]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{shown}: cannot be read ({first_line(error)}); {_AGAIN}") from None


def _lines(file: BinaryIO, shown: str) -> Iterator[tuple[int, str]]:
    """The lines and their numbers, from 1 on, without their ends."""
    number = 0
    while line := file.readline(MOST_LINE + 1):
        number += 1
        where = f"{shown}, line {number}"
        if len(line) > MOST_LINE:
            raise UserError(f"{where}: longer than {format_bytes(MOST_LINE)}; a line is a sample, cut it into several")
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8; save it as UTF-8") from None


def _json(file: BinaryIO, path: Path, shown: str) -> Iterator[Row]:
    """One object a line; in a `.json` also a list of objects, or one object over several lines."""
    if ".json" in path.suffixes:
        first = file.readline(MOST_LINE + 1).removeprefix(b"\xef\xbb\xbf").strip()
        file.seek(0)
        if first.startswith(b"[") or (first and not _parses(first)):
            yield from _document(file, shown)
            return
    for number, line in _lines(file, shown):
        if line.strip():
            where = f"{shown}, line {number}"
            yield _object(parse_json(line, where, _AGAIN), where)


def _parses(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _document(file: BinaryIO, shown: str) -> Iterator[Row]:
    text = file.read(MOST_JSON + 1)
    if len(text) > MOST_JSON:
        raise UserError(f"{shown}: larger than {format_bytes(MOST_JSON)} as one document; write one object a line")
    content = parse_json(text, shown, _AGAIN)
    for number, row in enumerate(content if isinstance(content, list) else [content]):
        yield _object(row, f"{shown}, row {number}")


def _object(content: Any, where: str) -> Row:
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected an object of columns, found {shortened(content)}; {_AGAIN}")
    return content


def _text(file: BinaryIO, path: Path, shown: str) -> Iterator[Row]:
    for _, line in _lines(file, shown):
        yield {"text": line}


def _csv(file: BinaryIO, path: Path, shown: str) -> Iterator[Row]:
    """Rows of a table; a column is of numbers where its first rows all are, and an empty cell is None."""
    tabs = ".tsv" in path.suffixes
    lines = (line + "\n" for _, line in _lines(file, shown))
    reader = csv.reader(lines, delimiter="\t" if tabs else ",", strict=True)
    try:
        head = next((row for row in reader if row), [])
        if len(set(head)) < len(head):
            twice = next(name for name in head if head.count(name) > 1)
            raise UserError(f"{shown}: two columns are called {shortened(twice)}; {_AGAIN}")
        first: list[list[str]] = []
        types: list[Callable[[str], Any]] | None = None
        for cells in reader:
            if not cells:
                continue
            where = f"{shown}, line {reader.line_num}"
            if len(cells) > len(head):
                raise UserError(f"{where}: {len(cells)} cells, but {len(head)} columns; {_AGAIN}")
            cells += [""] * (len(head) - len(cells))
            if types is not None:
                yield _converted(head, types, cells, where)
                continue
            first.append(cells)
            if len(first) == _INFERRED:
                types = _types(first, len(head))
                yield from (_converted(head, types, row, shown) for row in first)
        if types is None:
            types = _types(first, len(head))
            yield from (_converted(head, types, row, shown) for row in first)
    except csv.Error as error:
        raise UserError(f"{shown}, line {reader.line_num}: {first_line(error)}; {_AGAIN}") from None


def _whole(cell: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", cell):
        raise ValueError
    return int(cell)


def _real(cell: str) -> float:
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", cell):
        raise ValueError
    return float(cell)


def _truth(cell: str) -> bool:
    if cell.lower() not in ("true", "false"):
        raise ValueError
    return cell.lower() == "true"


def _types(rows: list[list[str]], width: int) -> list[Callable[[str], Any]]:
    def of_column(cells: Iterable[str]) -> Callable[[str], Any]:
        filled = [cell for cell in cells if cell]
        for convert in (_whole, _real, _truth) if filled else ():
            try:
                for cell in filled:
                    convert(cell)
            except ValueError:
                continue
            return convert
        return str

    return [of_column(row[place] for row in rows) for place in range(width)]


def _converted(head: list[str], types: list[Callable[[str], Any]], cells: list[str], where: str) -> Row:
    row: Row = {}
    for name, convert, cell in zip(head, types, cells, strict=True):
        try:
            row[name] = convert(cell) if cell else None
        except ValueError:
            raise UserError(
                f"{where}: column {shortened(name)}: the rows before hold no text, found {shortened(cell)}; {_AGAIN}"
            ) from None
    return row


def _parquet(file: BinaryIO, path: Path, shown: str) -> Iterator[Row]:
    opened = _opened_parquet(file, path, shown)
    try:
        for batch in opened.iter_batches(batch_size=_OF_PARQUET):
            yield from batch.to_pylist()
    except Exception as error:  # whatever pyarrow makes of a damaged file
        raise UserError(f"{shown}: cannot be read ({first_line(error)}); {_AGAIN}") from None


def _opened_parquet(file: BinaryIO, path: Path, shown: str) -> Any:
    import pyarrow.parquet

    if path.name.endswith(".gz"):
        content = file.read(MOST_JSON + 1)
        if len(content) > MOST_JSON:
            raise UserError(f"{shown}: unpacks to more than {format_bytes(MOST_JSON)}; unpack it first")
        file = io.BytesIO(content)
    try:
        return pyarrow.parquet.ParquetFile(file)
    except Exception as error:  # as above
        raise UserError(f"{shown}: cannot be read as parquet ({first_line(error)}); {_AGAIN}") from None


def label_names(path: Path) -> dict[str, list[str]]:
    """Read which names stand behind the integers of a parquet file's columns, as `datasets` notes them; else {}."""
    if format_of(path.name) != "parquet" or path.name.endswith(".gz"):
        return {}
    shown = shortened(path.name, quote=False)
    with open_file(path, shown) as file:
        noted = (_opened_parquet(file, path, shown).schema_arrow.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(noted)["info"]["features"] if noted else {}
        found = {column: kind.get("names") for column, kind in features.items() if isinstance(kind, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # a note that is none changes nothing
    return {k: v for k, v in found.items() if isinstance(v, list) and v and all(isinstance(name, str) for name in v)}


_READERS: dict[str, Callable[[BinaryIO, Path, str], Iterator[Row]]] = {
    "json": _json,
    "csv": _csv,
    "text": _text,
    "parquet": _parquet,
}
