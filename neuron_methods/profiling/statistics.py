"""Running statistics of one layer's neurons, in memory that does not grow with the data.

For a neuron with activation a (its input to the down projection) over the n tokens that are not padding:

- ``mean_abs``: Σ|a| / n
- ``second_moment``: Σa² / n
- ``firing_rate``: the share of tokens on which the neuron fires. A neuron fires where its nonlinearity lets it: in a
  gated MLP where the gate's pre-activation is positive (SiLU and GELU have their argument's sign; the product with the
  up projection has a sign of its own), otherwise where a > 0.
- ``taylor``: Σ|a · ∂L/∂a| / n, L being the task loss: the mean over the targets of a sample, so that batches and
  processes do not matter. To first order it is how much L changes when the neuron is removed.

Batches are summed in float32, batches are added up in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from neuron_methods.kernels.devices import with_float64
from neuron_methods.neurons.profile_file import STATISTICS, TAYLOR


class NeuronSums:
    """Sums over tokens, per neuron of one layer.

    Attributes:
        tokens: how many were seen.
        sums: statistic -> float64 (neurons,).
    """

    def __init__(self, neurons: int, gradients: bool, device: torch.device | str = "cpu") -> None:
        names = (*STATISTICS, TAYLOR) if gradients else STATISTICS
        self.tokens = 0
        self.sums = {name: torch.zeros(neurons, dtype=torch.float64, device=with_float64(device)) for name in names}

    def add(self, sizes: Tensor) -> None:
        """Count tokens in: `sizes` are their |activations|, float32 (tokens, neurons); they are overwritten."""
        self.tokens += len(sizes)
        self._add("mean_abs", sizes.sum(0))
        self._add("second_moment", sizes.square_().sum(0))

    def add_firing(self, potentials: Tensor) -> None:
        """Count the positive entries of (tokens, neurons), pre-activations of the gate or activations."""
        fires = torch.empty(potentials.shape, dtype=torch.float32, device=potentials.device)
        self._add("firing_rate", torch.gt(potentials, 0, out=fires).sum(0))

    def add_taylor(self, activations: Tensor, gradients: Tensor) -> None:
        """Count activation × gradient in, both (tokens, neurons)."""
        self._add(TAYLOR, (activations * gradients).abs_().sum(0, dtype=torch.float32))

    def _add(self, name: str, values: Tensor) -> None:
        total = self.sums[name]
        total += values.to(total.device)

    def reduce(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Add the sums of all processes; `add_up` does that for a tensor."""
        self.tokens = int(add_up(torch.tensor(self.tokens)))
        self.sums = {name: add_up(values) for name, values in self.sums.items()}

    def first_nonfinite(self) -> int | None:
        """Find the first neuron of which a sum is NaN or Inf; None where there is none."""
        broken = torch.stack([~values.isfinite().cpu() for values in self.sums.values()]).any(dim=0)
        return int(broken.nonzero()[0]) if bool(broken.any()) else None

    def means(self) -> dict[str, Tensor]:
        """Form the statistics, float32 (neurons,) on the CPU; 0 where no token was seen."""
        return {name: (values / max(self.tokens, 1)).float().cpu() for name, values in self.sums.items()}
