"""Merging by response: every neuron answers each expert's inputs as that expert's neuron does, and nothing else.

Our own method; its kin are named in kernels/response.py, where the formula stands. For each weight matrix:

1. Split    drop from every neuron's update what is parallel to its base weights (NeuroMerging, arXiv:2503.05320,
            step 2): `subspace: orthogonal`; `all` leaves it
2. Inputs   of an expert: the rows of its update (no data), measured ones, or half and half, which is the default where
            it has a profile: `inputs`
3. Merge    the update that answers every expert's inputs as that expert does, by least squares with a `ridge`; what no
            expert's inputs say anything about goes `toward` zero, the mean or the sum of the updates
4. Scale    what a ridge toward zero shrinks is undone; λ is `lambda` times that
5. Points   0-D and 1-D tensors have no inputs to tell apart: mean, or sum, of the updates
6. Tokens   tables of token embeddings are no linear layers: mean of the updates, or rows as in 3

An adapter's update stays in its factors: neither it nor a d × d matrix is formed, and what comes out is of the rank of
all of them together, unless step 1 is asked for: taking c w out of every neuron leaves no low rank.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neuron_methods.kernels.answers import scratch_bytes
from neuron_methods.kernels.low_rank import LowRank
from neuron_methods.kernels.means import mean_bytes
from neuron_methods.kernels.response import (
    Expert,
    Response,
    ResponseOptions,
    decompose_responses,
    decomposed_bytes,
    merge_responses,
)
from neuron_methods.kernels.rows import is_points, neuron_rows, row_blocks
from neuron_methods.kernels.spectrum import remove_parallel_
from neuron_methods.kernels.task_vectors import LowRankTaskVector, TaskVector, fill_task_vector
from neuron_methods.methods.contract import (
    Inputs,
    LowRankUpdate,
    PlannedMethod,
    PlannedTensor,
    PreparedMerge,
    TensorPlace,
    by_expert,
    nonfinite,
)
from neuron_methods.methods.parameters import choice, method_spec, number, text
from neuron_methods.methods.response_inputs import MeasuredInputs, source_of
from neuron_methods.support.errors import UserError
from neuron_methods.support.sources import ACTMAT, FANG, REGMEAN, WUDI, Kin, ours

NAME = "neuron_response"


class NeuronResponse(PlannedMethod):
    """The method `neuron_response` as mergekit sees it."""

    takes_low_rank = True
    cheap = ("ridge",)

    spec = method_spec(
        NAME,
        "merging by response",
        None,
        number("weight", 0, default=1.0, of="expert", about="how much the expert's inputs count; ratios matter"),
        number(
            "ridge",
            0,
            words=("auto",),
            default="auto",
            about="how firmly directions that no input takes are held; auto: 0.1, more for adapters without profiles",
        ),
        choice("toward", "mean", "sum", "zero", about="what holds where no expert's inputs say anything"),
        choice("subspace", "all", "orthogonal", about="merge all, or what is orthogonal to each neuron's base weights"),
        choice(
            "inputs",
            "auto",
            "update",
            "profile",
            "both",
            of="expert",
            about="where the expert's inputs are taken from; auto: both if it has a profile, else its update",
        ),
        text("profile", of="expert", about="file of mergekit-neuron profile --inputs, of this expert on its task"),
        number(
            "rows",
            0,
            words=("auto",),
            whole=True,
            default="auto",
            about="rows of an update that stand for its inputs, at most; auto: 3/16 of its rank, 128 to 512; 0: all",
        ),
        choice("loudness", "equal", "own", about="experts count alike, or by the energy of their updates"),
        number("lambda", default=1.0, about="scale of the merged update, times what undoes the ridge's shrinking"),
        choice("points", "mean", "sum", about="how norms and biases are merged"),
        choice("embeddings", "mean", "rows", about="token embeddings: mean of the updates, or by response"),
        ours=(
            ours(
                "that experts count alike, by dividing the inputs of each by their energy; the few directions of an "
                "update that stand for its inputs; the ridge, and that its shrinking is undone; what holds where no "
                "inputs say anything; adapters that stay in their factors; token embeddings, norms and biases by their "
                "mean"
            ),
        ),
        kin=(
            Kin(WUDI, "the objective, to which it descends step by step; here it is solved, with a ridge"),
            Kin(ACTMAT, "the closed form without data, at ridge 0, toward zero, with experts as loud as their updates"),
            Kin(REGMEAN, "the closed form with measured inputs, at ridge 0"),
            Kin(FANG, "the split of a neuron's update at its base weights, which `subspace: orthogonal` takes over"),
        ),
    )

    def prepare(self, tensors: Sequence[PlannedTensor]) -> PreparedNeuronResponse:
        """Open the experts' profiles, and refuse those that do not fit the merge.

        Raises:
            UserError: naming the profile, and what it lacks.
        """
        return PreparedNeuronResponse(tensors)


class PreparedNeuronResponse(PreparedMerge):
    """One merge by `neuron_response`.

    Attributes:
        inputs: what the experts' profiles say.
    """

    def __init__(self, tensors: Sequence[PlannedTensor]) -> None:
        """See `NeuronResponse.prepare`."""
        self._planned = {tensor.name: tensor for tensor in tensors}
        if not any(map(any, by_expert(tensors, "weight").values())):
            raise UserError(f"{NAME}: weight is 0 for every expert and tensor, so nothing would be merged")
        self.inputs = MeasuredInputs(tensors, NAME)

    def merge_tensor(self, inputs: Inputs, parameters: Mapping[str, Any], out_dtype: torch.dtype) -> Tensor:
        """Take steps 1 to 6 for one tensor."""
        name, base = inputs.name, inputs.base
        weights = {e: float(parameters["weight"][e]) for e in inputs.experts if parameters["weight"][e] > 0}
        experts = {e: inputs.experts[e] for e in weights}
        place = self._place(name)
        points = is_points(name, base.ndim)
        if points or self._is_mean_of_tokens(name, parameters):
            summed = points and parameters["points"] == "sum"
            return self.averaged(inputs, parameters, out_dtype, parameters["lambda"], summed=summed)
        merged = torch.empty(base.shape, dtype=out_dtype, device=base.device)
        if not experts or not base.numel():
            return merged.copy_(base)
        ridge = None if parameters["ridge"] == "auto" else parameters["ridge"]
        options = ResponseOptions(ridge, parameters["toward"], parameters["loudness"], _rows(parameters))
        if place.width is None and any(source_of(parameters, expert) != "update" for expert in experts):
            self.tell(name, without=1)
        measured = [self.inputs.factors(name, place, parameters, base, e, has) for e, has in experts.items()]
        for index, (origin, updates, target) in enumerate(_matrices(base, experts, place, merged)):
            taking = [
                Expert(self._update(name, origin, update, expert, parameters), weights[expert], factors)
                for (expert, update), factors in zip(updates.items(), measured, strict=True)
            ]
            found = self._response((name, index), taking, (origin.shape[0], origin.shape[1]), options, parameters)
            self.tell(name, energy=found.energy, missed=found.missed, matrices=1)
            self._write(name, origin, found.update, parameters["lambda"], target)
            if self.low_rank is not None and isinstance(found.update, LowRank) and found.moments is not None:
                scaled = LowRank(found.update.b * parameters["lambda"], found.update.a)
                self.low_rank[name] = LowRankUpdate(scaled, found.moments)
        return merged

    def effort(self, name: str) -> float:
        """See `PreparedMerge.effort`: a mean takes a fifth of the time, as `linear` does beside this method."""
        planned = self._planned.get(name)
        return 0.2 if planned is not None and self._is_mean_of_tokens(name, planned.parameters) else 1.0

    def scratch(self, name: str, shape: Sequence[int], experts: int) -> int:
        """See `PreparedMerge.scratch`: T, the system, in float64 where need be, the update, and the result."""
        if is_points(name, len(shape)):
            return super().scratch(name, shape, experts)
        planned, entries = self._planned.get(name), math.prod(shape)
        if planned is not None and self._is_mean_of_tokens(name, planned.parameters):
            return mean_bytes(entries, self.settings.scratch_bytes)
        transposed = self._place(name).role in ("transposed", "packed_transposed")
        rows, width = (shape[-1], shape[-2]) if transposed else (shape[0], math.prod(shape[1:]))
        asked = _rows(planned.parameters) if planned is not None else None
        return scratch_bytes((rows, width), experts, ResponseOptions(rows=asked)) + 4 * entries

    def findings(self) -> list[str]:
        """Tell how much of the experts' answers the merge keeps, and what had no inputs."""
        lines, energy = [], self.total("energy")
        if energy:
            kept, matrices = 1 - (self.total("missed") / energy) ** 0.5, int(self.total("matrices"))
            lines.append(f"response kept: {kept:.1%} of what the experts' {matrices} matrices answer to their inputs")
        if without := [name for name, told in self.told.items() if "without" in told]:
            lines.append(
                f"merged by their updates, as they are no linear layers: {len(without)}, such as {min(without)}"
            )
        return lines

    def _response(
        self,
        matrix: Hashable,
        experts: Sequence[Expert],
        shape: tuple[int, int],
        options: ResponseOptions,
        parameters: Mapping[str, Any],
    ) -> Response:
        """Step 3; by one decomposition for all ridges, where other merges are to follow and there is room for it."""
        if self.common is not None:
            others = (p.name for p in NeuronResponse.spec.parameters if p.name not in (*NeuronResponse.cheap, "lambda"))
            found = self.common.have(
                matrix,
                repr([(name, _listed(parameters[name])) for name in others]),
                decomposed_bytes(experts, shape, options),
                lambda: decompose_responses(experts, shape, options),
            )
            if found is not None:
                return found.merge(options.ridge)
        return merge_responses(experts, shape, options)

    def _is_mean_of_tokens(self, name: str, parameters: Mapping[str, Any]) -> bool:
        return self._place(name).role == "tokens" and parameters["embeddings"] == "mean"

    def _place(self, name: str) -> TensorPlace:
        planned = self._planned.get(name)
        return (planned.place() if planned is not None else None) or TensorPlace.guessed(name)

    def _update(self, name: str, base: Tensor, expert: Tensor, model: Hashable, parameters: Mapping[str, Any]) -> Any:
        """Steps 1 and 2 of one expert's matrix: its update as it is merged."""
        split, clean = parameters["subspace"] == "orthogonal", self.settings.allow_nonfinite
        if isinstance(expert, LowRankTaskVector):
            b, a = (expert.b, expert.a) if len(expert.a) else _no_rank(base)
            finite = all(bool(torch.isfinite(factor).all()) for factor in (b, a))
            if not finite and not clean:
                raise nonfinite(name, base, model)
            if finite and not split:
                return LowRank(b, a)
            expert = (b @ a).as_subclass(TaskVector)

        def form(block: slice) -> Tensor:
            origin = base[block]
            update = torch.empty(origin.shape, dtype=torch.float32, device=base.device)
            fill_task_vector(update, expert[block], origin, clean=clean)
            # The sum of what is finite may be Inf; entries are looked at only where it is.
            if not bool(torch.isfinite(update.sum())) and not bool(torch.isfinite(update).all()):
                raise nonfinite(name, base, model)
            return remove_parallel_(update, origin.float()) if split else update

        return form

    def _write(self, name: str, base: Tensor, update: Tensor | LowRank, scale: float, merged: Tensor) -> None:
        """Write θ₀ + λ s Δ."""
        for block in row_blocks(len(base), 8 * base.shape[1], self.settings.scratch_bytes):
            part = update.b[block] @ update.a if isinstance(update, LowRank) else update[block]
            merged[block].copy_(torch.add(base[block].float(), part.to(base.device), alpha=scale))


def _matrices(
    base: Tensor, experts: Mapping[Hashable, Tensor], place: TensorPlace, merged: Tensor
) -> Iterator[tuple[Tensor, dict[Hashable, Tensor], Tensor]]:
    """List the matrices of a tensor, neurons as rows: (base, {expert: what it has}, where the merge goes)."""
    transposed = place.role in ("transposed", "packed_transposed")
    if place.role in ("packed", "packed_transposed") and base.ndim == 3:
        stacks = {e: _formed(t) for e, t in experts.items()}
        stacked = [(base[i], {e: t[i] for e, t in stacks.items()}, merged[i]) for i in range(len(base))]
    else:
        rows = {e: t if isinstance(t, LowRankTaskVector) else neuron_rows(t) for e, t in experts.items()}
        stacked = [(neuron_rows(base), rows, neuron_rows(merged))]
    for origin, updates, target in stacked:
        if transposed:
            turned = {e: t if isinstance(t, LowRankTaskVector) else t.T for e, t in updates.items()}
            yield origin.T, turned, target.T
        else:
            yield origin, updates, target


def _formed(tensor: Tensor) -> Tensor:
    """The tensor, or the task vector with entries of its own."""
    return tensor.dense().as_subclass(TaskVector) if isinstance(tensor, LowRankTaskVector) else tensor


def _no_rank(base: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of rank 0 for what an adapter leaves alone, neurons as rows, however the weight is stored."""
    like = torch.empty(0, dtype=torch.float32, device=base.device)
    return like.new_zeros(base.shape[0], 0), like.new_zeros(0, base.shape[1])


def _rows(parameters: Mapping[str, Any]) -> int | None:
    """The parameter `rows`, None for `auto`."""
    return None if parameters["rows"] == "auto" else int(parameters["rows"])


def _listed(value: Any) -> Any:
    """A parameter's value in words that are the same in every merge."""
    return [(str(key), each) for key, each in value.items()] if isinstance(value, Mapping) else value
