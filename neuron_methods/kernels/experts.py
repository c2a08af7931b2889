"""What is merged by response: experts' parts in a matrix, what their inputs weigh, and what is held toward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from neuron_methods.kernels.low_rank import LowRank
from neuron_methods.kernels.moments import wide
from neuron_methods.kernels.rows import CACHE_BYTES, add_up, condensed, row_blocks

# Rows that stand for the inputs of an update, as a share of its rank.
SHARE = 3 / 16
# How many rows are drawn for each of them.
DRAWN = 8


@dataclass(frozen=True)
class Expert:
    """One expert's part in a matrix.

    Attributes:
        update: Δ_t of low rank, or what gives rows of it as float32 (some of n, d), anew at each call.
        weight: w_t, at least 0; only ratios matter.
        inputs: factors F_t, each (rows, d) of any float dtype, which count alike; None stands for the update itself.
            What is all zeros says nothing.
    """

    update: LowRank | Callable[[slice], Tensor]
    weight: float = 1.0
    inputs: Sequence[Tensor | None] = (None,)

    def rows(self, block: slice) -> Tensor:
        """Form rows of Δ_t."""
        return self.update.b[block] @ self.update.a if isinstance(self.update, LowRank) else self.update(block)


@dataclass(frozen=True)
class ResponseOptions:
    """What merging by response takes beside the experts.

    Attributes:
        ridge: ρ in units of the mean of S's diagonal; 0 for a pseudo-inverse; None for `automatic_ridge`.
        toward: T: ``zero``, or the ``mean`` or the ``sum`` of the updates, by weight; of one expert both are its own.
            An expert with neither update nor measured inputs does not count.
        loudness: ``equal``, or ``own``: an expert counts by ‖Δ_t‖², too.
        rows: of an update that stand for its inputs, at most; 0 for all, None for `automatic_rows`.
    """

    ridge: float | None = None
    toward: str = "mean"
    loudness: str = "equal"
    rows: int | None = 0

    def rows_of(self, shape: tuple[int, int]) -> int:
        """Count the rows that stand for the inputs of a full update (n, d)."""
        return min((automatic_rows(shape) if self.rows is None else self.rows) or shape[0], shape[0])


def taking(experts: Sequence[Expert]) -> list[Expert]:
    """List those that take part.

    Raises:
        ValueError: no expert has a weight above 0.
    """
    found = [expert for expert in experts if expert.weight > 0]
    if not found:
        raise ValueError("all experts weigh 0")
    return found


def automatic_rows(shape: tuple[int, int]) -> int:
    """Choose how many rows stand for the inputs of an update (n, d): `SHARE` of its rank, 128 to 512.

    Chosen on validation data of the zoos under examples/zoo: see recipes/README.md.
    """
    return min(max(math.ceil(SHARE * min(shape)), 128), 512)


def own_rows(expert: Expert, shape: tuple[int, int], options: ResponseOptions) -> int:
    """Count the rows that stand for the inputs of an expert's own update, of a matrix (n, d)."""
    if isinstance(expert.update, LowRank):
        return len(expert.update.a)
    return options.rows_of(shape)


def inputs_of_update(expert: Expert, shape: tuple[int, int], options: ResponseOptions) -> Tensor:
    """Find rows that stand for the inputs of an expert's full update, float32; as many as `own_rows` says.

    More than there are to be of them are first added up at random, with random signs, to `DRAWN` times as many, and
    these are condensed.
    """
    rows = own_rows(expert, shape, options)
    drawn = expert.rows(slice(0, 0)).new_zeros(min(shape[0], DRAWN * rows if rows < shape[0] else rows), shape[1])
    for block in row_blocks(shape[0], 4 * max(shape[1], 1), CACHE_BYTES):
        add_up(drawn, block, shape[0], expert.rows(block))
    return condensed(drawn, rows)


def count_rows(experts: Sequence[Expert], shape: tuple[int, int], options: ResponseOptions) -> int:
    """Count the rows of all factors."""
    return sum(own_rows(e, shape, options) if f is None else len(f) for e in experts for f in e.inputs)


def coefficients(share: float, energies: Sequence[float], loudness: float) -> list[float]:
    """Weigh an expert's factors, which count alike, as what F_tᵀF_t is multiplied by; 0 for one that says nothing.

    Args:
        share: the expert's weight, of all.
        energies: ‖F‖² of each factor.
        loudness: of the expert.
    """
    speaking = sum(energy > 0 for energy in energies)
    return [share * loudness / (speaking * energy) if energy > 0 else 0.0 for energy in energies]


def toward_scale(word: str, speaking: Iterable[float]) -> float:
    """Give what Σ_t share_t Δ_t is multiplied by to be T.

    Args:
        word: ``zero``, ``mean`` or ``sum``.
        speaking: shares of the experts that have an update or inputs.
    """
    shares = list(speaking)
    return 0.0 if word == "zero" or not shares else (len(shares) if word == "sum" else 1) / sum(shares)


def energy_of(tensor: Tensor) -> float:
    """Compute ‖·‖² of a matrix."""
    total = 0.0
    for block in row_blocks(len(tensor), 8 * max(tensor.shape[1], 1), CACHE_BYTES):
        entries = wide(tensor[block]).flatten()
        total += float(entries @ entries)
    return total
