"""The files of a model's or an adapter's directory, looked at before any library reads them.

Nobody knows who made a directory. So each file in it that a library would open is a regular one, lies there or is
shared by the snapshots of its repository in the Hub's cache, and is what its name says. Names that stand in files are
names of what lies beside them, never paths.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neuron_methods.support.documents import MOST_JSON, Foreign, check_regular, read_object, validated
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import within
from neuron_methods.support.quiet import quiet_transformers
from neuron_methods.support.text import first_line, format_bytes, one_line, shortened

CONFIG_NAME, GENERATION_CONFIG = "config.json", "generation_config.json"
#: Folder of heads that go with a model, within its directory: NAME.safetensors, and the config to load it with.
HEADS = "heads"
# Configs that transformers and peft read along with a model, an adapter or a tokenizer.
_OF_PROCESSORS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_CONFIGS = (CONFIG_NAME, GENERATION_CONFIG, "adapter_config.json", *_OF_PROCESSORS)
_READ = (
    ".json",
    ".jinja",
    ".txt",
    ".model",
    ".spm",
    ".codes",
    ".tiktoken",
    ".tokenizer",
    ".safetensors",
    ".bin",
    ".py",
)
# What trainers and people put there, too, and nothing that loads a model opens.
_UNREAD = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state\w*|random_states\w*)\.bin"
    r"|(trainer_state|modelcard|.*results)\.json|(?!.*(token|vocab|merges|chat_template|dict|bpe)).*\.txt"
)
_AGAIN = "download or save the model again"

# Keys of a config whose numbers lead to a module each, to an entry of a list each, to a row or a column each. The
# largest models there are have 126 layers, 512 experts, 10^7 positions and 10^6 tokens.
_MODULES = re.compile(r".*(layers?|blocks?|depths?|stages?|experts?)")
_ENTRIES = re.compile(r".*(heads?|labels?|groups?|codebooks?|levels?|streams?|channels?)")
_SIZES = re.compile(
    r"(?!(.*_)?max_length).*(size|dim\w*|embd|length|positions?|embeddings|ctx|inner|width|hidden\w*|rank)|d_\w+"
)
_MOST_MODULES, _MOST_ENTRIES, _MOST_SIZE, _MOST_POSITIONS = 1000, 1_000_000, 2**31, 2**26


class ModelConfigFile(Foreign):
    """What is read of config.json before its class reads all of it."""

    model_type: str | None = None
    architectures: list[str] | None = None
    auto_map: dict[str, str | list[str | None] | None] | None = None
    quantization_config: dict[str, Any] | None = None
    tie_word_embeddings: bool | None = None
    id2label: dict[str, Any] | None = None
    label2id: dict[str, int | str] | None = None  # texts where one of transformers' own examples trained the model


class NamesCode(Foreign):
    """What is read of the other configs of a model: the custom code that they name."""

    auto_map: dict[str, str | list[str | None] | None] | list[str | None] | None = None


def read_model_config(config: Path, stored: int | None = None) -> dict[str, Any]:
    """Read a model's config.json, or another of its kind.

    Args:
        config: the file.
        stored: how many tensors the model has, where that is known.

    Raises:
        UserError: it cannot be read, a key is of a wrong type, or a number would take memory or time without end.
    """
    content = read_object(config, again=_AGAIN)
    validated(content, ModelConfigFile, str(config), _AGAIN)
    for key, value in _numbers(content):
        _check_size(key, value, stored or 0, str(config))
    return content


def _numbers(content: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """(key with those above it, number), of lists each; labels and quantisation are no sizes."""
    for key, value in content.items():
        if isinstance(value, Mapping) and key not in ("id2label", "label2id", "quantization_config"):
            yield from _numbers(value, f"{within}{key}.")
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, (int, float)) and not isinstance(entry, bool):
                yield f"{within}{key}", entry


def _check_size(key: str, value: float, stored: int, shown: str) -> None:
    name = key.rpartition(".")[2]
    if _MODULES.fullmatch(name):
        most = max(_MOST_MODULES, stored)
    elif _ENTRIES.fullmatch(name):
        most = _MOST_ENTRIES
    elif _SIZES.fullmatch(name):
        most = _MOST_POSITIONS if "position" in name else _MOST_SIZE
    else:
        return
    if not value <= most:  # NaN, too
        shown_key = shortened(key, quote=False)
        raise UserError(f"{shown}: {shown_key}: found {shortened(value)}, expected at most {most}; {_AGAIN}")


def check_files(place: str | os.PathLike[str], where: str) -> None:
    """Make sure that the files of a model, an adapter or a tokenizer are what a library expects to open.

    Args:
        place: its directory.
        where: how messages call it.

    Raises:
        UserError: one is no regular file, leads out of the directory, or is a config and no JSON object.
    """
    directory = Path(place)
    for name in sorted(os.listdir(directory)):
        file = directory / name
        if not name.endswith(_READ) or _UNREAD.fullmatch(name):
            continue
        check_regular(file)
        check_link(directory, name, where)
        if name in _CONFIGS:
            content = read_object(file, again=_AGAIN)
            validated(content, ModelConfigFile if name == CONFIG_NAME else NamesCode, str(file), _AGAIN)
        elif name.endswith(".json") and file.stat().st_size > MOST_JSON:
            raise UserError(f"{file}: {format_bytes(file.stat().st_size)} of JSON; no such file is as long")


def check_link(place: Path, name: str, where: str) -> None:
    """Make sure that a file lies in a model's directory, or is shared by the snapshots of its repository.

    Args:
        place: the directory; in the Hub's cache its files are links to those that snapshots share.
        name: of the file, within the directory.
        where: how messages call the model.

    Raises:
        UserError: it is a link that leads elsewhere.
    """
    try:
        within(place, name)
    except UserError as error:
        raise UserError(f"model {where}: {error}") from None


def beside(file: Path, named: str, key: str) -> Path:
    """Find what a name out of a file stands for: a regular file beside that one.

    Args:
        file: that holds the name.
        named: by it.
        key: where it stands, for messages.

    Raises:
        UserError: it is a path, leads out of the directory, or there is no such file.
    """
    if not named or named in (".", "..") or re.search(r"[/\\\0]", named) or os.path.isabs(named):
        raise UserError(f"{file}: {key}: {shortened(named)} is no name of a file beside it; {_AGAIN}")
    found = file.with_name(named)
    if not os.path.lexists(found):
        raise UserError(f"{found}: no such file, but {file.name} names it ({key}); {_AGAIN}")
    check_regular(found)
    check_link(file.parent, named, str(file.parent))
    return found


@contextmanager
def foreign_reading(what: str, *passing: type[Exception]) -> Iterator[None]:
    """Let a library read others' files within the block; whatever it raises of them is a UserError.

    Args:
        what: could not be done, and of which file: "model base: cannot load its tokenizer".
        *passing: errors that mean something to the caller.

    Raises:
        UserError: with the reason that the library gives.
    """
    try:
        with quiet_transformers():
            yield
    except (UserError, *passing):
        raise
    except Exception as error:  # whatever the library makes of foreign values
        raise UserError(f"{what}: {_reason(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of tokenizers and safetensors, which are written in Rust
            raise
        raise UserError(f"{what}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The library's words, with what kind of error it is where they may be nothing but the value that was wrong."""
    words = one_line(error) if isinstance(error, (OSError, ValueError, ImportError)) else first_line(error)
    if words.endswith(":"):  # what is wrong stands on the lines below it
        words = one_line(error)
    kind = type(error).__name__
    if not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)) and words != kind:
        words = f"{kind}: {words}"
    return "".join(c if c.isprintable() else "?" for c in words[:500]) or kind
