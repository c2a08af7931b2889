"""What belongs to a model beside its config and weights: tokenizers, templates, processors, pooling modules, code.

Kinds of files are told by their endings, which are those of the files that transformers' tokenizers and processors and
sentence-transformers' modules read, and JSON and text by their names, too: called otherwise, it may be anybody's notes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from neuron_methods.models.model_files import NamesCode, beside, check_link
from neuron_methods.support.documents import read_object, validated
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_json

_ENDINGS = (".json", ".jinja", ".txt", ".model", ".spm", ".codes", ".tiktoken", ".tokenizer")
_OF_TOKENIZERS = re.compile(
    r"tokenizer|(added|special)_tokens|vocab|merges|chat_template|^dict\.|bpe|^(normalizer|emoji|byte_maps|word_\w+)\.json$|\.(?!json$|txt$)[^.]+$"
)
# Of a model and no tokenizer, in JSON.
_OF_MODELS = re.compile(r"config|processor|modules|label|speaker")
# What only says how a tokenizer is used.
_ABOUT_TOKENIZERS = re.compile(r"chat_template.*|special_tokens_map\.json")
_NOT = re.compile(r"(config|adapter_config|data_config|trainer_state|modelcard|.*(\.index|results))\.json")
_NAMING_CODE = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_TEMPLATES, _MODULES = "additional_chat_templates", "modules.json"


def companions(names: Iterable[str], *, code: bool = False) -> list[str]:
    """Choose the files that go with a model into whatever is made of it.

    Args:
        names: paths within the model's directory or repository, with slashes.
        code: whether custom code goes, too.
    """
    names = sorted(names)
    # sentence-transformers numbers the folders of its modules: 1_Pooling.
    folders = re.compile(rf"{_TEMPLATES}|\d+_\w+" if _MODULES in names else _TEMPLATES)
    return [
        name
        for name in names
        if (folders.fullmatch(name.partition("/")[0]) if "/" in name else _is_companion(name, code))
    ]


def _is_companion(name: str, code: bool) -> bool:
    if name.endswith(".py"):
        return code
    if not name.endswith(_ENDINGS) or _NOT.fullmatch(name):
        return False
    return is_of_tokenizer(name) or (name.endswith(".json") and _OF_MODELS.search(name) is not None)


def is_of_tokenizer(name: str) -> bool:
    """Tell whether a companion is a part of the tokenizer, templates included."""
    return name.startswith(_TEMPLATES) if "/" in name else _OF_TOKENIZERS.search(name) is not None


def makes_tokenizer(name: str) -> bool:
    """Tell whether a companion is what a tokenizer is made of, and not only how it is used."""
    return "/" not in name and is_of_tokenizer(name) and _ABOUT_TOKENIZERS.fullmatch(name) is None


def companions_of(place: Path, where: str) -> list[str]:
    """List the companions in a model's directory but for code, by their paths within it.

    Args:
        place: the directory; in the Hub's cache its files are links to those that snapshots share.
        where: how messages call the model.

    Raises:
        UserError: one is a link to what is not the model's.
    """
    numbered = [path for path in place.iterdir() if re.match(r"\d+_", path.name) or path.name == _TEMPLATES]
    files = [file for folder in numbered for file in folder.rglob("*") if file.is_file()]
    files += [path for path in place.iterdir() if path.is_file()]
    found = companions(file.relative_to(place).as_posix() for file in files)
    for name in found:
        check_link(place, name, where)
    return found


def names_code(config: Path) -> bool:
    """Tell whether a config, if it is there, names custom code."""
    return config.is_file() and bool(_auto_map(config))


def code_files(place: Path, where: str) -> list[str]:
    """List the files of custom code that a model's configs name under `auto_map`, with what these import.

    Args:
        place: the model's directory.
        where: how messages call the model.

    Raises:
        UserError: one is missing, or is a link to what is not the model's.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    found: dict[str, None] = {}
    for config in filter(names_code, (place / name for name in _NAMING_CODE)):
        for reference in _references(_auto_map(config)):
            if "--" in reference:
                continue  # code of another repository, which transformers finds there
            name = reference.partition(".")[0] + ".py"
            if not (place / name).is_file():
                raise UserError(f"model {where}: {config.name}: auto_map names {reference}, but there is no {name}")
            beside(config, name, "auto_map")
            try:
                imported = get_relative_import_files(place / name)
            except FileNotFoundError as error:
                raise UserError(f"model {where}: {name} imports {error.filename}, which is not there") from None
            found |= {name: None, **{os.path.relpath(file, place): None for file in imported}}
    for name in found:
        check_link(place, name, where)
    return list(found)


def settle_code(out: Path, source: Path, *, code: bool) -> list[str]:
    """Let the configs beside weights name the custom code that lies there too, and no other.

    transformers names the repository in the configs of what it got from the Hub.

    Args:
        out: directory with a model that was made of another.
        source: that one's directory.
        code: whether its code has gone along.

    Returns:
        What was changed, in words.
    """
    notes = []
    for config in filter(names_code, (out / name for name in _NAMING_CODE)):
        content = read_object(config)
        if not code:
            del content["auto_map"]
            notes.append(f"auto_map of {config.name} is left out: the code goes along with --trust-remote-code only")
        elif (source / config.name).is_file():
            content["auto_map"] = _auto_map(source / config.name) or content["auto_map"]
        write_json(config, content, indent=2)
    return notes


def _auto_map(config: Path) -> Any:
    """The custom code that a config names; None where it names none."""
    content = read_object(config, again="download or save the model again")
    return validated(content, NamesCode, str(config), "download or save the model again").auto_map


def _references(auto_map: Any) -> Iterator[str]:
    for value in auto_map.values() if isinstance(auto_map, dict) else ():
        yield from (text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str))
