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
    """Give 1.0 if the prediction is one of the targets, but for blanks around it, else 0.0."""
    return float(prediction.strip() in [target.strip() for target in targets])


def token_f1(prediction: str, targets: Sequence[str]) -> float:
    """Find the best harmonic mean of precision and recall over words, lower-cased and without ASCII punctuation.

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
    """Add up to the task's score: the weighted mean, of which perplexity is the exponential."""
    mean = math.fsum(scores) / math.fsum(weights)
    return _perplexity(mean) if metric == "perplexity" else mean


def bootstrap_interval(
    scores: Sequence[float], weights: Sequence[float], metric: str, seed: int = 0
) -> tuple[float, float]:
    """Find the 95 % percentile bootstrap interval of `mean_score` over examples (Efron, 1979), by scipy.

    Args:
        scores: per example; for perplexity the sum of its tokens' negative log-likelihoods.
        weights: per example; for perplexity its tokens, else 1.
        metric: as for `mean_score`.
        seed: of numpy's default generator, which draws the resamples: the same seed, the same interval.

    Returns:
        (low, high). Where all examples are alike, both are the score: resampling cannot tell more.
    """
    if len({*zip(scores, weights, strict=True)}) == 1:
        score = mean_score(scores, weights, metric)
        return score, score
    from scipy.stats import bootstrap  # takes half a second, which `--help` need not wait for

    low, high = bootstrap(
        (np.asarray(scores, dtype=np.float64), np.asarray(weights, dtype=np.float64)),
        lambda values, sizes, axis: values.sum(axis=axis) / sizes.sum(axis=axis),
        paired=True,
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // len(scores)),  # bounds memory
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return (_perplexity(low), _perplexity(high)) if metric == "perplexity" else (float(low), float(high))


def _perplexity(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
