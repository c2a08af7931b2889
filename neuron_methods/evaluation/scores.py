"""How an answer is scored, and how far a score can be trusted."""

from __future__ import annotations

import importlib.util
import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from functools import cache
from typing import Any

import numpy as np

from neuron_methods.evaluation.examples import Outcome
from neuron_methods.evaluation.tasks import Task
from neuron_methods.support.errors import UserError

#: Resamples of a bootstrap interval.
RESAMPLES = 2000

# Metrics, those of lm-evaluation-harness too, whose scores are no shares; of most of them less is better.
_NO_SHARES = (
    "perplexity",
    "word_perplexity",
    "byte_perplexity",
    "weighted_perplexity",
    "bits_per_byte",
    "ter",
    "brier_score",
    "likelihood",
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def is_share(metric: str) -> bool:
    """Tell whether a metric's scores, at most 1, are shown in percent, and have a mean over tasks."""
    return metric.partition(",")[0] not in _NO_SHARES


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


def numeric_match(prediction: str, targets: Sequence[str]) -> float:
    """Give 1.0 if the last number of the prediction is the last number of one of the targets, else 0.0.

    As the filter ``flexible-extract`` that lm-evaluation-harness has for GSM8K; numbers are compared by value, with no
    regard to thousands separators, currency signs and the full stop of a sentence.
    """
    said = _last_number(prediction)
    return float(said is not None and said in [_last_number(target) for target in targets])


_NUMBER = re.compile(r"(?:(?<![\d.])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("$", "")) if found else None


def rouge_l(prediction: str, targets: Sequence[str]) -> float:
    """Find the best F-measure of the longest common subsequence (Lin, 2004), by rouge-score without stemming."""
    return float(_rouge().score_multi(list(targets), prediction)["rougeL"].fmeasure)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


def bleu(prediction: str, targets: Sequence[str]) -> float:
    """Compute the BLEU of one sentence, 0 to 1, by sacrebleu (Post, 2018, arXiv:1804.08771)."""
    return _of_corpus("bleu", sentence=True).sentence_score(prediction, list(targets)).score / 100


def chrf(prediction: str, targets: Sequence[str]) -> float:
    """Compute the chrF of one sentence, 0 to 1, by sacrebleu (Popović, 2015)."""
    return _of_corpus("chrf").sentence_score(prediction, list(targets)).score / 100


@cache
def _of_corpus(metric: str, sentence: bool = False) -> Any:
    from sacrebleu.metrics import BLEU, CHRF

    return BLEU(effective_order=sentence) if metric == "bleu" else CHRF()


#: Metrics of a text that is to be said.
TEXT_METRICS = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "numeric_match": numeric_match,
    "rouge_l": rouge_l,
    "bleu": bleu,
    "chrf": chrf,
}
#: Those of them whose score is of all texts together, and not the mean of the texts' own.
CORPUS_METRICS = ("bleu", "chrf")
_PACKAGES = {"rouge_l": "rouge_score", "bleu": "sacrebleu", "chrf": "sacrebleu"}


def check_metric(task: Task) -> None:
    """Refuse a metric whose package is missing.

    Raises:
        UserError: naming what to install.
    """
    package = _PACKAGES.get(task.metric)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(
            f"task {task.name!r}: metric {task.metric} needs the package {package}: "
            "pip install 'mergekit-neuron[metrics]'"
        )


def score_and_interval(outcomes: Sequence[Outcome], metric: str, seed: int = 0) -> tuple[float, float, float]:
    """Add up to a task's score, with its 95 % bootstrap interval; (score, low, high).

    BLEU and chrF are of all texts together; their interval is sacrebleu's, by resamples of texts, too.
    """
    scores, weights = [outcome.score for outcome in outcomes], [outcome.weight for outcome in outcomes]
    if metric not in CORPUS_METRICS:
        return mean_score(scores, weights, metric), *bootstrap_interval(scores, weights, metric, seed)
    targets = [outcome.target if isinstance(outcome.target, list) else [outcome.target] for outcome in outcomes]
    most = max(map(len, targets))
    references = [[own[place] if place < len(own) else None for own in targets] for place in range(most)]
    said = [outcome.prediction for outcome in outcomes]
    found = _of_corpus(metric).corpus_score(said, references, n_bootstrap=1000 if len(said) > 1 else 1)
    mean, half = (found.score, 0.0) if len(said) == 1 else (found._mean, found._ci)  # sacrebleu 2.6 shows them alone
    return found.score / 100, max(mean - half, 0.0) / 100, min(mean + half, 100.0) / 100


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
