"""Trim: keep the largest entries of a task vector by magnitude, with one exact threshold over a stream of tensors.

Fang et al., EMNLP 2025, arXiv:2503.05320, section 3: with n entries, the threshold is the ⌊n·(1 − density)⌋-th
smallest magnitude and every entry at or above it is kept.

The threshold of a whole model must not need the whole model in memory. Non-negative float32 numbers have the order of
their bit patterns, so an order statistic is a search among integers: a sample brackets the threshold, one pass over
the stream counts what lies below the bracket and makes a histogram of the bit patterns inside it, and where the
bracket was too wide for one bin per pattern, or missed, it is narrowed by what was counted and the stream passes
again. A bin of several patterns needs no second look where all its entries are the pattern it begins with: differences
of bf16 numbers have few significant bits, so that is the rule there. The result is the exact order statistic whatever
the sample was; a good sample makes it one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from neuron_methods.kernels.devices import Crew, bytes_at_once, threads_of
from neuron_methods.kernels.task_vectors import fill_task_vector

# Elements worked on at a time on a CPU: float32 scratch of 4 MB, which stays in cache.
CHUNK = 1 << 20
# Of fewer entries no operation of torch is shared out to threads, on which the last bits of sums would depend.
_FEW = 1 << 15
# Histogram bins. A bracket of at most this many bit patterns gives the exact threshold in the pass that counts it.
BINS = 1 << 20
# Bit pattern above every finite magnitude's.
_TOP = 0x7F800000
# Half-width of the sample's bracket, in standard errors of the sampled share below the threshold.
_STANDARD_ERRORS = 4.0


def kept_rank(entries: int, density: float) -> int:
    """Compute the threshold's rank of n entries: ⌊n·(1 − density)⌋, in floating point.

    The published code computes it so (Fang et al., merging_methods.py). It counts from 1 in ascending order of the
    magnitudes; 0 where everything is kept. `density` is in (0, 1].
    """
    return int(entries * (1 - density))


class Tally(NamedTuple):
    """What one chunk of a stream holds, as far as a search goes by it.

    Attributes:
        entries: how many.
        total_l1: Σ|τ|.
        at_or_above: number of magnitudes at or above the bracket's lower end.
        l1_kept: their sum.
        inside: bit patterns of those within the bracket.
    """

    entries: int
    total_l1: float
    at_or_above: int = 0
    l1_kept: float = 0.0
    inside: Tensor | None = None


def count_task_vectors(
    base: Tensor, experts: Sequence[Tensor], searches: Sequence[ThresholdSearch], crew: Crew, *, clean: bool = False
) -> None:
    """Count θ_t − θ₀ of every expert in its search, in flat float32 chunks, of `CHUNK` entries on a CPU.

    Args:
        base: θ₀, any float dtype.
        experts: θ_t of the same shape, or `TaskVector`s.
        searches: of the experts.
        crew: that does so; it has no say in what is counted.
        clean: take NaN and infinite entries for 0.
    """
    base, flat = base.reshape(-1), [expert.reshape(-1) for expert in experts]
    size = max(1, min(bytes_at_once(4 * CHUNK, base.device) // 4, base.numel()))
    call = object()

    def tally(piece: tuple[int, int]) -> Tally:
        start, index = piece
        length = min(size, base.numel() - start)
        origin, delta = (buffer[:length] for buffer in _buffers(crew, size, base.device))
        if getattr(crew.own, "origin", None) != (call, start):
            origin.copy_(base[start : start + length])
            crew.own.origin = call, start
        return searches[index].tally(fill_task_vector(delta, flat[index][start : start + length], origin, clean=clean))

    pieces = [(start, index) for start in range(0, base.numel(), size) for index in range(len(flat))]
    found = crew.work(tally, pieces, alone=base.device.type != "cpu" or base.numel() < _FEW)
    for (_, index), tallied in zip(pieces, found, strict=True):
        searches[index].add(tallied)


def _buffers(crew: Crew, size: int, device: torch.device) -> Tensor:
    """Two buffers of `size` float32 entries or more, which a thread keeps."""
    kept = getattr(crew.own, "buffers", None)
    if kept is None or kept.shape[1] < size or kept.device != device:
        kept = crew.own.buffers = torch.empty(2, size, dtype=torch.float32, device=device)
    return kept


@dataclass
class Bracket:
    """Half-open range [low, high) of float32 bit patterns that should hold the threshold."""

    low: int = 0
    high: int = _TOP

    @property
    def shift(self) -> int:
        """Bits dropped so that the range fits into `BINS` bins; 0 means one bin per bit pattern."""
        return max(0, (self.high - self.low - 1).bit_length() - (BINS.bit_length() - 1))

    @property
    def bins(self) -> int:
        """Number of bins the range takes at `shift`."""
        return ((self.high - self.low - 1) >> self.shift) + 1

    def aligned(self) -> Bracket:
        """Widen the range until `low` is a multiple of a bin's width, so that a bin's patterns share one exponent."""
        low = self.low
        while (wider := Bracket(low - low % (1 << Bracket(low, self.high).shift), self.high)).low != low:
            low = wider.low
        return wider


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def _value(bits: int) -> float:
    return float(np.int32(bits).view(np.float32))


@dataclass
class ThresholdSearch:
    """Exact threshold and trimmed share of a stream of task-vector entries, in bounded memory.

    Offer the sample (`bracket_from_sample`), then the whole stream (`count` for each chunk, then `finish`); while
    `finish` returns False the stream has to be counted once more.

    Attributes:
        density: share of entries to keep, in (0, 1].
        threshold: smallest kept magnitude; set when `finish` returns True. 0.0 keeps everything.
        entries: number of entries in the stream.
        total_l1: Σ|τ| of the stream.
        removed_l1: Σ|τ| of the entries below the threshold.
        passes: how often the stream was counted.
    """

    density: float
    threshold: float | None = None
    entries: int = 0
    total_l1: float = 0.0
    removed_l1: float = 0.0
    passes: int = 0
    _bracket: Bracket = field(default_factory=Bracket)
    _below: int = 0
    _at_or_above: int = 0
    _l1_kept: float = 0.0
    _histogram: Tensor | None = None
    _remainders: Tensor | None = None

    @property
    def sigma(self) -> float:
        """σ_t = L1 norm of what trimming removed / L1 norm of the task vector (section 3); 0 for an empty update."""
        return self.removed_l1 / self.total_l1 if self.total_l1 > 0 else 0.0

    def bracket_from_sample(self, runs: list[Tensor]) -> None:
        """Narrow the search to where a sample says the threshold lies.

        Args:
            runs: samples of |τ|, float32, each of shape (runs, neighbouring entries). Neighbours resemble each other,
                so the spread between runs, not the number of entries, tells how far off the sample may be.
        """
        runs = [run for run in runs if run.numel()]
        if not runs:
            return
        magnitudes = torch.cat([run.flatten() for run in runs]).nan_to_num_().sort().values
        share = 1 - self.density
        estimate = magnitudes[min(int(share * len(magnitudes)), len(magnitudes) - 1)]
        shares = torch.cat([(run < estimate).double().mean(dim=1) for run in runs])
        weights = torch.cat([shares.new_full((len(run),), run.shape[1] / len(magnitudes)) for run in runs])
        error = float(((weights * (shares - (weights * shares).sum())).square().sum()).sqrt())
        margin = _STANDARD_ERRORS * error + 1e-4
        lower = math.floor((share - margin) * len(magnitudes))
        upper = math.ceil((share + margin) * len(magnitudes))
        self._bracket = Bracket(
            low=_bits(float(magnitudes[lower])) if lower > 0 else 0,
            high=_bits(float(magnitudes[upper])) + 1 if upper < len(magnitudes) else _TOP,
        ).aligned()

    def count(self, chunk: Tensor) -> None:
        """Count one chunk of the stream: task-vector entries, 1-D float32; overwritten."""
        self.add(self.tally(chunk))

    def tally(self, chunk: Tensor) -> Tally:
        """Tell what a chunk holds, see `count`; several threads may do so at the same time."""
        magnitudes = chunk.abs_()
        low = _value(self._bracket.low)
        total = _sum(magnitudes)
        if not math.isfinite(total):
            return Tally(len(magnitudes), total)
        at_or_above, inside = _split_at(magnitudes, low, self._bracket)
        # Σ_{a ≥ low} a from Σ min(a, low), which spares picking the entries out.
        kept = total - _sum(magnitudes.clamp_(max=low)) + at_or_above * low
        return Tally(len(magnitudes), total, at_or_above, kept, inside)

    def add(self, found: Tally) -> None:
        """Count what a chunk holds; sums depend on the order of chunks to the last bit."""
        bracket, inside = self._bracket, found.inside
        self.entries += found.entries
        self.total_l1 += found.total_l1
        if inside is None:
            return  # NaN or Inf: there is nothing to search, and whoever offers the stream sees it by `total_l1`
        if self._histogram is None:
            self._histogram = torch.zeros(bracket.bins, dtype=torch.int64, device=inside.device)
        self._histogram = self._histogram.to(inside.device)  # zeros that nobody read may have come before
        self._at_or_above += found.at_or_above
        self._below = self.entries - self._at_or_above
        self._l1_kept += found.l1_kept
        if len(inside):
            offsets = inside.sub(bracket.low)
            bins = offsets.bitwise_right_shift(bracket.shift)
            if len(bins) < bracket.bins:
                self._histogram.index_add_(0, bins, self._histogram.new_ones(1).expand(len(bins)))
            else:
                self._histogram += torch.bincount(bins, minlength=bracket.bins)
            if bracket.shift:
                self._add_remainders(bins, offsets.bitwise_and_((1 << bracket.shift) - 1))

    def _add_remainders(self, bins: Tensor, remainders: Tensor) -> None:
        """Add up by how many patterns the entries of a bin lie above its first."""
        chosen = remainders.nonzero().squeeze(1)
        if len(chosen):
            if self._remainders is None:
                assert self._histogram is not None
                self._remainders = torch.zeros_like(self._histogram)
            self._remainders.index_add_(0, bins[chosen], remainders[chosen].long())

    def count_zeros(self, entries: int) -> None:
        """Count entries known to be 0 without a chunk that holds them."""
        self.entries += entries
        if self._bracket.low > 0:
            self._below += entries
            return
        if self._histogram is None:
            self._histogram = torch.zeros(self._bracket.bins, dtype=torch.int64, device="cpu")
        self._at_or_above += entries
        self._histogram[0] += entries

    def take_sums(self) -> tuple[float, float]:
        """Hand out the sums over what was counted since the last call; `add_sums` takes them back, in any order."""
        sums = self.total_l1, self._l1_kept
        self.total_l1 = self._l1_kept = 0.0
        return sums

    def add_sums(self, sums: tuple[float, float]) -> None:
        """Take back what `take_sums` has handed out, here or elsewhere."""
        self.total_l1 += sums[0]
        self._l1_kept += sums[1]

    def add_counts(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Count what others have counted in the same pass, too.

        Args:
            add_up: adds up a tensor of integers over all who count.
        """
        there = [self._histogram is not None, self._remainders is not None]
        counts = add_up(torch.tensor([self.entries, self._below, self._at_or_above, *there], device="cpu"))
        self.entries, self._below, self._at_or_above, histograms, remainders = counts.tolist()
        if histograms:
            own = self._histogram
            if own is None:
                own = torch.zeros(self._bracket.bins, dtype=torch.int64, device="cpu")
            self._histogram = add_up(own)
            if remainders:
                self._remainders = add_up(self._remainders if self._remainders is not None else torch.zeros_like(own))

    def finish(self) -> bool:
        """End a pass over the stream.

        Returns:
            True where threshold and σ are now exact; False where the stream must be counted again, in the narrower
            bracket that this pass has found.
        """
        self.passes += 1
        rank = kept_rank(self.entries, self.density)
        if rank == 0 or self._histogram is None:
            self.threshold, self.removed_l1 = 0.0, 0.0
            return True
        bracket, histogram = self._bracket, self._histogram.cpu()
        inside = int(histogram.sum())
        if rank <= self._below:
            return self._again(Bracket(0, bracket.low))
        if rank > self._below + inside:
            return self._again(Bracket(bracket.high, _TOP))
        cumulative = histogram.cumsum(0)
        found = int(torch.searchsorted(cumulative, rank - self._below))
        bits = bracket.low + (found << bracket.shift)
        remainders = self._remainders
        if remainders is not None and int(remainders[found]):
            return self._again(Bracket(bits, min(bits + (1 << bracket.shift), bracket.high)))
        self.threshold = _value(bits)
        patterns = torch.arange(bracket.low, bits, 1 << bracket.shift, dtype=torch.int32, device="cpu")
        values = patterns.view(torch.float32).double()
        below_in_bracket = float((values * histogram[:found]).sum())
        if remainders is not None:
            steps = (patterns + 1).view(torch.float32).double() - values
            below_in_bracket += float((steps * remainders[:found].cpu()).sum())
        self.removed_l1 = max(0.0, self.total_l1 - self._l1_kept + below_in_bracket)
        self._histogram = self._remainders = None
        return True

    def _again(self, bracket: Bracket) -> bool:
        self._bracket = bracket.aligned()
        self.entries = self._below = self._at_or_above = 0
        self.total_l1 = self._l1_kept = 0.0
        self._histogram = self._remainders = None
        return False


def search_bytes(entries: int, searches: int) -> int:
    """Bound the memory in bytes of searches that go on at the same time in streams of so many entries each."""
    # Per search a histogram and a sample; and one chunk's entries in each thread. In a short stream the sample tells
    # little: much lies within the bracket, which is so wide that what lies above its bins' first patterns is kept, too.
    short = entries < 2 * CHUNK
    return searches * BINS * (20 if short else 12) + min(CHUNK, entries) * (64 if short else 24) * threads_of("cpu")


def _sum(magnitudes: Tensor) -> float:
    """Sum in float32, or in float64 where that overflows; NaN or Inf only where an entry is."""
    total = float(magnitudes.sum())
    return total if math.isfinite(total) else float(magnitudes.sum(dtype=torch.float64))


def _split_at(magnitudes: Tensor, low: float, bracket: Bracket) -> tuple[int, Tensor]:
    """Number of magnitudes at or above `low`, and the bit patterns of those inside the bracket."""
    if magnitudes.device.type == "cpu":
        # numpy picks out few entries of many several times faster than torch 2.13 does on a CPU.
        values = magnitudes.numpy()
        selected = values >= low
        count = int(np.count_nonzero(selected))
        if bracket.high < _TOP:
            selected &= values < np.float32(_value(bracket.high))
        return count, torch.from_numpy(values[selected].view(np.int32))
    selected = magnitudes >= low
    count = int(selected.sum())
    if bracket.high < _TOP:
        selected &= magnitudes < _value(bracket.high)
    return count, magnitudes[selected].view(torch.int32)


def trim_(task_vector: Tensor, threshold: float) -> Tensor:
    """Zero every entry of a float32 task vector whose magnitude is below the threshold, in place; returns it."""
    if threshold <= 0:
        return task_vector
    # hardshrink keeps |x| > λ in one pass; λ just below the threshold makes that |x| ≥ threshold.
    below = float(np.nextafter(np.float32(threshold), np.float32(0)))
    return torch.ops.aten.hardshrink.out(task_vector, below, out=task_vector)
