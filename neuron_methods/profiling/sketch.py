"""Input vectors kept as a factor F of bounded size, FᵀF being their second moment, while they stream by.

Vectors are kept as they are until twice `rows`, or twice as many as they are wide, have come together. Then they are
compressed:

- where vectors are no wider than `rows`, to R of their QR decomposition: RᵀR = FᵀF, exactly;
- where they are wider, by *frequent directions* (Liberty, KDD 2013; with a buffer of twice the rows, as in Ghashami,
  Liberty, Phillips, Woodruff, SIAM J. Comput. 2016): of the singular values σ_i of what is there, `rows` directions
  stay, each with √(σ_i² − δ), δ = σ²_{rows+1}.

What frequent directions lose is known, Δ = Σ δ over all compressions:

    0  ≤  FᵀF − BᵀB  ≤  Δ I,    Δ ≤ ‖F − F_k‖² / (rows + 1 − k) for every k ≤ rows, so Δ ≤ ‖F‖² / (rows + 1),

F_k being the best approximation of rank k, as every compression takes δ from rows + 1 directions at least. Factors of
several streams can be compressed together by the same step, and the same bound holds for them all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from neuron_methods.kernels.devices import with_float64


class InputSketch:
    """The input vectors of a module so far, in at most twice `rows` vectors of float32.

    Attributes:
        width: of a vector.
        rows: that a factor has at most, no more than `width`.
        tokens: number of vectors seen.
        energy: Σ of their squared lengths, ‖F‖².
        loss: Δ, see the module; 0 where nothing is lost.
        missing: how often there were vectors that could not be added.
    """

    def __init__(self, width: int, rows: int, device: torch.device | str = "cpu") -> None:
        self.width, self.rows = width, min(rows, width)
        self.tokens = self.missing = 0
        self.energy = self.loss = 0.0
        self._kept = torch.empty(0, width, device=device)
        self._count = 0

    @property
    def device(self) -> torch.device:
        """Where vectors are kept."""
        return self._kept.device

    def add(self, vectors: Tensor) -> None:
        """Take vectors in, (n, width) of any float dtype."""
        vectors = vectors.to(self.device, torch.float32)
        self.tokens += len(vectors)
        self.energy += float(vectors.square().sum(dtype=torch.float64))
        self._append(vectors)

    def factor(self) -> Tensor:
        """Form F, float32 (at most `rows`, width), with FᵀF = the mean of x xᵀ over all vectors x."""
        if self._count > self.rows:
            self._compress()
        return self._kept[: self._count] / max(self.tokens, 1) ** 0.5

    def merge(self, add_up: Callable[[Tensor], Tensor], collect: Callable[[Tensor], Tensor]) -> None:
        """Take in what the other processes have seen, which all call this at once.

        Args:
            add_up: adds up a tensor over processes.
            collect: stacks a tensor of all processes, which has one shape in all of them.
        """
        counts = collect(torch.tensor([self._count])).tolist()
        padded = self._kept.new_zeros(max(counts), self.width)
        padded[: self._count] = self._kept[: self._count]
        parts = collect(padded).view(len(counts), -1, self.width)
        self._read(add_up(self._numbers()))
        self._count = 0
        for part, count in zip(parts, counts, strict=True):
            self._append(part[:count])

    def state(self) -> dict[str, Tensor]:
        """Hand out everything kept so far, to be stored."""
        return {"numbers": self._numbers(), "kept": self._kept[: self._count]}

    def fits(self, state: dict[str, Tensor]) -> bool:
        """Tell whether `state` may have returned this, by shapes and dtypes."""
        numbers, kept = state["numbers"], state["kept"]
        own = self._numbers()
        return (numbers.shape, numbers.dtype) == (own.shape, own.dtype) and (
            kept.ndim == 2 and kept.shape[1] == self.width and kept.dtype == self._kept.dtype
        )

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        self._read(state["numbers"])
        self._count = 0
        self._append(state["kept"].to(self.device))

    def _numbers(self) -> Tensor:
        return torch.tensor([self.tokens, self.missing, self.energy, self.loss], dtype=torch.float64)

    def _read(self, numbers: Tensor) -> None:
        tokens, missing, self.energy, self.loss = numbers.tolist()
        self.tokens, self.missing = int(tokens), int(missing)

    def _append(self, vectors: Tensor) -> None:
        most = 2 * self.rows
        while len(vectors):
            if self._count == most:
                self._compress()
            taken = vectors[: most - self._count]
            end = self._count + len(taken)
            if end > len(self._kept):
                grown = self._kept.new_empty(min(most, max(end, 2 * len(self._kept))), self.width)
                grown[: self._count] = self._kept[: self._count]
                self._kept = grown
            self._kept[self._count : end] = taken
            self._count = end
            vectors = vectors[len(taken) :]

    def _compress(self) -> None:
        kept = self._kept[: self._count]
        if self.rows == self.width:
            shorter = torch.linalg.qr(kept, mode="r").R
        else:
            # In float64, on the CPU for Metal, which has none: one huge direction must not drown the others.
            wide = kept.to(with_float64(kept.device), torch.float64)
            values, vectors = torch.linalg.eigh(wide @ wide.T)
            values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
            lost = values[self.rows] if len(values) > self.rows else values.new_zeros(())
            values, vectors = values[: self.rows], vectors[:, : self.rows]
            # Uᵀ B has the length σ_i in row i.
            scales = torch.where(values > lost, 1 - lost / values, 0.0).sqrt()
            shorter = (scales[:, None] * (vectors.T @ wide)).to(kept)
            self.loss += float(lost)
        self._count = len(shorter)
        self._kept[: self._count] = shorter
