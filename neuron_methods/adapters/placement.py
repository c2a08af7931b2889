"""Where the tensors of a model go in an adapter: which are factored, which are stored whole, which have no place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from neuron_methods.adapters.checkpoint_names import StoredNames
from neuron_methods.models.kinds import facts_of
from neuron_methods.models.skeleton import Skeleton
from neuron_methods.support.errors import UserError

# How a tensor enters an adapter. The layouts are those of `updates.Layout`; `parameter` is a matrix that LoRA targets
# by name; a `bias` is stored as peft stores trained biases; `whole` is stored with its module.
Kind = Literal[
    "linear", "transposed", "embedding", "convolution", "experts", "experts_transposed", "parameter", "bias", "whole"
]
FACTORED: Collection[Kind] = (
    "linear",
    "transposed",
    "embedding",
    "convolution",
    "experts",
    "experts_transposed",
    "parameter",
)


@dataclass(frozen=True)
class Place:
    """Where one tensor goes.

    Attributes:
        module: path of its module in memory; "" for a parameter of the model itself, which peft has no place for.
        parameter: its name there.
        kind: how it is written.
    """

    module: str
    parameter: str
    kind: Kind

    @property
    def path(self) -> str:
        """The parameter's path in memory."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


def place(names: StoredNames, stored: str, base: str) -> Place:
    """Find where a tensor goes in an adapter.

    Args:
        names: of the base's tensors.
        stored: its name in the base's checkpoint, or its path in memory where the base only ties it.
        base: the base as the user named it, for messages.

    Raises:
        UserError: an adapter cannot hold it.
    """
    if names.skeleton is None:
        architecture = (names.config.architectures or ["an unknown class"])[0]
        raise UserError(f"{base}: {architecture} is not a model of transformers', so no adapter can be written for it")
    path = names.path_of(stored)
    if path is None and stored not in names.stored:
        path = stored
    if path is None:
        raise UserError(
            f"{base}: {stored} is a part of a larger tensor once transformers 5 has loaded it, which an adapter cannot "
            "update apart from the rest; write the merge as a model instead"
        )
    return place_parameter(names.skeleton, path)


def place_parameter(skeleton: Skeleton, path: str) -> Place:
    """Find where the parameter at this path in memory goes."""
    module, _, parameter = path.rpartition(".")
    return Place(module, parameter, _kind(skeleton.modules.get(module), module, parameter))


def settle(places: Mapping[str, Place]) -> dict[str, Place]:
    """Store everything below a module whole that is stored whole, as ViT's embeddings are for their bare parameters.

    Args:
        places: {name: place} of all tensors that may change.
    """
    whole = {place.module for place in places.values() if place.kind == "whole" and place.module}
    settled = {}
    for name, found in places.items():
        within = any(found.module == module or found.module.startswith(f"{module}.") for module in whole)
        settled[name] = replace(found, kind="whole") if within else found
    return settled


def _kind(module: nn.Module | None, path: str, parameter: str) -> Kind:
    if parameter == "weight":
        if isinstance(module, nn.Linear):
            return "linear"
        if isinstance(module, nn.Embedding):
            return "embedding"
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1:
            return "convolution"
        if type(module).__name__ == "Conv1D":  # of transformers
            return "transposed"
    if parameter == "bias" and isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "bias"
    if parameter == "bias" and type(module).__name__ == "Conv1D":
        return "bias"
    weight = getattr(module, parameter, None)
    if path.rpartition(".")[2] == "experts" and isinstance(weight, Tensor):
        if weight.ndim == 3:
            return "experts_transposed" if getattr(module, "is_transposed", False) else "experts"
        if weight.ndim == 2:
            return "parameter"
    return "whole"


def holds_modules(skeleton: Skeleton, place: Place) -> bool:
    """Tell whether storing this tensor's module whole would store other modules, too."""
    module = skeleton.modules.get(place.module)
    return module is not None and any(next(child.parameters(), None) is not None for child in module.children())


def target_names(paths: Iterable[str], modules: Collection[str]) -> list[str] | str:
    """Make `target_modules` that hit these modules and no others.

    Args:
        paths: of the modules to hit.
        modules: paths of all modules of the model.

    Returns:
        Last parts of the paths where each stands for all modules of that name, otherwise whole paths; a regular
        expression where even those would hit others.
    """
    paths = sorted(paths)
    leaves: dict[str, list[str]] = {}
    for path in paths:
        leaves.setdefault(path.rpartition(".")[2], []).append(path)
    targets: list[str] = []
    for leaf, members in leaves.items():
        everywhere = [path for path in modules if path.rpartition(".")[2] == leaf]
        targets += [leaf] if sorted(everywhere) == members else members
    hit = [path for path in modules if any(path == t or path.endswith(f".{t}") for t in targets)]
    if sorted(hit) == paths:
        return targets
    return "|".join(path.replace(".", r"\.") for path in paths)


def saved_modules(paths: Iterable[str], skeleton: Skeleton) -> dict[str, list[str]]:
    """List what peft will store whole if `modules_to_save` names these modules; it looks at the ends of paths only.

    Returns:
        {path of a module: paths of its parameters}, of none that lies within another: peft loads no module twice.
    """
    named = set(paths)
    wanted = tuple(path for path in named if not any(path.startswith(f"{other}.") for other in named))
    if not wanted:
        return {}
    found: dict[str, list[str]] = {}
    for path, module in skeleton.modules.items():
        if path.endswith(wanted):
            found[path] = [f"{path}.{name}" for name in module.state_dict()]
    return found


def layout_shape(weight: Tensor, kind: Kind) -> Tensor:
    """Give the matrix (out, in) that factors are taken of; see `updates.low_rank_delta`. For experts, a stack."""
    if kind in ("transposed", "embedding"):
        return weight.T
    if kind == "convolution":
        return weight.flatten(1)
    return weight.transpose(1, 2) if kind == "experts_transposed" else weight


def task_type(architecture: str) -> str | None:
    """Name the task type as peft names it, for the two that change nothing about which modules are stored."""
    facts = facts_of(architecture)
    return facts.peft_task if facts else None


def reshape_experts(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Lay out factors of a stack as peft stores them: (experts, r, in) and (experts, out, r) as two matrices."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def stack_padded(factors: Sequence[Tensor], rank: int, axis: int) -> Tensor:
    """Stack matrices after filling `axis` up to `rank` with zeros."""
    padded = []
    for matrix in factors:
        shape = list(matrix.shape)
        shape[axis] = rank - shape[axis]
        padded.append(torch.cat([matrix, matrix.new_zeros(shape)], dim=axis))
    return torch.stack(padded)
