"""How an answer is scored, and how far a score can be trusted."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

#: Resamples of a bootstrap interval.
RESAMPLES = 2000

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(prediction: str, targets: Sequence[str]) -> float:
    """1.0 if the prediction is one of the targets, but for blanks around it."""
    return float(prediction.strip() in [target.strip() for target in targets])


def token_f1(prediction: str, targets: Sequence[str]) -> float:
    """The best harmonic mean of precision and recall over words, lower-cased and without ASCII punctuation.

    As SQuAD's F1 (Rajpurkar et al., 2016, arXiv:1606.05250), but articles count. 1.0 where both hold no word.
    """
    return max(_f1(_words(prediction), _words(target)) for target in targets)


def _words(text: str) -> Counter[str]:
    return Counter(text.lower().translate(_NO_PUNCTUATION).split())


def _f1(predicted: Counter[str], target: Counter[str]) -> float:
    if not predicted or not target:
        return float(predicted == target)
    common = (predicted & target).total()
    return 2 * common / (predicted.total() + target.total())


#: Metrics of a text that is to be said.
TEXT_METRICS = {"exact_match": exact_match, "token_f1": token_f1}


def mean_score(scores: Sequence[float], weights: Sequence[float], metric: str) -> float:
    """The task's score: the weighted mean, of which perplexity is the exponential."""
    mean = math.fsum(scores) / math.fsum(weights) if metric == "perplexity" else math.fsum(scores) / len(scores)
    return _perplexity(mean) if metric == "perplexity" else mean


def bootstrap_interval(
    scores: Sequence[float], weights: Sequence[float], metric: str, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap interval of `mean_score` over examples (Efron, 1979).

    Args:
        scores: per example; for perplexity the sum of its tokens' negative log-likelihoods.
        weights: per example; for perplexity its tokens.
        metric: as for `mean_score`.
        seed: of the resamples.
        level: the share of resamples inside.

    Returns:
        (low, high). Where all examples score alike, both are the score: resampling cannot tell more.
    """
    generator = np.random.default_rng(seed)
    values, sizes = np.asarray(scores, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    count = len(values)
    means = []
    block = max(1, 4_000_000 // count)  # bounds memory
    for start in range(0, RESAMPLES, block):
        drawn = generator.integers(0, count, (min(block, RESAMPLES - start), count))
        total = values[drawn].sum(axis=1)
        means.append(total / (sizes[drawn].sum(axis=1) if metric == "perplexity" else count))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return (_perplexity(low), _perplexity(high)) if metric == "perplexity" else (float(low), float(high))


def _perplexity(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
