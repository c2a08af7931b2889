"""Labels of neurons as a file: what makes each fire, in words, and the group that this puts it into.

JSON, made by `mergekit-neuron describe` and read by `mergekit-neuron groups --import`; neurons that nobody described do
not stand in it:

    {"format": "mergekit-neuron labels", "version": 1, "model": "base", "model_type": "llama", "weights": "…",
     "groups": ["general", "math", "code"], "made_from": {…},
     "labels": [{"layer": "layers.0", "neuron": 7, "group": "math", "confidence": 0.83, "description": "…",
                 "likelihoods": [-3.2, -1.1, -4.0]}, …]}

`likelihoods`, of the names in `groups` and in nats, serve a next run of `describe`, and are not there where the
describer told none.

Other files of labels may have the same keys in their records: `confidence` and `description` may be left out or null.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from neuron_methods.neurons.profile_file import NeuronProfile
from neuron_methods.support.documents import Given, parse_json, read_lines, read_object, read_text, validated
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_json
from neuron_methods.support.text import shortened

FORMAT = "mergekit-neuron labels"
VERSION = 1
_MEND = "mend the file"
_AGAIN = "make it again with `mergekit-neuron describe`"


@dataclass(frozen=True)
class NeuronLabel:
    """What one neuron is about.

    Attributes:
        layer: its key.
        neuron: its index.
        group: its name.
        confidence: the describer's in the group, 0 to 1; None where it told none.
        description: one line; "" where there is none.
        likelihoods: log-likelihoods of all groups, in nats; None where the describer told none.
    """

    layer: str
    neuron: int
    group: str
    confidence: float | None = None
    description: str = ""
    likelihoods: list[float] | None = None


class _Record(Given):
    layer: str
    neuron: int
    group: str
    confidence: Annotated[float, Field(ge=0, le=1)] | None = None
    description: str = ""
    likelihoods: list[Annotated[float, Field(le=0)]] | None = None


class _LabelsContent(Given):
    format: str
    version: int
    model: str
    model_type: str
    weights: str
    groups: list[str]
    made_from: dict[str, Any]
    labels: list[_Record]


@dataclass(frozen=True)
class NeuronLabels:
    """The neurons that were described.

    Attributes:
        model: name of the base model, for messages.
        model_type: its config's.
        weights: digest of its weights, "" where that is not known.
        groups: the names there were to choose from.
        labels: in the order of layers and neurons.
        made_from: how they were made.
    """

    model: str
    model_type: str
    weights: str
    groups: tuple[str, ...]
    labels: Sequence[NeuronLabel]
    made_from: Mapping[str, Any] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """Give what the file says."""
        return {
            "format": FORMAT,
            "version": VERSION,
            **{key: getattr(self, key) for key in ("model", "model_type", "weights")},
            "groups": list(self.groups),
            "made_from": dict(self.made_from),
            "labels": [{k: v for k, v in asdict(label).items() if k != "likelihoods" or v} for label in self.labels],
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, complete or not at all."""
        write_json(path, self.content())

    def counts(self) -> Counter[tuple[str, str]]:
        """Count the neurons of each layer and group."""
        return Counter((label.layer, label.group) for label in self.labels)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> NeuronLabels:
        """Read what `write` wrote.

        Raises:
            UserError: it is missing, no such file, or damaged.
        """
        return cls._parsed(read_object(path, again=_AGAIN), path)

    @classmethod
    def _parsed(cls, content: dict[str, Any], path: str | os.PathLike[str]) -> NeuronLabels:
        if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
            told = f"format {shortened(content.get('format'))}, version {shortened(content.get('version'))}"
            raise UserError(f"{path}: {told}; expected {FORMAT!r}, version {VERSION}; {_AGAIN}")
        found = validated(content, _LabelsContent, str(path), _AGAIN)
        labels = [NeuronLabel(**record.model_dump()) for record in found.labels]
        return cls(found.model, found.model_type, found.weights, tuple(found.groups), labels, found.made_from)


def read_labels(profile: NeuronProfile, path: str | os.PathLike[str]) -> NeuronLabels:
    """Read labels, of `mergekit-neuron describe` or made elsewhere.

    Args:
        profile: of the base; says which neurons there are.
        path: such a file; or JSON ({layer: [group per neuron]}, {layer: {neuron: group}} or a list of records), JSON
            lines or CSV of records with `layer`, `neuron` and `group`, and if they like `confidence` and `description`.
            A layer is given by its key or, where that is clear, its number.

    Raises:
        UserError: the file cannot be read, is of another model, or a label is of no neuron of the model.
    """
    path = Path(path)
    content = parse_json(read_text(path), str(path), _MEND) if path.suffix.lower() == ".json" else None
    groups: set[str] = set()
    if isinstance(content, dict) and "format" in content:
        described = NeuronLabels._parsed(content, path)
        _refuse_other_model(described, path, profile)
        groups, content = set(described.groups), list(map(asdict, described.labels))
    found: dict[tuple[str, int], NeuronLabel] = {}
    for where, record in _read_records(path, content):
        label = _read_label(record, where, profile)
        if (label.layer, label.neuron) in found:
            raise UserError(f"{where}: {label.layer}, neuron {label.neuron} has a label already; give each neuron one")
        found[label.layer, label.neuron] = label
    if not found:
        raise UserError(f"{path}: no labels in it; expected records with layer, neuron and group")
    info, labels = profile.info, list(found.values())
    names = tuple(sorted(groups.union(label.group for label in labels)))
    return NeuronLabels(info.model, info.model_type, info.weights, names, labels, {"labels": path.name})


def _read_label(record: Any, where: str, profile: NeuronProfile) -> NeuronLabel:
    missing = [key for key in ("layer", "neuron", "group") if not isinstance(record, Mapping) or key not in record]
    if missing:
        raise UserError(f"{where}: no {missing[0]!r}; a label has layer, neuron and group")
    name, neuron, group = (record[key] for key in ("layer", "neuron", "group"))
    if not isinstance(group, str) or not group.strip() or not group.strip().isprintable():
        raise UserError(f"{where}: a group is a name, found {shortened(group)}")
    if not isinstance(name, (str, int)):
        raise UserError(f"{where}: a layer is a key or a number, found {shortened(name)}")
    layer = profile.find_layer(name, where)
    whole = type(neuron) is int or (isinstance(neuron, str) and re.fullmatch("[0-9]{1,15}", neuron.strip()))
    index = int(neuron) if whole else -1
    if not 0 <= index < profile.layers[layer]:
        raise UserError(f"{where}: {layer} has neurons 0 to {profile.layers[layer] - 1}, not {shortened(neuron)}")
    description = record.get("description") or ""
    if not isinstance(description, str):
        raise UserError(f"{where}: a description is text, found {shortened(description)}")
    return NeuronLabel(layer, index, group.strip(), _confidence(record.get("confidence"), where), description)


def _confidence(value: Any, where: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else -1.0
    except (ValueError, OverflowError):
        number = -1.0
    if not 0 <= number <= 1:
        raise UserError(f"{where}: a confidence is a number from 0 to 1, found {shortened(value)}")
    return number


def _read_records(path: Path, content: Any) -> Iterator[tuple[str, Any]]:
    """Where a record stands, and what it is: of a whole layer's labels, each as a record of its own.

    `content` is that of a JSON file.
    """
    ending = path.suffix.lower()
    try:
        if ending == ".csv":
            reader = csv.DictReader(read_text(path).splitlines(keepends=True), strict=True)
            for row in reader:
                if any("\n" in str(cell) or "\r" in str(cell) for cell in row.values()):
                    raise UserError(
                        f"{path}, line {reader.line_num}: a quote of a line before it is not closed; {_MEND}"
                    )
                yield f"{path}, line {reader.line_num}", row
        elif ending == ".jsonl":
            yield from read_lines(path, again=_MEND)
        elif ending == ".json":
            if isinstance(content, list):
                yield from ((f"{path}, record {number}", record) for number, record in enumerate(content))
                return
            if not isinstance(content, dict):
                raise UserError(
                    f"{path}: expected {{layer: [group, …]}} or a list of records with layer, neuron and group"
                )
            for layer, values in content.items():
                where = f"{path}, {shortened(layer, quote=False)}"
                if not isinstance(values, (list, dict)):
                    raise UserError(f"{where}: expected one group per neuron, found {type(values).__name__}")
                for neuron, group in values.items() if isinstance(values, dict) else enumerate(values):
                    yield where, {"layer": layer, "neuron": neuron, "group": group}
        else:
            raise UserError(f"{path}: labels are read from .json, .jsonl and .csv files")
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; {_MEND}") from None


def _refuse_other_model(found: NeuronLabels, path: Path, profile: NeuronProfile) -> None:
    if found.weights and profile.info.weights and found.weights != profile.info.weights:
        raise UserError(
            f"{path}: labels of {shortened(found.model)}, whose weights are not those that {profile.path} was measured "
            "on; describe the neurons of this model"
        )
