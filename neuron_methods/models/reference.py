"""MODEL as a user writes it, and which names mean one model.

MODEL is a directory, a repository of the hub, base+adapter of either, or an adapter by itself, whose config names its
base. A repository may carry a revision: ``org/model@v1``. A directory whose own name holds a ``+`` or an ``@`` is taken
for what it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from neuron_methods.models.adapter_config import ADAPTER_CONFIG, read_adapter_config
from neuron_methods.models.headers import header_entries
from neuron_methods.models.hub import hub_file
from neuron_methods.models.states import model_state
from neuron_methods.support.errors import UserError

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_SAMPLE = 4096  # bytes of each tensor that two copies are compared by


@dataclass(frozen=True)
class Place:
    """Where a model or an adapter is: a directory, or a repository of the hub, at a revision or its newest."""

    path: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Place:
        """Read a path, a repository, or repository@revision; raises UserError if it is none of them."""
        if os.path.exists(text) or "@" not in text:
            return cls(text)
        path, _, revision = text.partition("@")
        if not path or not revision or "@" in revision:
            raise UserError(f"model {text!r}: expected a directory, or a repository@revision of the hub")
        if os.path.exists(path):
            raise UserError(f"model {text!r}: {path} is a directory, which has no revisions; leave @{revision} away")
        return cls(path, revision)

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path

    @property
    def shown(self) -> str:
        """The name without the directories of a local path."""
        return Path(self.path).resolve().name if os.path.exists(self.path) else str(self)

    @property
    def file_name(self) -> str:
        """A name for files: of a directory beneath this one its path from here, of another its last part."""
        if not os.path.exists(self.path):
            return str(self).replace("/", "--")
        whole, here = Path(self.path).resolve(), Path.cwd()
        return "--".join(whole.relative_to(here).parts if here in whole.parents else [whole.name])

    def state(self) -> list[Any]:
        """Say where it is and what it holds: a directory its files, a repository a commit; plain values for JSON."""
        if os.path.isdir(self.path):
            return [os.path.realpath(self.path), model_state(self.path)]
        snapshot = local_directory(self.path, self.revision)
        return [str(self), os.path.basename(snapshot or "")]


@dataclass(frozen=True)
class ModelName:
    """A model: a base, with an adapter or without one."""

    base: Place
    adapter: Place | None = None

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """Read MODEL as it is written; an adapter by itself stands as the base, see `find`.

        Raises:
            UserError: it has another form.
        """
        if os.path.exists(text):
            return cls(Place(text))
        base, plus, adapter = text.partition("+")
        if plus and (not base or not adapter or "+" in adapter):
            raise UserError(f"model {text!r}: expected a model, or base+adapter")
        return cls(Place.parse(base), Place.parse(adapter) if plus else None)

    @classmethod
    def find(cls, text: str) -> ModelName:
        """Read MODEL and look up the base of an adapter that stands by itself.

        Raises:
            UserError: it has another form, or the adapter's config names no base that is to be had.
        """
        name = cls.parse(text)
        if name.adapter is not None or not is_adapter(name.base.path, name.base.revision):
            return name
        directory = local_directory(name.base.path, name.base.revision)
        assert directory is not None
        return cls(base_of(read_adapter_config(directory), directory, str(name.base)), name.base)

    @property
    def shown(self) -> str:
        """The name without the directories of local paths."""
        return "+".join(place.shown for place in self._places)

    @property
    def file_name(self) -> str:
        """A name for files that are made of it, which tells apart models of one name in different directories."""
        return "+".join(place.file_name for place in self._places)

    @property
    def fingerprint(self) -> str:
        """Tells apart models of one name, and a model from what it was before its files were written anew."""
        state = [place.state() for place in self._places]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]

    def here(self) -> list[str]:
        """List the directories here that it is in."""
        return [place.path for place in self._places if os.path.exists(place.path)]

    def directories(self) -> list[str]:
        """List the local directories of its parts: as given, or of the Hub's cache."""
        found = (local_directory(place.path, place.revision) for place in self._places)
        return [directory for directory in found if directory is not None]

    @property
    def _places(self) -> tuple[Place, ...]:
        return (self.base, self.adapter) if self.adapter else (self.base,)


def base_of(config: Mapping[str, Any], directory: str, where: str) -> Place:
    """Find the base that an adapter's config names.

    Args:
        config: the content of adapter_config.json.
        directory: the adapter's, where a relative path may start from, besides its parent and the current directory.
        where: how messages call the adapter.

    Raises:
        UserError: it names none, or a directory that is not here.
    """
    found = config.get("base_model_name_or_path")
    if not found:
        raise UserError(
            f"{where}: its {ADAPTER_CONFIG} names no base; write the model as base+adapter, or give base_model"
        )
    here = _existing(found, directory)
    if here is None and looks_local(found):
        raise UserError(
            f"{where}: its {ADAPTER_CONFIG} names the base {found}, and there is no such directory here; "
            "write the model as base+adapter with the path of the base"
        )
    return Place(here) if here else Place(found, config.get("revision") or None)


def looks_local(path: str) -> bool:
    """Tell whether a path can only mean a directory: no repository of the hub is named like it."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/") or os.path.isabs(path)


def same_model(found: str, wanted: str, adapter_directory: str | None = None) -> bool | None:
    """Tell whether two names mean one model.

    Directories are one model if they are one directory or hold the same weights: a base may have been copied or
    downloaded since. Weights are compared by name, dtype and shape of all tensors and a sample of each one's bytes.
    Repositories are one model if their whole names agree, and a download in the hub's cache counts as its repository.

    Args:
        found: the base in an adapter's config: a repository, or a path on the machine that trained it.
        wanted: the base of a merge or a routed model: a repository or a path here.
        adapter_directory: where relative paths in `found` may start from, besides the current directory.

    Returns:
        None where it cannot be told: one of the two is a path that does not exist here, or only one is a repository,
        and their last parts agree.
    """
    if _plain(found) == _plain(wanted):
        return True
    here, there = _existing(wanted), _existing(found, adapter_directory)
    if here and there:
        return os.path.realpath(here) == os.path.realpath(there) or _hold_the_same(here, there)
    repositories = [_repository(here or wanted), _repository(there or found)]
    if all(repositories):
        return repositories[0] == repositories[1]
    names = {PurePath(r or _plain(p)).name.lower() for r, p in zip(repositories, (wanted, found), strict=True)}
    return None if len(names) == 1 else False


def _existing(path: str, adapter_directory: str | None = None) -> str | None:
    """The directory a path means here, None if there is none."""
    candidates = [path]
    if adapter_directory is not None and not os.path.isabs(path):
        candidates += [os.path.join(adapter_directory, path), os.path.join(os.path.dirname(adapter_directory), path)]
    return next((candidate for candidate in candidates if os.path.isdir(candidate)), None)


def _repository(path: str) -> str | None:
    """The hub's name of a model: as it stands, or from its place in the hub's cache; None for other paths."""
    for part in reversed(PurePath(os.path.realpath(path)).parts if os.path.isdir(path) else ()):
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/").lower()
    return None if os.path.isdir(path) or looks_local(path) else _plain(path).lower()


def _plain(path: str) -> str:
    return os.path.normpath(path) if path else path


def _hold_the_same(one: str, other: str) -> bool:
    samples = _sampled_weights(one)
    return bool(samples) and samples == _sampled_weights(other)


def _sampled_weights(directory: str) -> dict[str, Any]:
    """{tensor: (dtype, shape, bytes from its middle)} of a directory's safetensors; empty where they cannot be read."""
    found: dict[str, Any] = {}
    for path in Path(directory).glob("*.safetensors"):
        try:
            begin, entries = header_entries(path)
            with path.open("rb") as file:
                for name, entry in entries.items():
                    start, end = entry.data_offsets
                    file.seek(begin + max(start, (start + end - _SAMPLE) // 2))
                    found[name] = (entry.dtype, entry.shape, file.read(min(_SAMPLE, end - start)))
        except (UserError, OSError):
            return {}
    return found


# ---------------------------------------------------------------------------------- directories and repositories


def local_directory(path: str, revision: str | None = None, cache_dir: str | None = None) -> str | None:
    """Find the local directory of a model or an adapter, as far as one can without downloading weights.

    Args:
        path: directory, or repository of the hub.
        revision: of the repository.
        cache_dir: the hub's cache, None for the default.

    Returns:
        The directory with the small files; None where there is no such directory or repository, or no network to ask.
    """
    if os.path.isdir(path):
        return path
    found = (hub_file(path, name, revision, cache_dir) for name in (ADAPTER_CONFIG, "config.json"))
    return next((os.path.dirname(file) for file in found if file), None)


def is_adapter(path: str, revision: str | None = None, cache_dir: str | None = None) -> bool:
    """Tell whether a path or repository holds an adapter and not a whole model.

    A training directory may hold the model's config beside the adapter; what counts is whether it holds a model's
    weights.
    """
    if os.path.isdir(path):
        weights = (os.path.join(path, name + suffix) for name in _WEIGHTS for suffix in ("", ".index.json"))
        return os.path.exists(os.path.join(path, ADAPTER_CONFIG)) and not any(map(os.path.exists, weights))
    # The request for config.json is the one that is made next anyway; only a repository without it is an adapter.
    if os.path.exists(path) or looks_local(path) or hub_file(path, "config.json", revision, cache_dir):
        return False
    return hub_file(path, ADAPTER_CONFIG, revision, cache_dir) is not None
