"""What is merged by response: experts' parts in a matrix, what their inputs weigh, and what is held toward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from neuron_methods.kernels.low_rank import LowRank
from neuron_methods.kernels.moments import wide
from neuron_methods.kernels.rows import CACHE_BYTES, row_blocks


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
        rows: of an update that stand for its inputs, at most; 0 for all.
    """

    ridge: float | None = None
    toward: str = "mean"
    loudness: str = "equal"
    rows: int = 0


def taking(experts: Sequence[Expert]) -> list[Expert]:
    """List those that take part.

    Raises:
        ValueError: no expert has a weight above 0.
    """
    found = [expert for expert in experts if expert.weight > 0]
    if not found:
        raise ValueError("all experts weigh 0")
    return found


def own_rows(expert: Expert, neurons: int, options: ResponseOptions) -> int:
    """Count the rows that stand for the inputs of an expert's own update."""
    return len(expert.update.a) if isinstance(expert.update, LowRank) else min(options.rows or neurons, neurons)


def count_rows(experts: Sequence[Expert], neurons: int, options: ResponseOptions) -> int:
    """Count the rows of all factors."""
    return sum(own_rows(e, neurons, options) if f is None else len(f) for e in experts for f in e.inputs)


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
