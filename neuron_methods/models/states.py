"""What a model's directory holds now: the files that it is made of, to notice that one has changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from typing import Any

from neuron_methods.support.fingerprints import Watch, content_digest, file_state, tree_state

# Weights, configs and tokenizers; what lies there beside, such as scores and cards, is no part of the model.
_OF_MODEL = re.compile(
    r".*\.(safetensors|bin|py|jinja|model|spm|tiktoken|codes)|.*(config|index|tokenizer|tokens_map|tokens|vocab|modules)"
    r"\.json|(vocab|merges|dict)[\w.-]*\.txt"
)


def model_files(directory: str | os.PathLike[str]) -> list[str]:
    """List the files of a model's or an adapter's directory that it is made of, by their paths."""
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries if _OF_MODEL.fullmatch(entry.name) and entry.is_file())
    return [os.path.join(directory, name) for name in names]


def watched(paths: Iterable[str | os.PathLike[str]]) -> Watch:
    """Watch files and directories that a command reads; of a model's directory those files that it is made of."""
    found: list[str] = []
    for path in map(os.fspath, paths):
        is_model = any(os.path.isfile(os.path.join(path, name)) for name in ("config.json", "adapter_config.json"))
        found += model_files(path) if is_model else [path]
    return Watch(dict.fromkeys(found), tree_state)


def weights_digest(*directories: str | os.PathLike[str]) -> str:
    """Digest the weights in directories; of copies, wherever they are, it is the same. "" where there are none."""
    files = [file for place in directories for file in model_files(place) if file.endswith((".safetensors", ".bin"))]
    found = [[os.path.basename(file), content_digest(file)] for file in files]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] if found else ""


def model_state(directory: str | os.PathLike[str]) -> list[Any]:
    """Say what a model's or an adapter's directory holds: file by file its name and state; for JSON."""
    return [[os.path.basename(file), file_state(file)] for file in model_files(directory)]
