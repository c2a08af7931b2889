"""What of a directory is uploaded: its files as they are, but for paths of this machine, which stay here."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml

from neuron_methods.plugin.configuration import read_configuration
from neuron_methods.plugin.merging import CONFIG_NAME
from neuron_methods.sharing.card import with_model_id
from neuron_methods.sharing.licences import front_matter
from neuron_methods.sharing.model_names import ModelNames, is_hub_id, reduced_json, reduced_yaml
from neuron_methods.sharing.routed_card import make_routed_card
from neuron_methods.sharing.snippets import ROUTED_CONFIG
from neuron_methods.support.errors import UserError

# Large files of tokenizers, which hold no paths.
_PLAIN = ("tokenizer.json", "vocab.json", "added_tokens.json")
_ADAPTER_CONFIG = "adapter_config.json"


def known_hub_ids(place: Path) -> Collection[str] | None:
    """The ids of the Hub that the directory's card names as its models; None where it has no card.

    Whether `a/b` was a directory or a repository is known where the merge ran; the card is the record of it.
    """
    try:
        content = front_matter((place / "README.md").read_text(encoding="utf-8"))
    except OSError:
        return None
    named = content.get("base_model") or []
    return {named} if isinstance(named, str) else {str(name) for name in named}


@contextmanager
def upload_copy(place: Path, repository: str, base_model: str | None = None) -> Iterator[Path]:
    """A directory with links to the files of `place`, and copies of those that name paths of this machine.

    Args:
        place: what to upload; it is not changed.
        repository: the id it will have, for the lines of the card that load it.
        base_model: id of the Hub of an adapter's base, where the adapter names it by a local path.

    Yields:
        The directory; it is gone after the block.

    Raises:
        UserError: an adapter's base is not to be found by others, or `base_model` goes with no adapter.
    """
    check_base(place, base_model)
    labels = _local_labels(place)
    with tempfile.TemporaryDirectory(prefix="mergekit-neuron-upload-") as temporary:
        copy = Path(temporary)
        for file in sorted(place.rglob("*")):
            relative = file.relative_to(place)
            if not file.is_file() or any(part.startswith(".") for part in relative.parts):
                continue
            target = copy / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            text = _changed(file, relative, repository, labels, base_model)
            if text is None:
                os.symlink(file.resolve(), target)
            else:
                target.write_text(text, encoding="utf-8")
        if (place / ROUTED_CONFIG).exists() and not (copy / "README.md").exists():
            named = base_model or str(_read(place / ROUTED_CONFIG)["base_model"])
            card = make_routed_card(place, repository.partition("/")[2], named)
            (copy / "README.md").write_text(with_model_id(card, repository), encoding="utf-8")
        yield copy


def check_base(place: Path, base_model: str | None) -> None:
    """Make sure that a base is named where one is needed, and only there.

    Raises:
        UserError: a routed model's base is a directory of this machine, or `base_model` goes with a whole model.
    """
    if (place / ROUTED_CONFIG).exists():
        named = str(_read(place / ROUTED_CONFIG).get("base_model") or ".")
        if base_model is None and (named.startswith(".") or os.path.isabs(named)):
            raise UserError(
                f"{place}: its base is a local directory, which nobody else has; give the id it has on the Hub with "
                "--base-model"
            )
    elif base_model is not None and not (place / _ADAPTER_CONFIG).exists():
        raise UserError(f"--base-model: {place} is no adapter and no routed model, it needs no base")


def unloadable_base(place: Path, base_model: str | None = None) -> str | None:
    """What to tell the user of an adapter whose base others cannot find by the name it gives; None if they can."""
    file = place / _ADAPTER_CONFIG
    if base_model is not None or not file.exists():
        return None
    named = str(_read(file).get("base_model_name_or_path") or "")
    if is_hub_id(named, known_hub_ids(place)):
        return None
    return (
        "its base is a local directory, which nobody else has: give the id it has on the Hub with --base-model, or "
        "those who load the adapter must know it"
    )


def _changed(file: Path, relative: Path, repository: str, labels: dict[str, str], base_model: str | None) -> str | None:
    """New text of a file; None where it stays as it is."""
    if relative == Path("README.md"):
        text = with_model_id(file.read_text(encoding="utf-8"), repository)
        return _with_base(text, base_model) if base_model else text
    if relative.name == CONFIG_NAME:
        source = file.read_text(encoding="utf-8")
        try:
            configuration = read_configuration(source)
        except UserError:
            raise UserError(f"{file}: no merge configuration, and may name paths of this machine; remove it") from None
        return reduced_yaml(source, ModelNames(configuration, known_hub_ids(file.parent)))
    if relative.suffix != ".json" or relative.name in _PLAIN or relative.name.endswith(".index.json"):
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    reduced = reduced_json(content, labels)
    key = {_ADAPTER_CONFIG: "base_model_name_or_path", ROUTED_CONFIG: "base_model"}.get(relative.name)
    if base_model is not None and key is not None and isinstance(reduced, dict):
        reduced[key] = base_model
    return None if reduced == content else json.dumps(reduced, indent=2, ensure_ascii=False) + "\n"


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{file}: cannot be read as JSON") from None
    return content if isinstance(content, dict) else {}


def _with_base(card: str, base_model: str) -> str:
    content = huggingface_hub.ModelCard(card, ignore_metadata_errors=True)
    content.data.base_model = base_model
    content.data.base_model_relation = "adapter"
    return str(content)


def _local_labels(place: Path) -> dict[str, str]:
    """Local paths of the merge's models -> their names; {} where no YAML tells."""
    try:
        configuration = read_configuration((place / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, UserError, yaml.YAMLError):
        return {}
    names = ModelNames(configuration, known_hub_ids(place))
    return {path: label for path, label in names.labels.items() if not names.is_hub(path)}
