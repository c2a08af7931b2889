"""The licence a merge inherits, as far as the cards of its models tell without asking the network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from mergekit.common import ModelPath

from neuron_methods.support.documents import front_matter, read_text
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import shortened

_MOST_CARD = 16 << 20  # bytes; some have pictures written into them


@dataclass(frozen=True)
class Licence:
    """A licence as a card's front matter has it: an id of the Hub, with name and link where the id is `other`."""

    id: str
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        return f"{self.id} ({self.name})" if self.name else self.id


@dataclass
class Licences:
    """What the models of a merge say.

    Attributes:
        inherited: the base's, where no other model says something else; None: not known, or in conflict.
        found: model -> its licence, of those that have one.
        unread: whose licence is not known as their cards cannot be read, and why not.
    """

    inherited: Licence | None = None
    found: dict[str, Licence] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    @property
    def conflict(self) -> str | None:
        """One sentence for card and summary where licences differ, else None."""
        if len(set(self.found.values())) < 2:
            return None
        said = "; ".join(f"{model}: {licence}" for model, licence in self.found.items())
        return f"the models are under different licences ({said}), so the card names none: find out what holds"


def metadata_of(card: Path) -> dict[str, Any]:
    """Read the YAML that a card begins with; {} where there is none or it cannot be read."""
    try:
        return front_matter(read_text(card), str(card))
    except UserError:
        return {}


def read_licence(model: ModelPath, cache_dir: str | None = None) -> Licence | None:
    """Read the licence on a model's card, in its directory or in the Hub's cache; None where it says none.

    Raises:
        UserError: there is a card, and it cannot be read.
    """
    place: Any = os.path.join(model.path, "README.md")
    if not os.path.isdir(model.path):
        try:
            place = try_to_load_from_cache(model.path, "README.md", cache_dir=cache_dir, revision=model.revision)
        except HFValidationError:
            return None
    there = isinstance(place, str) and os.path.lexists(place)
    card = front_matter(read_text(place, most=_MOST_CARD), place) if there else {}
    identity = card.get("license")
    if isinstance(identity, list):
        identity = ", ".join(shortened(one, 40, quote=False) for one in identity[:4])
    if not isinstance(identity, str) or not _text(identity.strip()) or identity == "unknown":
        return None
    return Licence(identity.strip().lower(), _text(card.get("license_name")), _text(card.get("license_link")))


def find_licences(models: Sequence[ModelPath], labels: Mapping[str, str], cache_dir: str | None = None) -> Licences:
    """Find the licences of a merge's models.

    Args:
        models: the base first; adapters, too.
        labels: path -> the name the card calls it by.
        cache_dir: the Hub's cache, None for the default.
    """
    licences = Licences()
    for model in models:
        try:
            found = read_licence(model, cache_dir)
        except UserError as error:
            licences.unread.append(f"the licence of {labels[model.path]} is not known: {error}")
            continue
        if found is not None:
            licences.found[labels[model.path]] = found
    base = licences.found.get(labels[models[0].path]) if models else None
    if base is not None and licences.conflict is None:
        licences.inherited = base
    return licences


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value and value.isprintable() else None
