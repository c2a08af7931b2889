"""How important every neuron is to every expert: norms streamed from the weights, statistics from profiles."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neuron_methods.kernels.select import keep_threshold, relative_norms, slice_squares
from neuron_methods.methods.contract import MergeSettings, PlannedTensor, grouped, nonfinite
from neuron_methods.methods.neuron_layout import NeuronLayout, Slices
from neuron_methods.neurons.profile_file import NeuronProfile
from neuron_methods.support.errors import UserError

# (statistic, {layer: its values, shape (neurons,)}), as an expert's profile has them
ProfileStatistic = tuple[str, dict[str, Tensor]]


@dataclass
class NeuronNorms:
    """Squared norms per block: of base weights, and per expert of updates and of outgoing weights."""

    base: dict[str, Tensor] = field(default_factory=dict)
    update: dict[tuple[str, Hashable], Tensor] = field(default_factory=dict)
    outgoing: dict[tuple[str, Hashable], Tensor] = field(default_factory=dict)

    def importance(self, block: str, expert: Hashable, source: ProfileStatistic | None) -> Tensor:
        """Take step 1: a block's importance to an expert, shape (neurons,), float64."""
        if source is None:
            zero = torch.zeros_like(self.base[block])
            return relative_norms(self.update.get((block, expert), zero), self.base[block])
        statistic, values = source
        if statistic == "taylor":
            return values[block]
        return values[block] * self.outgoing[block, expert].sqrt()


def measure_norms(layout: NeuronLayout, tensors: Sequence[PlannedTensor], settings: MergeSettings) -> NeuronNorms:
    """Stream once over tensors that belong to neurons, each counted once.

    Raises:
        UserError: an input holds NaN or Inf, or a tensor has not one slice per neuron.
    """
    norms = NeuronNorms()
    clean = settings.allow_nonfinite
    # The tensors of a block stay together, so that its sums are made in one process.
    blocks = list(grouped(tensors, lambda tensor: layout.slices[tensor.name].block).values())
    mine = settings.share.mine([[tensor.name for tensor in together] for together in blocks])
    for tensor in settings.progress("Measuring neurons", [tensor for number in mine for tensor in blocks[number]]):
        base, found = tensor.load()
        if base is None or not base.is_floating_point():
            continue
        slices = layout.slices[tensor.name]
        slices.check_shape(tensor.name, base)
        where = {"axis": slices.axis, "copies": slices.copies}
        block = slices.block
        norms.base[block] = norms.base.get(block, 0.0) + slice_squares(base, None, **where)
        for expert, weights in found.items():
            squares = slice_squares(base, weights, clean=clean, **where)
            if not bool(torch.isfinite(squares).all()):
                raise nonfinite(tensor.name, base, expert)
            norms.update[block, expert] = norms.update.get((block, expert), 0.0) + squares
            if slices.outgoing:
                squares = slice_squares(base, weights, update=False, clean=clean, **where)
                norms.outgoing[block, expert] = norms.outgoing.get((block, expert), 0.0) + squares
    parts = settings.share.exchange(norms)
    return NeuronNorms(
        {block: values for part in parts for block, values in part.base.items()},
        {key: values for part in parts for key, values in part.update.items()},
        {key: values for part in parts for key, values in part.outgoing.items()},
    )


def read_importance(
    layout: NeuronLayout, expert: Hashable, *, importance: str, profile: str, data: str
) -> ProfileStatistic | None:
    """Read what an expert's profile says of its neurons; None for `magnitude`, which needs none.

    The parameters are those of `min_merging`: `profile` is a path or "", `data` a source within the profile or "".

    Raises:
        UserError: parameters contradict each other, or the profile cannot be read, is of another model, or lacks what
            is asked of it.
    """
    if importance == "magnitude":
        if profile or data:
            raise UserError(
                f"min_merging: {expert} has {'profile' if profile else 'data'}, which importance: magnitude does not "
                "read; set importance: activation or taylor, or leave it out (that of rest: neuron_response is called "
                "rest_profile)"
            )
        return None
    if not profile:
        raise UserError(
            f"min_merging: importance: {importance} of {expert} needs profile: FILE; `mergekit-neuron profile {expert} "
            "--data ... -o FILE` makes one"
        )
    if layout.model is None:
        raise UserError(
            f"min_merging: importance: {importance} needs the model's config to make sure that its profile fits, and "
            "this merge is of tensors alone; use importance: magnitude, or merge model directories"
        )
    found = NeuronProfile.load(profile)
    found.check_model(layout.neurons)
    layout.model.check_unchanged(f"profile {profile}", expert, found.info.model, found.info.weights)
    statistic = "mean_abs" if importance == "activation" else "taylor"
    sources = [data] if data else found.sources
    values = {}
    for layer in layout.neurons.neurons:
        tokens = torch.tensor([found.tokens(s, layer) for s in sources], dtype=torch.float64)
        stacked = torch.stack([found.statistic(statistic, s, layer).double() for s in sources])
        values[layer] = (stacked * tokens.unsqueeze(1)).sum(dim=0) / tokens.sum().clamp(min=1)
    return statistic, values


def select(
    importances: dict[str, Tensor], blocks: Sequence[Slices], densities: dict[str, float], scope: str
) -> dict[str, Tensor]:
    """Take step 2: which neurons an expert keeps.

    Args:
        importances: block -> importance, shape (neurons,).
        blocks: the blocks, of one kind.
        densities: block -> share of neurons kept; the same wherever blocks are ranked together.
        scope: `model` ranks all blocks together, `layer` those of a layer.

    Returns:
        Block -> bool, shape (neurons,).
    """
    kept = {}
    for ranked in grouped(blocks, lambda slices: "" if scope == "model" else slices.layer).values():
        together = [slices.block for slices in ranked]
        threshold = keep_threshold(torch.cat([importances[b] for b in together]), densities[together[0]])
        kept.update({b: importances[b] >= threshold for b in together})
    return kept
