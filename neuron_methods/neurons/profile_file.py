"""Neuron profiles as files: ``NAME.safetensors`` with the statistics, ``NAME.exemplars.jsonl`` beside it.

The safetensors file holds, per data source and layer (``SOURCE/LAYER/...``):

- ``mean_abs``, ``second_moment``, ``firing_rate`` and, if measured, ``taylor``: float32 (neurons,); see `statistics`;
- ``top_activation``: float32 (neurons, top), the activations of the exemplars by descending size; 0: an empty place;
- ``top_exemplar``: int32 (neurons, top), the exemplars' line numbers (from 0) in the JSONL file; -1: an empty place.

Its metadata holds ``format``, ``version`` and, as JSON, ``profile``: what `ProfileInfo` says. A line of the JSONL file
is one exemplar, a token in its context or a patch of an image; many neurons share it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neuron_methods.neurons import NeuronMap
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import file_in_place_after
from neuron_methods.support.text import one_line

FORMAT = "mergekit-neuron profile"
VERSION = "1"
STATISTICS = ("mean_abs", "second_moment", "firing_rate")
TAYLOR = "taylor"
TOP_ACTIVATION, TOP_EXEMPLAR = "top_activation", "top_exemplar"


@dataclass(frozen=True)
class SourceInfo:
    """What was measured of one data source.

    Attributes:
        source: the SOURCE of ``--data``, without directories.
        fingerprint: tells apart sources that are named alike.
        samples: how many were read.
        tokens: layer -> how many tokens it read; T5's encoder and decoder, CLIP's towers differ.
    """

    source: str
    fingerprint: str
    samples: int
    tokens: dict[str, int]


@dataclass(frozen=True)
class ProfileInfo:
    """What a profile is of.

    Attributes:
        model: name of the model, without directories.
        model_fingerprint: tells apart models that are named alike.
        model_type: the config's.
        layers: key -> number of neurons, in the order of the layers.
        gated: keys of layers with a gate, whose `firing_rate` is that of the gate.
        settings: what the measurement was told and what changes its outcome.
        sources: name -> what was measured.
        exemplars: how many lines of the JSONL file belong to this profile.
        made_with: package -> version.
    """

    model: str
    model_fingerprint: str
    model_type: str
    layers: dict[str, int]
    gated: list[str]
    settings: dict[str, Any]
    sources: dict[str, SourceInfo] = field(default_factory=dict)
    exemplars: int = 0
    made_with: dict[str, str] = field(default_factory=dict)

    @property
    def statistics(self) -> tuple[str, ...]:
        """The names of the statistics there are."""
        return (*STATISTICS, TAYLOR) if self.settings.get("gradients") else STATISTICS


@dataclass(frozen=True)
class Exemplar:
    """One of the tokens that drive a neuron furthest.

    Attributes:
        activation: the neuron's, with its sign.
        row: the sample's row in its data source.
        position: the token's place in the sample; of images the patch, where 0 is the class token if there is one.
        text: ``before``, ``token`` and ``after`` for text, ``image`` for images.
    """

    activation: float
    source: str
    row: int
    position: int
    text: dict[str, str]


class NeuronProfile:
    """A profile in memory: statistics by source, layer and name; exemplars by source, layer and neuron."""

    def __init__(self, info: ProfileInfo, tensors: dict[str, Tensor], path: Path | None = None) -> None:
        """Put one together; `load` reads one. `path` is where it was read from."""
        self.info = info
        self.tensors = tensors
        self.path = path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NeuronProfile:
        """Read a profile.

        Raises:
            UserError: there is no such file, it is no profile, is truncated or of another version, or lacks a layer.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: there is no such profile; `mergekit-neuron profile` makes one")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot read this profile, it is truncated or no safetensors ({error})") from error
        if metadata.get("format") != FORMAT:
            found = f"a file of the format {metadata['format']!r}" if "format" in metadata else "it says no format"
            raise UserError(
                f"{path}: this safetensors file is no profile of neurons ({found}); `mergekit-neuron profile`, without "
                "--inputs, makes one"
            )
        if metadata.get("version") != VERSION:
            raise UserError(
                f"{path}: this profile has version {metadata.get('version')}, this program reads version {VERSION}; "
                "measure it again"
            )
        try:
            info = TypeAdapter(ProfileInfo).validate_json(metadata["profile"])
        except (KeyError, ValueError) as error:
            problem = f"the metadata of this profile is damaged ({one_line(error)}); measure it again"
            raise UserError(f"{path}: {problem}") from error
        profile = cls(info, tensors, path)
        profile._check_complete()
        return profile

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the statistics beside `path` and move them into place; the exemplars have to be there already."""
        metadata = {"format": FORMAT, "version": VERSION, "profile": json.dumps(asdict(self.info))}
        with file_in_place_after(path) as beside:
            save_file(self.tensors, beside, metadata=metadata)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the data sources."""
        return tuple(self.info.sources)

    @property
    def layers(self) -> dict[str, int]:
        """Key of each layer -> its number of neurons."""
        return self.info.layers

    def find_layer(self, name: Any, where: str) -> str:
        """Find the key of a layer given by its key, or by its number where only one layer has that number.

        Raises:
            UserError: there is no such layer, or several; `where` is for the message.
        """
        found = [key for key in self.layers if str(name) in (key, key.rsplit(".", 1)[-1])]
        if len(found) != 1:
            problem = f"could be {', '.join(found)}" if found else f"is none of {', '.join(self.layers)}"
            raise UserError(f"{where}: layer {name!r} {problem}")
        return found[0]

    def tokens(self, source: str, layer: str) -> int:
        """Count the tokens of a source that a layer read."""
        self._check(source, layer)
        return self.info.sources[source].tokens[layer]

    def statistic(self, name: str, source: str, layer: str) -> Tensor:
        """Get a statistic of a layer's neurons on a source, float32 (neurons,).

        Raises:
            UserError: there is no such source, layer or statistic in this profile.
        """
        if name not in self.info.statistics:
            known = ", ".join(self.info.statistics)
            hint = "; measure again with --gradients" if name == TAYLOR else ""
            raise UserError(f"{self._name}: there is no {name!r} in it (there are: {known}){hint}")
        return self._tensor(source, layer, name)

    def top_activations(self, source: str, layer: str) -> Tensor:
        """Get the activations of the exemplars, float32 (neurons, top), by descending size; 0 in empty places."""
        return self._tensor(source, layer, TOP_ACTIVATION)

    def exemplars(self, source: str, layer: str, neuron: int) -> list[Exemplar]:
        """Get the tokens of a source that drive a neuron furthest, by descending |activation|.

        Raises:
            UserError: there is no such source, layer or neuron, or the JSONL file is missing or damaged.
        """
        lines, values = (self._tensor(source, layer, name) for name in (TOP_EXEMPLAR, TOP_ACTIVATION))
        if not 0 <= neuron < len(lines):
            raise UserError(f"{self._name}: {layer} has neurons 0 to {len(lines) - 1}, not {neuron}")
        found = []
        for line, activation in zip(lines[neuron].tolist(), values[neuron].tolist(), strict=True):
            if line >= 0:
                text = dict(self._lines[line])
                place = {key: text.pop(key) for key in ("source", "row", "position")}
                found.append(Exemplar(activation, **place, text=text))
        return found

    def check_model(self, neurons: NeuronMap) -> None:
        """Raise UserError unless this profile is of a model with these neurons: same family, layers and widths."""
        neurons.check_same(f"{self._name}: this profile", self.info.model, self.info.model_type, self.layers)

    @cached_property
    def _lines(self) -> list[dict[str, Any]]:
        """The JSONL file, as far as it belongs to this profile."""
        return read_exemplars(self.path, self.info.exemplars) if self.path is not None else []

    @property
    def _name(self) -> str:
        return str(self.path) if self.path is not None else f"profile of {self.info.model}"

    def _check(self, source: str, layer: str) -> None:
        for what, name, known in (("data source", source, self.sources), ("layer", layer, self.layers)):
            if name not in known:
                raise UserError(f"{self._name}: there is no {what} {name!r} in it (there are: {', '.join(known)})")

    def _tensor(self, source: str, layer: str, name: str) -> Tensor:
        self._check(source, layer)
        return self.tensors[f"{source}/{layer}/{name}"]

    def _check_complete(self) -> None:
        """Every source must have every layer, with the shapes that the metadata says."""
        for source, info in self.info.sources.items():
            for layer, neurons in self.layers.items():
                if layer not in info.tokens:
                    missing = f"layer {layer} of data source {source!r} is missing"
                    raise UserError(f"{self._name}: {missing}; measure it again")
                for name in (*self.info.statistics, TOP_ACTIVATION, TOP_EXEMPLAR):
                    tensor = self.tensors.get(f"{source}/{layer}/{name}")
                    if tensor is None or tensor.shape[0] != neurons:
                        found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
                        raise UserError(
                            f"{self._name}: {name} of layer {layer}, data source {source!r}, is {found}, expected for "
                            f"{neurons} neurons; measure it again"
                        )


def exemplars_path(profile: Path) -> Path:
    """Name the JSONL file beside a profile."""
    return profile.with_name(profile.name.removesuffix(".safetensors") + ".exemplars.jsonl")


def read_exemplars(profile: Path, count: int) -> list[dict[str, Any]]:
    """Read the first `count` exemplars of the file beside a profile; more may be there from an interrupted run.

    Raises:
        UserError: it is missing, damaged or too short.
    """
    path = exemplars_path(profile)
    try:
        with path.open(encoding="utf-8") as file:
            lines = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
    except OSError as error:
        raise UserError(f"{path}: the exemplars of {profile.name} belong there: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); measure the profile again") from error
    if len(lines) < count:
        raise UserError(f"{path}: {len(lines)} exemplars, expected {count}; measure the profile again")
    return lines


def write_exemplars(profile: Path, keep: int, exemplars: Iterable[Mapping[str, Any]]) -> None:
    """Put exemplars behind the first `keep` lines of the file beside a profile, by way of a new file."""
    path = exemplars_path(profile)
    with file_in_place_after(path) as beside, beside.open("w", encoding="utf-8") as file:
        if keep:
            with path.open(encoding="utf-8") as old:
                file.writelines(line for line, _ in zip(old, range(keep), strict=False))
        file.writelines(json.dumps(exemplar, ensure_ascii=False) + "\n" for exemplar in exemplars)
