"""What models are called where others read it: repositories of the Hub by id, local directories by a short name.

A path of this machine says nothing to others and may say too much, and `experts/math` on a card would pass for a
repository. So whatever is published shows of a local path only the last component that tells it from the others, and
in a YAML with `./` before it, which no repository's id begins with.
"""

from __future__ import annotations

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
_ABSOLUTE = re.compile(r"(?<![\w:/.])(?:~|[A-Za-z]:\\|/)[^\s'\"#,;()\[\]{}<>]*[/\\][^\s'\"#,;()\[\]{}<>]*")
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
    """Cut down every local path of a YAML; its order, comments and layout stay.

    Args:
        source: text of a merge configuration.
        names: of its models.
    """
    pieces: list[str] = []
    end = 0
    for token in yaml.scan(source):
        if isinstance(token, yaml.ScalarToken):
            pieces.append(reduced_text(source[end : token.start_mark.index]))
            text = source[token.start_mark.index : token.end_mark.index]
            pieces.append(text.replace(token.value, reduced_value(token.value, names)) if token.value else text)
            end = token.end_mark.index
    pieces.append(reduced_text(source[end:]))
    return "".join(pieces)


def reduced_value(value: str, names: ModelNames) -> str:
    """Cut the local paths in a value of the YAML down to `./name`."""
    parts = [part.partition("@") for part in value.split("+")]
    if all(path in names.labels for path, _, _ in parts):
        return "+".join(
            path + at + revision if names.is_hub(path) else f"./{names.labels[path]}" for path, at, revision in parts
        )
    if not re.search(r"[\n ]", value) and re.search(r"[/\\]", value):
        reads_local = looks_local(value) or bool(_WINDOWS.match(value)) or os.path.exists(value)
        return f"./{components(value)[-1]}" if reads_local else value
    return reduced_text(value)


def reduced_text(text: str) -> str:
    """Cut absolute paths in free text, such as comments, down to their last component."""
    return _ABSOLUTE.sub(lambda match: components(match.group())[-1], text)


def reduced_json(content: object, labels: Mapping[str, str] | None = None) -> object:
    """Cut every string of a JSON document that is a local path down to its name.

    Args:
        content: as `json.loads` gives it.
        labels: path -> name of paths that do not look local by themselves.
    """
    if isinstance(content, dict):
        return {key: reduced_json(value, labels) for key, value in content.items()}
    if isinstance(content, list):
        return [reduced_json(value, labels) for value in content]
    if isinstance(content, str):
        if labels and content in labels:
            return labels[content]
        if len(content) < 4096 and "\n" not in content and " " not in content and _is_absolute(content):
            return components(content)[-1]
    return content


def _is_absolute(text: str) -> bool:
    rooted = text.startswith(("/", "~/")) or bool(_WINDOWS.match(text))
    return rooted and len(components(text)) + (not text.startswith("/")) >= 2
