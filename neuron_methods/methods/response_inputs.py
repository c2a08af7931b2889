"""What the experts' profiles say of a merge by response: the inputs of each module, or why they say nothing."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neuron_methods.kernels.task_vectors import LowRankTaskVector, TaskVector
from neuron_methods.methods.contract import PlannedTensor, TensorPlace, by_expert
from neuron_methods.methods.inputs_file import InputsFile
from neuron_methods.support.errors import UserError, explained_by

MAKE = "mergekit-neuron profile --inputs"


class MeasuredInputs:
    """The profiles of one merge by response."""

    def __init__(self, tensors: Sequence[PlannedTensor], method: str) -> None:
        """Open the profiles, and hold them to the merge.

        Raises:
            UserError: one is missing, damaged, not read, of another kind of model, of other modules or widths; or
                nothing tells which modules the tensors belong to.
        """
        self._files: dict[str, InputsFile] = {}
        for expert, paths in by_expert(tensors, "profile").items():
            asking = [tensor for tensor in tensors if source_of(tensor.expert_parameters, expert) != "update"]
            if not asking and any(paths):
                raise UserError(
                    f"{method}: {expert} has profile, which inputs: update does not read; set inputs: profile or "
                    "both, or leave profile out"
                )
            if asking:
                self._hold(asking, expert, method)

    def factors(
        self, name: str, place: TensorPlace, parameters: Mapping[str, Any], base: Tensor, expert: Hashable, has: Tensor
    ) -> list[Tensor | None]:
        """List the factors of an expert's inputs of a tensor; None stands for the update.

        Args:
            name: of the tensor.
            place: where it stands.
            parameters: of the method.
            base: θ₀.
            expert: whose.
            has: θ_t, or a `TaskVector`.

        Raises:
            UserError: the profile lacks a linear module that the expert changes, or holds NaN or Inf.
        """
        source = source_of(parameters, expert)
        if source == "update":
            return [None]
        file = self._files[parameters["profile"][expert]]
        factor = file.factor_of(place.module) if place.module is not None else None
        if factor is not None and place.width is not None:
            return [file.read(factor), None] if source == "both" else [file.read(factor)]
        if place.width is not None and _changes(has, base):
            raise UserError(
                f"{name}: {expert} changes it, and profile {file.path} has no inputs of {place.module}; measure all "
                f"modules with {MAKE}, or set inputs: update for it"
            )
        return [None]

    @explained_by("inputs")
    def _hold(self, tensors: Sequence[PlannedTensor], expert: Hashable, method: str) -> None:
        """Hold an expert's profiles to the tensors that ask for them."""
        model = tensors[0].model
        if model is None:
            raise UserError(
                f"{method}: inputs of {expert}: the model's class tells which module a tensor belongs to, and this "
                "merge is of tensors alone; use inputs: update, or merge model directories"
            )
        places = {tensor.name: tensor.place() for tensor in tensors}
        if not any(places.values()):
            kind = (model.config.architectures or ["the model's class"])[0]
            raise UserError(
                f"{method}: inputs of {expert}: {kind} is not to be had from transformers, so nothing tells which "
                "module a tensor belongs to; use inputs: update"
            )
        files = {}
        for tensor in tensors:
            path = tensor.expert_parameters["profile"].get(expert)
            if not path:
                raise UserError(
                    f"{method}: inputs: {tensor.expert_parameters['inputs'][expert]} of {expert} needs profile: FILE; "
                    f"{MAKE} makes one"
                )
            files.setdefault(path, []).append((tensor.name, places[tensor.name]))
        for path, asking in files.items():
            file = self._files.setdefault(path, InputsFile.open(path))
            _check(file, asking, model.config.model_type, expert)


def source_of(parameters: Mapping[str, Any], expert: Hashable) -> str:
    """Tell where an expert's inputs are taken from: `auto` is both where it has a profile, else the update."""
    asked = parameters["inputs"].get(expert, "update")
    return asked if asked != "auto" else "both" if parameters["profile"].get(expert) else "update"


@explained_by("inputs")
def _check(
    file: InputsFile, asking: Iterable[tuple[str, TensorPlace | None]], model_type: str, expert: Hashable
) -> None:
    """Refuse a profile of another kind of model, of other modules, or of other widths."""
    shown, info = f"profile {file.path} of {expert}", file.info
    if info.model_type != model_type:
        raise UserError(f"{shown}: measured on a model of type {info.model_type}, the merge is of {model_type}")
    linear = [(name, place) for name, place in asking if place is not None and place.width is not None]
    found = 0
    for name, place in linear:
        factor = file.factor_of(place.module or "")
        if factor is None:
            continue
        found += 1
        if file.width(factor) != place.width:
            raise UserError(
                f"{shown}: {place.module} has {file.width(factor)} inputs there, {place.width} in the merge ({name}); "
                f"measure this expert with {MAKE}"
            )
    if linear and not found:
        other = next(iter(info.modules), "none at all")
        raise UserError(
            f"{shown}: has inputs of none of the merge's modules (it has {other}, the merge {linear[0][1].module}); "
            f"measure this expert with {MAKE}"
        )


def _changes(has: Tensor, base: Tensor) -> bool:
    """Tell whether an expert changes a tensor."""
    if isinstance(has, LowRankTaskVector):
        return len(has.a) > 0
    return bool(has.dense().any()) if isinstance(has, TaskVector) else not torch.equal(has, base)
