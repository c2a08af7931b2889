"""What an adapter keeps of one merged tensor: factors of its update, or the tensor as it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from neuron_methods.adapters.factor import factor
from neuron_methods.adapters.placement import FACTORED, Place, layout_shape, reshape_experts, stack_padded
from neuron_methods.kernels.low_rank import truncated
from neuron_methods.methods.contract import LowRankUpdate
from neuron_methods.support.errors import UserError


@dataclass(frozen=True)
class Precision:
    """How updates are factored, and factors are reduced.

    Attributes:
        rank: at most this; None for no bound.
        energy: share of each update's energy to keep, in (0, 1]; None to go by rank alone.
        dtype: of what is written.
        asked: whether somebody has asked for this rank; if not, what a method has in factors itself keeps them all.
    """

    rank: int | None = 64
    energy: float | None = None
    dtype: torch.dtype = torch.float32
    asked: bool = True


@dataclass(frozen=True)
class Kept:
    """What an adapter keeps of one tensor.

    Attributes:
        tensors: the factors `a` and `b` as peft lays them out, or the tensor `whole`, in float32; none where peft has
            no place for it.
        figures: of factors: `energy` ‖ΔW‖² and `error` ‖ΔW − B·A‖², and, where a method has them itself, `answered`:
            the share of its responses, squared, that they keep.
    """

    tensors: dict[str, Tensor]
    figures: dict[str, float] = field(default_factory=dict)


def kept_of(
    name: str,
    place: Place,
    precision: Precision,
    base: Tensor,
    merged: Tensor,
    low_rank: LowRankUpdate | None = None,
    *,
    allow_nonfinite: bool = False,
) -> Kept | None:
    """Find what an adapter keeps of a tensor; None where the merge leaves it as the base has it.

    Args:
        name: of the tensor.
        place: where peft has it.
        precision: how to factor.
        base: the base's weight, any float dtype and device.
        merged: what the merge makes of it, likewise.
        low_rank: the merged update in factors, where its method has them.
        allow_nonfinite: keep a tensor that holds NaN or Inf; no matrix that does can be factored.

    Raises:
        UserError: the update is not finite, and that is not allowed or it is to be factored.
    """
    merged = merged.to("cpu").float()
    update = merged - base.to("cpu").float()
    stored_whole = place.kind not in FACTORED
    if not bool(torch.isfinite(update).all()) and not (allow_nonfinite and stored_whole):
        raise UserError(f"{name}: the merged update holds NaN or Inf; use sound checkpoints or smaller weights")
    if not bool(update.any()):
        return None
    if not place.module:
        return Kept({})
    if low_rank is not None and place.kind in ("linear", "transposed", "convolution"):
        kept = _reduced(precision, low_rank)
    elif stored_whole:
        return Kept({"whole": merged})
    else:
        kept = _factored(place, precision, update)
    if place.kind == "convolution":
        a, b = kept.tensors["a"], kept.tensors["b"]
        a, b = a.reshape(len(a), *update.shape[1:]), b.reshape(*b.shape, *[1] * (update.ndim - 2))
        return Kept({"a": a, "b": b}, kept.figures)
    return kept


def _factored(place: Place, precision: Precision, update: Tensor) -> Kept:
    stacked = place.kind in ("experts", "experts_transposed")
    laid = layout_shape(update, place.kind)
    each = laid if stacked else (laid,)
    found = [factor(m, rank=precision.rank, energy=precision.energy, dtype=precision.dtype) for m in each]
    rank = max(one.rank for one in found)
    a, b = found[0].a, found[0].b
    if stacked:
        a, b = reshape_experts(
            stack_padded([one.a for one in found], rank, 0), stack_padded([one.b for one in found], rank, 1)
        )
    energy, error = sum(one.energy for one in found), sum(one.error for one in found)
    return Kept({"a": a, "b": b}, {"rank": rank, "energy": energy, "error": error})


def _reduced(precision: Precision, given: LowRankUpdate) -> Kept:
    """Take a method's own factors: all of them, or those of lower rank that answer most alike."""
    rank = precision.rank if precision.asked else None
    reduced, answered = truncated(*given, rank, precision.energy)
    a, b = (t.to("cpu", precision.dtype).contiguous() for t in (reduced.a, reduced.b))
    whole = given.update.dense().to("cpu")
    energy = float(whole.double().square().sum())
    error = float((whole - b.float() @ a.float()).double().square().sum())
    return Kept({"a": a, "b": b}, {"rank": len(a), "energy": energy, "error": error, "answered": answered})
