"""What models are called where others read it: repositories of the Hub by id, local directories by a short name.

A path of this machine says nothing to others and may say too much, and `experts/math` on a card would pass for a
repository. So whatever is uploaded shows of a local path only the last component that tells it from the others, and
in a YAML with `./` before it, which no repository's id begins with.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping

import yaml
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration

from neuron_methods.models.reference import looks_local
from neuron_methods.plugin.seam import models_in_order
from neuron_methods.sharing.card_sections import code
from neuron_methods.support.local_names import components, local_names

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# How a local path begins, of any system.
_BEGINS = r"file:/{1,3}|~[\w-]*[\\/]|[A-Za-z]:[\\/]|\.\.[\\/]"
# In running text a part of it may hold spaces where another follows in the line.
_PART, _LAST = r"(?:[^/\\\n'\"`<>|,;#]*(?<!:)[/\\])", r"[^\s'\"#,;()\[\]{}<>`|]*"
_ABSOLUTE = re.compile(rf"(?<![\w:/.\\}}])(?:(?:{_BEGINS}){_PART}*|/{_PART}+){_LAST}")
_WHOLE = re.compile(rf"(?:{_BEGINS}|\\\\|/[^\n]*[/\\])[^\n]*")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]")


def is_hub_id(path: str, known: Collection[str] | None = None) -> bool:
    """Tell whether a model's path in a YAML names a repository of the Hub.

    Args:
        path: as the YAML has it, without revision.
        known: the ids among the merge's models, where that is on record; else a path that exists here is local.
    """
    if looks_local(path) or _WINDOWS.match(path) or not _HUB_ID.fullmatch(path):
        return False
    return path in known if known is not None else not os.path.exists(path)


def parts_of(models: Iterable[ModelReference]) -> list[ModelPath]:
    """List models and adapters, each once, in order."""
    return list(dict.fromkeys(part for m in models for part in (m.model, m.lora) if part is not None))


class ModelNames:
    """What each model of a merge is called.

    Attributes:
        hub: ids of the Hub among the models' paths, base first.
        labels: path -> id or short name.
    """

    def __init__(self, configuration: MergeConfiguration, known: Collection[str] | None = None) -> None:
        """Name the models; `known` as in `is_hub_id`."""
        paths = list(dict.fromkeys(part.path for part in parts_of(models_in_order(configuration))))
        self.hub = [path for path in paths if is_hub_id(path, known)]
        self.labels = {path: path for path in self.hub}
        self.labels |= local_names(path for path in paths if path not in self.labels)

    def is_hub(self, path: str) -> bool:
        """Tell whether a path is a repository."""
        return path in self.hub

    def of(self, model: ModelReference) -> str:
        """Name a model in running text and figures; an adapter goes by its own name."""
        return self.labels[(model.lora or model.model).path]

    def markdown(self, model: ModelReference) -> str:
        """Name a model on a card: linked where it is a repository, marked as local where it is not."""
        return " + ".join(
            f"[{part.path}](https://huggingface.co/{part.path})"
            if self.is_hub(part.path)
            else f"{code(self.labels[part.path])} (a local directory)"
            for part in parts_of([model])
        )


def reduced_yaml(source: str, names: ModelNames) -> str:
    """Cut down every local path of a YAML, in its comments, too; its order and layout stay.

    Args:
        source: text of a merge configuration.
        names: of its models.
    """
    pieces: list[str] = []
    end = 0
    for token in yaml.scan(source):
        if isinstance(token, yaml.ScalarToken):
            pieces.append(reduced_text(source[end : token.start_mark.index], names.labels))
            text = source[token.start_mark.index : token.end_mark.index]
            new = reduced_value(token.value, names)
            if token.style in ("|", ">"):
                text = reduced_text(text, names.labels)
            elif new != token.value:  # in quotes a value may be spelled otherwise
                text = new if token.plain else json.dumps(new, ensure_ascii=False)
            pieces.append(text)
            end = token.end_mark.index
    pieces.append(reduced_text(source[end:], names.labels))
    return "".join(pieces)


def reduced_value(value: str, names: ModelNames) -> str:
    """Cut the local paths in a value of the YAML down to `./name`."""
    parts = [part.partition("@") for part in value.split("+")]
    if value in names.labels and not names.is_hub(value):
        return f"./{names.labels[value]}"
    if all(path in names.labels for path, _, _ in parts):
        return "+".join(
            path + at + revision if names.is_hub(path) else f"./{names.labels[path]}" for path, at, revision in parts
        )
    if _WHOLE.fullmatch(value):
        return f"./{_last(value)}"
    if not re.search(r"[\n ]", value) and re.search(r"[/\\]", value):
        return f"./{_last(value)}" if looks_local(value) or os.path.exists(value) else value
    return reduced_text(value, names.labels)


def reduced_text(text: str, labels: Mapping[str, str] | None = None) -> str:
    """Cut local paths in free text, such as comments, down to their last component; `labels` as in `reduced_json`."""
    for path in sorted(labels or (), key=len, reverse=True):
        if labels and labels[path] != path and re.search(r"[/\\]", path):
            text = text.replace(path, labels[path])
    return _ABSOLUTE.sub(lambda match: _last(match.group()), text)


def reduced_json(content: object, labels: Mapping[str, str] | None = None, *, running: bool = True) -> object:
    """Cut every local path in the strings of a JSON document down to its name.

    Args:
        content: as parsed.
        labels: path -> name of paths that do not look local by themselves.
        running: whether paths are looked for within strings, too, and not only where a string is one.
    """
    if isinstance(content, dict):
        return {
            reduced_json(key, labels, running=running): reduced_json(value, labels, running=running)
            for key, value in content.items()
        }
    if isinstance(content, list):
        return [reduced_json(value, labels, running=running) for value in content]
    if isinstance(content, str) and len(content) < 4096 and "\n" not in content:
        if labels and content in labels:
            return labels[content]
        if _WHOLE.fullmatch(content):
            return _last(content)
        return reduced_text(content, labels) if running else content
    return content


def _last(path: str) -> str:
    return components(re.sub(r"^file:/*", "/", path))[-1]
