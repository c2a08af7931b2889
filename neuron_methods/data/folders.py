"""Local sources as tables: one file, a folder with the files of a data set, or a folder of images.

Splits are told by names, as `datasets` tells them: ``data/SPLIT-00000-of-00001.*``, else words such as ``train``,
``dev`` and ``test`` in folders, else in names of files; where there are none, all is ``train``. The `configs` of a
README go before names. Nothing in a folder is run, and what a README names is looked for in the folder alone.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from neuron_methods.data.files import FORMATS, Row, format_of, label_names, rows_of
from neuron_methods.support.documents import Foreign, front_matter, read_text, validated
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import listed, shortened

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_NO_DATA = ("README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_SHARD = re.compile(r"data/(?P<split>\w+(\.\w+)*)-[0-9]{5}-of-[0-9]{5}.*\..*")
_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}


@dataclass(frozen=True)
class Table:
    """Rows that can be read again and again.

    Attributes:
        rows: begins to read them.
        labels: column -> the names behind its integers, where they are known.
        images: whether it is a folder of images, whose rows are small.
    """

    rows: Callable[[], Iterator[Row]]
    labels: dict[str, list[str]] = field(default_factory=dict)
    images: bool = False


def open_table(path: Path, split: str | None) -> Table:
    """Open a local source.

    Args:
        path: file or folder, letter by letter.
        split: None: ``train``, which is the only one that a file has.

    Raises:
        UserError: its kind is unknown, or there is nothing of this split.
    """
    if path.is_dir():
        return _folder(path, split or "train")
    if format_of(path.name) is None:
        raise UserError(f"the kind of this file is unknown (known: {', '.join(FORMATS)}, and folders)")
    if split not in (None, "train"):
        raise UserError(f"a file has no split {split!r}; leave it away")
    return Table(lambda: rows_of(path), label_names(path))


def _folder(folder: Path, split: str) -> Table:
    names = [name for name in _files_below(folder) if format_of(name) or _is_image(name)]
    if not names:
        raise UserError(f"no files in it that are read ({listed([*FORMATS, *IMAGES], 20)})")
    # The first file that is no metadata tells what the folder is.
    images = _is_image(next((name for name in names if Path(name).name not in _METADATA), ""))
    if images:
        names = [name for name in names if _is_image(name) or Path(name).name in _METADATA]
    else:
        names = [name for name in names if not _is_image(name)]
        usual = Counter(map(format_of, names)).most_common(1)[0][0]
        names = [name for name in names if format_of(name) == usual]
    splits = _configured(folder, names) or _named(names)
    if split not in splits:
        raise UserError(f"there is no split {split!r} (there are: {listed(list(splits), 9)})")
    if images:
        return _images(folder, names, splits[split])
    files = [folder / name for name in splits[split]]
    return Table(lambda: (row for file in files for row in rows_of(file)), label_names(files[0]))


def _files_below(folder: Path) -> list[str]:
    """Names of all files, seen from the folder, but for hidden ones; a link to a folder is followed once."""
    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")) and real not in seen)
        if real not in seen:
            names = (name for name in files if not name.startswith((".", "__")) and name not in _NO_DATA)
            found += [Path(place, name).relative_to(folder).as_posix() for name in names]
        seen.add(real)
    return sorted(found)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGES)


def _named(names: list[str]) -> dict[str, list[str]]:
    """Tell files apart into splits by their names."""
    shards: dict[str, list[str]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            shards.setdefault(match["split"], []).append(name)
    if shards:
        return shards
    for part_of in (lambda name: name.split("/")[:-1], lambda name: [name.split("/")[-1]]):
        found: dict[str, list[str]] = {}
        for split, words in _WORDS.items():
            of_split = [n for n in names if any(words & set(re.split(r"[-._ 0-9]+", part)) for part in part_of(n))]
            if of_split:
                found[split] = of_split
        if found:
            return found
    return {"train": names}


class _Files(Foreign):
    split: str = "train"
    path: str | list[str]


class _Config(Foreign):
    config_name: str = "default"
    data_files: str | list[str] | list[_Files] | None = None


class _Readme(Foreign):
    configs: list[_Config] = Field(default_factory=list)


def _configured(folder: Path, names: list[str]) -> dict[str, list[str]]:
    """Tell files apart into splits as the README says, {} where it says nothing."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    content = front_matter(read_text(readme), "README.md")
    if "configs" not in content:
        return {}
    configs = [c for c in validated(content, _Readme, "README.md", "mend it, or name a file").configs if c.data_files]
    if len(configs) > 1:
        configs = [config for config in configs if config.config_name == "default"]
        if not configs:
            raise UserError("its README.md has several configurations; name a file or a folder within")
    found: dict[str, list[str]] = {}
    for config in configs:
        given = config.data_files
        for files in [given] if isinstance(given, str) else given or []:
            split, paths = (files.split, files.path) if isinstance(files, _Files) else ("train", files)
            for pattern in [paths] if isinstance(paths, str) else paths:
                found.setdefault(split, []).extend(n for n in names if _fits(n, pattern))
    found = {split: list(dict.fromkeys(files)) for split, files in found.items() if files}
    if configs and not found:
        raise UserError("the data_files of its README.md name nothing in the folder; mend it, or name a file")
    return found


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern.removeprefix("./").replace("**/", "*"))


def _images(folder: Path, names: list[str], of_split: list[str]) -> Table:
    """Images with what metadata say of them, or with their sub-folders as labels where there are several."""
    pictures = [name for name in names if _is_image(name)]
    metadata = [name for name in of_split if not _is_image(name)]
    if metadata:
        return Table(lambda: _described(folder, metadata, set(pictures)), images=True)
    own = [name for name in of_split if _is_image(name)]
    labels = sorted({Path(name).parent.name for name in pictures})
    if len(labels) < 2 or len({name.count("/") for name in pictures}) > 1:
        return Table(lambda: iter([{"image": _picture(folder, name)} for name in own]), images=True)
    place = {label: number for number, label in enumerate(labels)}

    def labelled() -> Iterator[Row]:
        for name in own:
            yield {"image": _picture(folder, name), "label": place[Path(name).parent.name]}

    return Table(labelled, {"label": labels}, images=True)


def _described(folder: Path, metadata: Iterable[str], pictures: set[str]) -> Iterator[Row]:
    for name in metadata:
        for number, row in enumerate(rows_of(folder / name)):
            file = row.pop("file_name", None)
            picture = str(Path(name).parent / file) if isinstance(file, str) else ""
            if picture not in pictures:
                where = f"{shortened(name, quote=False)}, row {number}"
                raise UserError(f"{where}: file_name {shortened(file)} is no image of the folder")
            yield {"image": _picture(folder, picture), **row}


def _picture(folder: Path, name: str) -> dict[str, Any]:
    return {"path": str(folder / name), "bytes": None}
