"""Mean scores over tasks with their intervals, and differences of two methods on the same examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000

#: Scores per example, by task.
Outcomes = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Spread:
    """A mean score with its 95 % interval; all from 0 to 1."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """In percent."""
        return f"{100 * self.mean:.1f} ({100 * self.low:.1f}–{100 * self.high:.1f})"


def spread(outcomes: Sequence[Outcomes], seed: int = 0) -> Spread:
    """Compute the mean over tasks (and seeds), and its bootstrap interval over examples, within each task and seed.

    Args:
        outcomes: of each seed: right or wrong, 1 or 0, or a score between, per example and task.
        seed: of the resamples.
    """
    rng = np.random.default_rng(seed)
    cells = [np.asarray(values, dtype=np.float64) for one in outcomes for values in one.values()]
    drawn = np.mean([_means(rng, values) for values in cells], axis=0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Spread(float(np.mean([values.mean() for values in cells])), float(low), float(high))


def _means(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """Draw means of resamples, float64 (RESAMPLES,)."""
    if np.isin(values, (0.0, 1.0)).all():  # right and wrong answers drawn again are a binomial number of right ones
        return rng.binomial(len(values), values.mean(), RESAMPLES) / len(values)
    return np.array([rng.choice(values, len(values)).mean() for _ in range(RESAMPLES)])


def paired_difference(one: Sequence[Outcomes], other: Sequence[Outcomes]) -> tuple[float, float]:
    """Compute the difference of two mean scores on the same examples, and its standard error, paired."""
    gaps = [np.asarray(a[name], dtype=np.float64) - b[name] for a, b in zip(one, other, strict=True) for name in a]
    error = np.sqrt(sum(gap.var(ddof=1) / len(gap) for gap in gaps if len(gap) > 1)) / len(gaps)
    return float(np.mean([gap.mean() for gap in gaps])), float(error)
