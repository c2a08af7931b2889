"""Neuron profiles as files: ``NAME.safetensors`` with the statistics, ``NAME.exemplars.jsonl`` beside it.

The safetensors file holds, per data source and layer (``SOURCE/LAYER/...``):

- ``mean_abs``, ``second_moment``, ``firing_rate`` and, if measured, ``taylor``: float32 (neurons,); see `statistics`;
- ``top_activation``: float32 (neurons, top), the activations of the exemplars by descending size; 0: an empty place;
- ``top_exemplar``: int32 (neurons, top), the exemplars' line numbers (from 0) in the JSONL file; -1: an empty place.

Its metadata holds ``format``, ``version`` and, as JSON, ``profile``: what `ProfileInfo` says. A line of the JSONL file
is one exemplar, a token in its context or a patch of an image; many neurons share it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from neuron_methods.neurons import NeuronMap
from neuron_methods.support.documents import MOST_LINE, Foreign, check_regular, parse_json, validated
from neuron_methods.support.errors import UserError, explained_by
from neuron_methods.support.files import pair_in_place_after
from neuron_methods.support.targets import beginning_with
from neuron_methods.support.text import shortened

FORMAT = "mergekit-neuron profile"
VERSION = "1"
#: Tells a file of exemplars by its first line.
IS_EXEMPLARS = beginning_with(r'\{"source": ')
STATISTICS = ("mean_abs", "second_moment", "firing_rate")
TAYLOR = "taylor"
TOP_ACTIVATION, TOP_EXEMPLAR = "top_activation", "top_exemplar"
_AGAIN = "measure it again"
_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)

Count = Annotated[int, Field(ge=0)]


class _ExemplarLine(Foreign):
    source: str
    row: Count
    position: Count


class _TextLine(_ExemplarLine):
    before: str
    token: str
    after: str


class _ImageLine(_ExemplarLine):
    image: str


@dataclass(frozen=True)
class SourceInfo:
    """What was measured of one data source.

    Attributes:
        source: the SOURCE of ``--data``, without directories.
        fingerprint: tells apart sources that are named alike.
        samples: how many were read.
        tokens: layer -> how many tokens it read; T5's encoder and decoder, CLIP's towers differ.
        state: digest of the data's files as they were; "" of the Hub's, and in profiles that noted none.
    """

    __pydantic_config__ = _CONFIG

    source: str
    fingerprint: str
    samples: Count
    tokens: dict[str, Count]
    state: str = ""


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
        weights: digest of the model's weights; "" in profiles of releases that noted none.
    """

    __pydantic_config__ = _CONFIG

    model: str
    model_fingerprint: str
    model_type: str
    layers: dict[str, Count]
    gated: list[str]
    settings: dict[str, Any]
    sources: dict[str, SourceInfo] = field(default_factory=dict)
    exemplars: Count = 0
    made_with: dict[str, str] = field(default_factory=dict)
    weights: str = ""

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
    @explained_by("neuron_merge")
    def load(cls, path: str | os.PathLike[str]) -> NeuronProfile:
        """Read a profile.

        Raises:
            UserError: there is no such file, it is no profile, is truncated or of another version, or lacks a layer.
        """
        path = Path(path)
        if not os.path.lexists(path):
            raise UserError(f"{path}: there is no such profile; `mergekit-neuron profile` makes one")
        check_regular(path)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                ours = metadata.get("format") == FORMAT
                tensors = {name: file.get_tensor(name) for name in file.keys()} if ours else {}  # noqa: SIM118
        except Exception as error:  # of dtypes that torch does not have, too
            raise UserError(f"{path}: cannot read this profile, it is truncated or no safetensors ({error})") from error
        if not ours:
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
        shown = f"{path}: the metadata of this profile is damaged"
        content = parse_json(metadata.get("profile", ""), shown, _AGAIN)
        info = validated(content, ProfileInfo, shown, _AGAIN)
        profile = cls(info, tensors, path)
        profile._check_complete()
        return profile

    def save(self, path: Path, keep: int, exemplars: Iterable[Mapping[str, Any]]) -> None:
        """Write the profile, and its exemplars behind the first `keep` lines of those that are there; see `files`."""
        metadata = {"format": FORMAT, "version": VERSION, "profile": json.dumps(asdict(self.info))}
        old = exemplars_path(path)
        with pair_in_place_after(path, old, extends=keep > 0) as (statistics, lines):
            with lines.open("w", encoding="utf-8") as file:
                if keep:
                    with old.open(encoding="utf-8") as kept:
                        file.writelines(line for line, _ in zip(kept, range(keep), strict=False))
                file.writelines(json.dumps(exemplar, ensure_ascii=False) + "\n" for exemplar in exemplars)
            save_file(self.tensors, statistics, metadata=metadata)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the data sources."""
        return tuple(self.info.sources)

    @property
    def layers(self) -> dict[str, int]:
        """Key of each layer -> its number of neurons."""
        return self.info.layers

    @property
    def digest(self) -> str:
        """Tell this profile from others: what it is of, and which exemplars its neurons have."""
        digest = hashlib.sha256(json.dumps(asdict(self.info), sort_keys=True).encode())
        for source in self.sources:
            for layer in self.layers:
                for name in (TOP_ACTIVATION, TOP_EXEMPLAR):
                    digest.update(self._tensor(source, layer, name).contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def find_layer(self, name: Any, where: str) -> str:
        """Find the key of a layer given by its key, or by its number where only one layer has that number.

        Raises:
            UserError: there is no such layer, or several; `where` is for the message.
        """
        found = [key for key in self.layers if str(name) in (key, key.rsplit(".", 1)[-1])]
        if len(found) != 1:
            problem = f"could be {', '.join(found)}" if found else f"is none of {', '.join(self.layers)}"
            raise UserError(f"{where}: layer {shortened(name)} {problem}")
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
                    if tensor is None or not _fits(tensor, name, neurons, self.info.exemplars):
                        found = "missing" if tensor is None else _told(tensor, neurons)
                        raise UserError(
                            f"{self._name}: {name} of layer {layer}, data source {source!r}, is {found}, expected for "
                            f"{neurons} neurons; measure it again"
                        )


def _fits(tensor: Tensor, name: str, neurons: int, exemplars: int) -> bool:
    """Whether a tensor of a profile is what its name says, for so many neurons."""
    if name == TOP_EXEMPLAR:
        fits = tensor.dtype == torch.int32 and tensor.ndim == 2
        return fits and len(tensor) == neurons and bool(((tensor >= -1) & (tensor < exemplars)).all())
    dimensions = 2 if name == TOP_ACTIVATION else 1
    fits = tensor.dtype == torch.float32 and tensor.ndim == dimensions and len(tensor) == neurons
    return fits and bool(torch.isfinite(tensor).all())


def _told(tensor: Tensor, neurons: int) -> str:
    if tensor.ndim in (1, 2) and len(tensor) == neurons:
        return f"{str(tensor.dtype).removeprefix('torch.')} with values that it cannot have"
    return f"of shape {tuple(tensor.shape)}"


def exemplars_path(profile: Path) -> Path:
    """Name the JSONL file beside a profile."""
    return profile.with_name(profile.name.removesuffix(".safetensors") + ".exemplars.jsonl")


def read_exemplars(profile: Path, count: int) -> list[dict[str, Any]]:
    """Read the first `count` exemplars of the file beside a profile; more may be there from an interrupted run.

    Raises:
        UserError: it is missing, damaged or too short.
    """
    path = exemplars_path(profile)
    if not os.path.lexists(path):
        raise UserError(f"{path}: the exemplars of {profile.name} belong there: no such file; measure it again")
    check_regular(path)
    lines = []
    with path.open("rb") as file:
        for number in range(1, count + 1):
            line = file.readline(MOST_LINE)
            if not line:
                break
            shown = f"{path}, line {number}"
            content = parse_json(line, shown, "measure the profile again")
            schema = _ImageLine if isinstance(content, dict) and "image" in content else _TextLine
            validated(content, schema, shown, "measure the profile again")
            lines.append(content)
    if len(lines) < count:
        raise UserError(f"{path}: {len(lines)} exemplars, expected {count}; measure the profile again")
    return lines
