"""What a routed model is on disk: one JSON config, the adapters in peft's format, the router as safetensors.

routed_config.json       format and its version, base by reference, experts with their redundant layers, settings
router.safetensors       the router's weights and what its out-of-domain score needs
adapters/NAME/           each expert's adapter, enhanced
enhancement.json         every step of the enhancement with its loss
tokenizer or processor   of the base
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from neuron_methods.models.hub import hub_answers
from neuron_methods.support.documents import read_object
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_json
from neuron_methods.support.text import first_line

CONFIG_NAME = "routed_config.json"
ROUTER_NAME = "router.safetensors"
ENHANCEMENT_NAME = "enhancement.json"
ADAPTERS = "adapters"
FORMAT = "mergekit-neuron-routed"
FORMAT_VERSION = 1
_AGAIN = "download it or make the routed model again"


@dataclass(frozen=True)
class RoutedExpert:
    """One expert: its name, and the layers whose update was dropped."""

    name: str
    redundant_layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class RouterShape:
    """How to make the router that router.safetensors fits into, and what it decides by; see `route_yaml`.

    Attributes:
        layers: how many lie before each of the hidden states that are read.
        width: of those, pooled and side by side.
        axes: leading axes of the scatter within experts that are kept.
    """

    layers: tuple[int, ...]
    pooling: str
    width: int
    hidden: int
    axes: int
    top_k: int
    temperature: float
    ood_score: str
    ood_threshold: float = float("-inf")


@dataclass(frozen=True)
class RoutedConfig:
    """The content of routed_config.json.

    Attributes:
        base_model: hub id; a local path starts with ``.`` (relative to the directory of this file) or is absolute.
        experts: in the router's order.
        router: see there.
        redundant, seed: how redundant layers are filled; see `route_yaml.Merging`.
        report: figures from the making: accuracy of the router, number of inputs, versions.
    """

    base_model: str
    experts: tuple[RoutedExpert, ...]
    router: RouterShape
    redundant: str = "router"
    seed: int = 0
    report: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write routed_config.json."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        write_json(directory / CONFIG_NAME, content, indent=2)

    @classmethod
    def read(cls, directory: Path) -> RoutedConfig:
        """Read routed_config.json.

        Raises:
            UserError: it is not there, damaged, of another format, or of a version that is not known here.
        """
        path = directory / CONFIG_NAME
        if not path.is_file():
            raise UserError(f"{directory}: no {CONFIG_NAME} in it, so this is no routed model")
        content = read_object(path, again=_AGAIN)
        if content.pop("format", None) != FORMAT:
            raise UserError(f"{path}: its format is not {FORMAT!r}, so this is no routed model")
        version = content.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version {version!r} is not known here (known: {FORMAT_VERSION}); upgrade this package"
            )
        try:
            experts = tuple(RoutedExpert(e["name"], tuple(e["redundant_layers"])) for e in content.pop("experts"))
            shape = content.pop("router")
            router = RouterShape(**{**shape, "layers": tuple(shape["layers"])})
            return cls(experts=experts, router=router, **content)
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}); {_AGAIN}") from None

    def base_reference(self, directory: Path) -> str:
        """Say where the base is: a hub id, or the path of a directory."""
        if not self.base_is_local:
            return self.base_model
        return str(Path(os.path.normpath(directory / self.base_model)))

    @property
    def base_is_local(self) -> bool:
        """Whether the base is a directory, and nobody else's machine has it."""
        return self.base_model.startswith(".") or os.path.isabs(self.base_model)


def is_routed(path: str | os.PathLike[str]) -> bool:
    """Tell whether a local directory holds a routed model."""
    return (Path(path) / CONFIG_NAME).is_file()


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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    hub_answers()
    try:
        return Path(snapshot_download(path_or_repo, revision=revision, cache_dir=cache_dir))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{path_or_repo}: neither a directory nor a repository that can be had from the hub ({first_line(error)})"
        ) from None
