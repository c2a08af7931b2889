"""What a routed model is on disk: one JSON config, the adapters in peft's format, the router as safetensors.

routed_config.json       format and its version, base by reference, experts with their redundant layers, settings
router.safetensors       the router's weights and what its out-of-domain score needs
adapters/NAME/           each expert's adapter, enhanced
heads/NAME.safetensors   its head, where it has one of its own
biases/NAME.safetensors  what it adds to biases, where it trained any, by their modules
enhancement.json         every step of the enhancement with its loss
tokenizer or processor   of the base
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator
from pydantic.dataclasses import dataclass

from neuron_methods.models.hub import download, hub_answers
from neuron_methods.models.kinds import facts_of
from neuron_methods.models.model_files import HEADS
from neuron_methods.routing.route_yaml import EXPERT_NAME, OodScore, Pooling, Redundant, Seed
from neuron_methods.support.documents import read_object, validated
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import within, write_json
from neuron_methods.support.text import shortened

CONFIG_NAME = "routed_config.json"
ROUTER_NAME = "router.safetensors"
ENHANCEMENT_NAME = "enhancement.json"
ADAPTERS = "adapters"
BIASES = "biases"
FORMAT = "mergekit-neuron-routed"
#: 1 knew no heads.
FORMAT_VERSIONS = (1, 2)
#: Kinds of models whose experts may have heads of their own.
CLASSIFIERS = ("image-classification", "text-classification")
AGAIN = "download it or make the routed model again"


def _no_nan(value: float) -> float:
    if math.isnan(value):
        raise ValueError("expected a number")
    return value


# Lists of JSON become tuples, so the types within are the strict ones.
_checked = dataclass(frozen=True, config=ConfigDict(extra="forbid"))
_Text = Annotated[StrictStr, Field(min_length=1)]
_Count = Annotated[StrictInt, Field(ge=1, le=1 << 24)]


@_checked
class RoutedExpert:
    """One expert.

    Attributes:
        name: which its adapter's directory bears.
        redundant_layers: whose update it does without.
        head_labels: names of the classes of its own head, in their order; None: it has none.
        biases: whether it trained any.
    """

    name: Annotated[StrictStr, Field(pattern=f"^{EXPERT_NAME}$")]
    redundant_layers: tuple[StrictStr, ...] = ()
    head_labels: Annotated[tuple[StrictStr, ...], Field(min_length=1, max_length=1 << 16)] | None = None
    biases: StrictBool = False


@_checked
class RouterShape:
    """How to make the router that router.safetensors fits into, and what it decides by; see `route_yaml`.

    Attributes:
        layers: how many lie before each of the hidden states that are read.
        width: of those, pooled and side by side.
        axes: leading axes of the scatter within experts that are kept.
    """

    layers: Annotated[tuple[Annotated[StrictInt, Field(ge=0)], ...], Field(max_length=1000)]
    pooling: Pooling
    width: _Count
    hidden: _Count
    axes: Annotated[StrictInt, Field(ge=0, le=1 << 24)]
    top_k: _Count
    temperature: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
    ood_score: OodScore
    ood_threshold: Annotated[float, Field(strict=True), AfterValidator(_no_nan)] = float("-inf")


@_checked
class RoutedConfig:
    """The content of routed_config.json.

    Attributes:
        base_model: hub id; a local path starts with ``.`` (relative to the directory of this file) or is absolute.
        experts: in the router's order.
        router: see there.
        redundant, seed: how redundant layers are filled; see `route_yaml.Merging`. Format 1 knew no ``others``.
        architecture: class of transformers that the experts' heads are of; None: none has one of its own.
        report: figures from the making: accuracy of the router, number of inputs, versions.
    """

    base_model: _Text
    experts: Annotated[tuple[RoutedExpert, ...], Field(min_length=1)]
    router: RouterShape
    redundant: Redundant = "router"
    seed: Seed = 0
    architecture: StrictStr | None = None
    report: dict[StrictStr, Any] = field(default_factory=dict)

    @model_validator(mode="after")
    def _experts_make_sense(self) -> RoutedConfig:
        names = [expert.name for expert in self.experts]
        if len(set(names)) < len(names):
            raise ValueError("experts: two have one name")
        if not self.router.layers:
            raise ValueError("router.layers: empty; a router reads the states behind one layer at least")
        if self.router.top_k > len(names):
            raise ValueError(f"router.top_k: {self.router.top_k} of {len(names)} experts cannot be chosen")
        facts = facts_of(self.architecture or "")
        if self.architecture is not None and (facts is None or facts.kind not in CLASSIFIERS):
            raise ValueError(f"architecture: {shortened(self.architecture)} is no classifier that is known here")
        headed = next((expert.name for expert in self.experts if expert.head_labels is not None), None)
        if headed is not None and self.architecture is None:
            raise ValueError(f"architecture: missing; the head of {headed} is of some class")
        return self

    def write(self, directory: Path) -> None:
        """Write routed_config.json."""
        content = {"format": FORMAT, "format_version": max(FORMAT_VERSIONS), **asdict(self)}
        write_json(directory / CONFIG_NAME, content, indent=2)

    @classmethod
    def read(cls, directory: Path) -> RoutedConfig:
        """Read routed_config.json.

        Raises:
            UserError: it is not there, damaged, of another format, or of a version that is not known here.
        """
        if not os.path.lexists(directory / CONFIG_NAME):
            raise UserError(f"{directory}: no {CONFIG_NAME} in it, so this is no routed model")
        path = within(directory, CONFIG_NAME)
        content = read_object(path, again=AGAIN)
        if content.pop("format", None) != FORMAT:
            raise UserError(f"{path}: its format is not {FORMAT!r}, so this is no routed model")
        version = content.pop("format_version", None)
        if version not in FORMAT_VERSIONS or isinstance(version, bool):
            known = ", ".join(map(str, FORMAT_VERSIONS))
            found = f"format_version {shortened(version)} is not known here (known: {known})"
            raise UserError(f"{path}: {found}; upgrade this package")
        return validated(content, cls, str(path), AGAIN)

    def base_reference(self, directory: Path) -> str:
        """Say where the base is: a hub id, or the path of a directory."""
        if not self.base_is_local:
            return self.base_model
        return str(Path(os.path.normpath(directory / self.base_model)))

    @property
    def base_is_local(self) -> bool:
        """Whether the base is a directory, and nobody else's machine has it."""
        return self.base_model.startswith(".") or os.path.isabs(self.base_model)


def head_file(directory: Path, expert: str) -> Path:
    """Find the file of an expert's head; raises UserError where it leads out of the directory."""
    return within(directory, HEADS, f"{expert}.safetensors")


def bias_file(directory: Path, expert: str) -> Path:
    """Find the file of an expert's biases; raises UserError where it leads out of the directory."""
    return within(directory, BIASES, f"{expert}.safetensors")


def is_routed(path: str | os.PathLike[str]) -> bool:
    """Tell whether a local directory holds a routed model."""
    return os.path.isfile(os.path.join(path, CONFIG_NAME))


def reference_to(base: str, directory: Path) -> str:
    """Name a base as routed_config.json in `directory` does: hub ids as they are, directories relative to it."""
    if not os.path.isdir(base):
        return base
    try:
        relative = Path(os.path.relpath(os.path.realpath(base), os.path.realpath(directory))).as_posix()
    except ValueError:  # another drive
        return os.path.realpath(base)
    return relative if relative.startswith(".") else f"./{relative}"


def routed_directory(path_or_repo: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """Find the local directory of a routed model; one of the hub is downloaded.

    Raises:
        UserError: there is none.
    """
    if os.path.isdir(path_or_repo):
        return Path(path_or_repo)
    hub_answers()
    try:
        return Path(download(path_or_repo, revision, cache_dir))
    except UserError as error:
        raise UserError(
            f"{path_or_repo}: neither a directory nor a repository that can be had from the hub ({error})"
        ) from None
