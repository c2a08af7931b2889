"""What of a directory is uploaded: its files as they are, but for paths of this machine, which stay here."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from neuron_methods.models.companions import code_files, companions, is_of_tokenizer
from neuron_methods.models.headers import weight_files
from neuron_methods.plugin.configuration import read_configuration
from neuron_methods.plugin.run import CONFIG_NAME
from neuron_methods.routing.routed_files import CONFIG_NAME as ROUTED_CONFIG
from neuron_methods.routing.routed_files import RoutedConfig, is_routed
from neuron_methods.sharing.card import parsed_card, with_model_id
from neuron_methods.sharing.licences import metadata_of
from neuron_methods.sharing.model_names import ModelNames, is_hub_id, reduced_json, reduced_text, reduced_yaml
from neuron_methods.sharing.routed_card import make_routed_card
from neuron_methods.support.documents import parse_json, read_object, read_text
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import within
from neuron_methods.support.targets import MARK

# Large files of tokenizers, which hold no paths.
_PLAIN = ("tokenizer.json", "vocab.json", "added_tokens.json")
_ADAPTER_CONFIG, _CONFIG = "adapter_config.json", "config.json"
# What we write, and what else is of a model and no companion.
_PARTS = re.compile(
    r"README\.md|mergekit_config\.yml|((generation|adapter|routed)_)?config\.json|\.gitattributes"
    r"|(adapter_model|router)\.safetensors|model\.safetensors\.index\.json"
    r"|(LICEN[CS]E|NOTICE|USE_POLICY)(\.(md|txt))?"
    r"|report/[\w.-]+\.(html|json|png)|heads/[^/]+\.(json|safetensors)|biases/[^/]+\.safetensors"
    r"|adapters/[^/]+/(adapter_config\.json|adapter_model\.safetensors)"
)
#: What to say of a routed model whose base nobody else can find; of a directory or a YAML.
LOCAL_BASE = "{}: its base is a local directory, which nobody else has; give the id it has on the Hub with --base-model"


def known_hub_ids(place: Path) -> Collection[str] | None:
    """Read the ids of the Hub that the directory's card names as its models; None where it has no card.

    Whether `a/b` was a directory or a repository is known where the merge ran; the card is the record of it.
    """
    if not (place / "README.md").is_file():
        return None
    named = metadata_of(place / "README.md").get("base_model")
    return {name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)}


def files_to_upload(place: Path, include: Collection[str] = ()) -> tuple[list[Path], list[Path]]:
    """Choose the files of a directory that make the model, the adapter or the routed model in it.

    Args:
        place: the directory, verified.
        include: globs of what is to be uploaded, too; by paths within the directory.

    Returns:
        Their paths within the directory, and those of all others but the mark of what was written here.

    Raises:
        UserError: one that is chosen is a link to what is not the model's, or `include` fits nothing.
    """
    files = sorted(file.relative_to(place) for file in place.rglob("*") if file.is_file() and file.name != MARK)
    names = [file.as_posix() for file in files]
    wanted = {*companions(names), *(name for name in names if _PARTS.fullmatch(name))}
    if (place / _CONFIG).is_file() and not is_routed(place):
        with suppress(UserError):  # an adapter may have a config beside it
            wanted |= {file.relative_to(place).as_posix() for file in weight_files(place)}
    for pattern in include:
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise UserError(f"--include {pattern}: fits no file in {place}")
        wanted.update(found)
    for name in sorted(wanted):
        within(place, name)
    wanted.update(code_files(place, str(place)))
    chosen = [file for file in files if file.as_posix() in wanted]
    return chosen, [file for file in files if file.as_posix() not in wanted]


@contextmanager
def upload_copy(place: Path, files: Sequence[Path], repository: str, base_model: str | None = None) -> Iterator[Path]:
    """Make a directory with links to files of `place`, and copies of those that name paths of this machine.

    Args:
        place: what to upload; it is not changed.
        files: of it, by their paths within; see `files_to_upload`.
        repository: the id it will have, for the lines of the card that load it.
        base_model: id of the Hub of an adapter's base, where the adapter names it by a local path.

    Yields:
        The directory; it is gone after the block.

    Raises:
        UserError: a file that names paths of this machine cannot be read.
    """
    names = _names_in(place)
    labels = {} if names is None else names.labels
    with tempfile.TemporaryDirectory(prefix="mergekit-neuron-upload-") as temporary:
        copy = Path(temporary)
        for relative in files:
            file = place / relative
            target = copy / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            text = _changed(file, relative, repository, labels, base_model)
            if text is None and file.suffix == ".safetensors" and _with_metadata_reduced(file, target, labels):
                continue
            if text is None:
                os.symlink(file.resolve(), target)
            else:
                target.write_text(text, encoding="utf-8")
        if is_routed(place) and not (copy / "README.md").exists():
            named = base_model or RoutedConfig.read(place).base_model
            card = make_routed_card(place, repository.partition("/")[2], named)
            (copy / "README.md").write_text(with_model_id(card, repository), encoding="utf-8")
        yield copy


def check_base(place: Path, base_model: str | None) -> None:
    """Make sure that a base is named where one is needed, and only there.

    Raises:
        UserError: a routed model's base is a directory of this machine, or `base_model` goes with a whole model.
    """
    if is_routed(place):
        if base_model is None and RoutedConfig.read(place).base_is_local:
            raise UserError(LOCAL_BASE.format(place))
    elif base_model is not None and not (place / _ADAPTER_CONFIG).exists():
        raise UserError(f"--base-model: {place} is no adapter and no routed model, it needs no base")


def unloadable_base(place: Path, base_model: str | None = None) -> str | None:
    """Say what the user should know of an adapter whose base others cannot find by its name; None if they can."""
    file = place / _ADAPTER_CONFIG
    if base_model is not None or not file.exists():
        return None
    named = str(read_object(file).get("base_model_name_or_path") or "")
    if is_hub_id(named, known_hub_ids(place)):
        return None
    return (
        "its base is a local directory, which nobody else has: give the id it has on the Hub with --base-model, or "
        "those who load the adapter must know it"
    )


def _changed(file: Path, relative: Path, repository: str, labels: dict[str, str], base_model: str | None) -> str | None:
    """New text of a file; None where it stays as it is."""
    if relative == Path("README.md"):
        card = with_model_id(reduced_text(read_text(file), labels), repository)
        if base_model is None:
            return card
        with_base = parsed_card(card, str(file))
        with_base.data.base_model, with_base.data.base_model_relation = base_model, "adapter"
        return str(with_base)
    if relative.name == CONFIG_NAME:
        names = _names_in(file.parent)
        if names is None:
            raise UserError(f"{file}: no merge configuration, and may name paths of this machine; remove it")
        return reduced_yaml(read_text(file), names)
    if relative.suffix == ".html":
        page = read_text(file)
        for path in (path for path, label in labels.items() if label != path and re.search(r"[/\\]", path)):
            page = page.replace(path, labels[path])
        return page
    if relative.suffix != ".json" or relative.name in _PLAIN:
        return None
    try:
        content = parse_json(read_text(file), str(file))
    except UserError:
        return None
    reduced = reduced_json(content, labels, running=not is_of_tokenizer(relative.name))
    key = {_ADAPTER_CONFIG: "base_model_name_or_path", ROUTED_CONFIG: "base_model"}.get(relative.name)
    if base_model is not None and key is not None and isinstance(reduced, dict):
        reduced[key] = base_model
    return None if reduced == content else json.dumps(reduced, indent=2, ensure_ascii=False) + "\n"


def _with_metadata_reduced(file: Path, target: Path, labels: dict[str, str]) -> bool:
    """Copy tensors where the strings beside them name local paths, without these; False where they name none."""
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        header = json.loads(source.read(length))
        reduced = reduced_json(header.get("__metadata__"), labels)
        if reduced == header.get("__metadata__"):
            return False
        changed = json.dumps({**header, "__metadata__": reduced}, separators=(",", ":")).encode()
        changed += b" " * (-len(changed) % 8)
        with target.open("wb") as copy:
            copy.write(len(changed).to_bytes(8, "little") + changed)
            shutil.copyfileobj(source, copy, 1 << 20)
    return True


def _names_in(place: Path) -> ModelNames | None:
    """What the models of the merge in a directory are called; None where no YAML tells."""
    try:
        configuration = read_configuration(read_text(place / CONFIG_NAME))
    except UserError:
        return None
    return ModelNames(configuration, known_hub_ids(place))
