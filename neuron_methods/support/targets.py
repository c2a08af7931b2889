"""What an output may replace: nothing that is read, nothing that we did not write, and what we wrote with --force.

A file of ours tells its format in its first bytes. A directory of ours holds a mark, a hidden JSON file that lists all
that was written into it; whatever else is there is somebody's own. Outputs of releases before there were marks are told
by their card, and by the names of all their files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from neuron_methods.support.documents import read_bytes, read_object
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import move_into_place, write_json

#: The mark of a directory that we wrote.
MARK = ".mergekit-neuron.json"
_FORMAT, _VERSION = "mergekit-neuron-output", 1
_HEAD = 4096  # bytes of a file that its kind is told by
_MOST_HEADER = 100 << 20  # of safetensors: as long as that format allows

# All that releases before the mark wrote. Their tokenizers' files are those of transformers, their modules' those of
# sentence-transformers.
_EARLIER = re.compile(
    r"(adapters/[^/]+/)?(README\.md|mergekit_config\.yml|(model|pytorch_model|adapter_model|router)[\w.-]*"
    r"\.(safetensors|bin|json)|(adapter_|routed_|generation_|preprocessor_|processor_|tokenizer_|"
    r"video_preprocessor_)?config\.json|enhancement\.json|tokenizer\.json|special_tokens_map\.json|added_tokens\.json|"
    r"vocab\.(json|txt)|merges\.txt|chat_template\.(json|jinja)|[\w.-]+\.(model|spm|tiktoken|codes)|modules\.json)"
    r"|config_sentence_transformers\.json|sentence_\w+_config\.json|normalizer\.json|tekken\.json"
    r"|report/[\w.-]+\.(json|html|png)|heads/[^/]+\.(json|safetensors)|additional_chat_templates/[^/]+\.jinja"
    r"|\d+_\w+/(config\.json|model\.safetensors|pytorch_model\.bin)"
)
_EARLIER_CARDS = ("README.md", "routed_config.json")

Recogniser = Callable[[Path], bool]


def check_target(out_path: str | os.PathLike[str], force: bool, inputs: Iterable[str | os.PathLike[str]] = ()) -> Path:
    """Make sure that a directory may be written, and where.

    Args:
        out_path: as the user gave it; a link stands for what it points to.
        force: whether an earlier output may be replaced.
        inputs: files and directories that are read.

    Returns:
        The absolute path of the directory to write.

    Raises:
        UserError: it exists, or replacing it would destroy something else than an earlier output.
    """
    target = _placed(out_path, str(out_path))
    if not os.path.lexists(target):
        return target
    for path in inputs:
        if target in (real := Path(os.path.realpath(path))).parents or target == real:
            raise UserError(f"{out_path}: is or holds {path}, which is read; choose another name")
    if not target.is_dir():
        raise UserError(f"{out_path}: exists and is not a directory; choose another name")
    if target in (here := Path.cwd()).parents or target == here:
        raise UserError(f"{out_path}: is or holds the current directory; choose another name")
    if not force:
        raise UserError(f"{out_path}: exists already; choose another name, or --force to replace it")
    refuse_foreign(target, out_path)
    return target


def refuse_within(place: Path, shown: str, inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse a directory to be filled bit by bit that is one of those that are read, or lies in one.

    Raises:
        UserError: naming which.
    """
    target = _placed(place, shown)
    for path in inputs:
        if os.path.isdir(path) and (real := Path(os.path.realpath(path))) in (target, *target.parents):
            raise UserError(
                f"{shown}: {'is' if real == target else 'lies in'} {path}, which is read; choose another place"
            )


def refuse_foreign(target: Path, shown: str | os.PathLike[str]) -> None:
    """Refuse to replace a directory that holds anything that we did not write; an empty one holds nothing.

    Raises:
        UserError: naming what it is.
    """
    if not any(target.iterdir()):
        return
    written = _written(target)
    if written is None:
        raise UserError(f"{shown}: no output of mergekit-neuron, so --force does not replace it; choose another name")
    for found in _entries(target):
        if not written(found):
            raise UserError(
                f"{shown}: {found} in it is not of mergekit-neuron's making, so --force does not replace it; move it "
                "away, or choose another name"
            )


def is_part(name: str) -> bool:
    """Tell whether a path within an output, or a directory above it, has the name of what a merge writes itself."""
    parts = name.split("/")
    return any(
        above == MARK or _EARLIER.fullmatch(above) is not None
        for above in ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
    )


def deliver(staging: Path, target: Path, force: bool) -> None:
    """Mark a finished directory as ours and move it into place; errors as in `refuse_foreign` and `move_into_place`."""
    mark(staging)
    if force and target.is_dir():  # something may have come into it meanwhile
        refuse_foreign(target, target)
    move_into_place(staging, target, force)


def mark(directory: Path) -> None:
    """Note in a directory of ours that all that is in it now was written by us."""
    files = sorted(name for name in _entries(directory) if name != MARK)
    write_json(directory / MARK, {"format": _FORMAT, "version": _VERSION, "files": files}, indent=1)


@contextmanager
def marking(directory: Path) -> Iterator[None]:
    """Note what the block writes into a directory of ours; in one that is not, nothing is noted."""
    before = set(_entries(directory))
    listed = _listed(directory)
    yield
    if listed is not None:
        files = sorted(listed | (set(_entries(directory)) - before))
        write_json(directory / MARK, {"format": _FORMAT, "version": _VERSION, "files": files}, indent=1)


def check_file(
    path: str | os.PathLike[str],
    shown: str,
    ours: Recogniser,
    force: bool,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> Path:
    """Make sure that a file may be written, and where.

    Args:
        path: as the user gave it; a link stands for what it points to.
        shown: what messages begin with: the option and the path.
        ours: whether an existing file is of the kind that is to be written.
        force: whether such a file may be replaced.
        inputs: files that are read, and directories that hold what is read.

    Returns:
        The absolute path of the file to write.

    Raises:
        UserError: it is read, exists and may not be replaced, or cannot be written.
    """
    target = _placed(path, shown)
    if target.is_dir():
        raise UserError(f"{shown}: a directory; name a file")
    for read in inputs:
        if os.path.realpath(read) == str(target) or (
            target.exists() and os.path.exists(read) and target.samefile(read)
        ):
            raise UserError(f"{shown}: is {read}, which is read; name another file")
    if os.path.lexists(target):
        if not target.is_file() or not (target.stat().st_size == 0 or ours(target)):
            raise UserError(f"{shown}: exists and is something else, which is not replaced; name another file")
        if not force:
            raise UserError(f"{shown}: exists already; name another file, or give --force to replace it")
    parent = next(p for p in target.parents if os.path.lexists(p))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{shown}: {parent} is no directory that can be written to; name another place")
    return target


def json_of(*formats: str) -> Recogniser:
    """Make the recogniser of JSON files of these formats, which they tell first."""
    return beginning_with(rf'\{{\s*"format":\s*"({"|".join(map(re.escape, formats))})"')


def beginning_with(pattern: str) -> Recogniser:
    """Make the recogniser of text files whose beginning matches a regular expression."""

    def recognise(path: Path) -> bool:
        try:
            with path.open("rb") as file:
                return re.match(pattern, file.read(_HEAD).decode(errors="replace")) is not None
        except OSError:
            return False

    return recognise


def safetensors_of(*formats: str) -> Recogniser:
    """Make the recogniser of safetensors files whose metadata tells one of these formats."""

    def recognise(path: Path) -> bool:
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length <= min(_MOST_HEADER, path.stat().st_size) else {}
            return header["__metadata__"]["format"] in formats
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False

    return recognise


def _placed(path: str | os.PathLike[str], shown: str) -> Path:
    """The absolute path that a user's means; raises UserError where there can be none of its name."""
    try:
        target = Path(os.path.realpath(path))
        os.lstat(target)
    except FileNotFoundError:
        return target
    except (OSError, ValueError) as error:  # too long a name, below a file, a null byte
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{shown}: cannot be written ({reason}); choose another name") from None
    return target


def _entries(directory: Path) -> list[str]:
    """All files within, by path, and all directories that hold nothing."""
    found = []
    for folder, folders, files in os.walk(directory):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        empty = [] if folders or files or folder == str(directory) else [""]
        found += [os.path.relpath(os.path.join(folder, name), directory) for name in (*files, *links, *empty)]
    return sorted(path.replace(os.sep, "/") for path in found)


def written_in(directory: Path) -> set[str]:
    """List the files within, by path, that a directory's mark says we wrote; none where it has no mark."""
    listed = _listed(directory)
    return set() if listed is None else listed | {MARK}


def _listed(directory: Path) -> set[str] | None:
    """The files that a directory's mark lists; None where it has none that is sound."""
    try:
        content = read_object(directory / MARK)
    except UserError:
        return None
    files = content.get("files")
    if content.get("format") != _FORMAT or not isinstance(files, list):
        return None
    return {name for name in files if isinstance(name, str)}


def _written(directory: Path) -> Callable[[str], bool] | None:
    """Tells whether we wrote a file within; None where the directory is not ours."""
    listed = _listed(directory)
    if listed is not None:
        return (listed | {MARK}).__contains__
    for name in _EARLIER_CARDS:
        try:
            if b"mergekit-neuron" in read_bytes(directory / name):
                return lambda path: _EARLIER.fullmatch(path) is not None
        except UserError:
            continue
    return None
