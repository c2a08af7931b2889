"""Metrics by hand, intervals against what is known of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from neuron_methods.evaluation.examples import Outcome
from neuron_methods.evaluation.scores import (
    TEXT_METRICS,
    bootstrap_interval,
    exact_match,
    mean_score,
    numeric_match,
    rouge_l,
    score_and_interval,
    token_f1,
)


def test_exact_match_ignores_blanks_around_and_nothing_else():
    assert exact_match(" two cats\n", ["two cats"]) == 1.0
    assert exact_match("Two cats", ["two cats"]) == 0.0
    assert exact_match("b", ["a", "b"]) == 1.0


@pytest.mark.parametrize(
    ("said", "targets", "value"),
    [
        ("two red cats", ["two cats"], 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("Cats, two!", ["two cats"], 1.0),
        ("cats cats", ["cats"], 2 * 0.5 * 1 / 1.5),
        ("dog", ["two cats"], 0.0),
        ("", ["two cats"], 0.0),
        ("", [""], 1.0),
        ("red dog", ["two cats", "a red dog"], 0.8),
    ],
)
def test_token_f1(said, targets, value):
    assert token_f1(said, targets) == pytest.approx(value)


@pytest.mark.parametrize(
    ("said", "target", "right"),
    [
        ("so 3 + 4 is 7.", "#### 7", True),
        ("It costs $1,234.50", "1234.5", True),
        ("7, then 8", "7", False),
        ("-3", "3", False),
        ("10-3", "3", True),
        ("none", "3", False),
        ("none", "none", False),
        (".5", "0.50", True),
    ],
)
def test_the_last_number_is_the_answer(said, target, right):
    assert numeric_match(said, ["x", target]) == float(right)


def test_rouge_l_by_hand():
    """Longest common subsequence `the cat the mat`: 4 words of 6 said and of 5 wanted."""
    precision, recall = 4 / 6, 4 / 5
    said, wanted = "the cat sat on the mat", "the cat is the mat"
    assert rouge_l(said, ["x", wanted]) == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_bleu_and_chrf_are_of_all_texts_together(metric):
    import sacrebleu

    said = ["the cat sat on the mat today", "two dogs run", "a tree stands there in the rain"]
    wanted = [["the cat sat on a mat today"], ["two dogs run fast", "two dogs run"], ["a tree stood there in the rain"]]
    outcomes = [
        Outcome(row, TEXT_METRICS[metric](s, w), s, w[0] if len(w) == 1 else w)
        for row, (s, w) in enumerate(zip(said, wanted, strict=True))
    ]
    score, low, high = score_and_interval(outcomes, metric)
    streams = [[w[0] for w in wanted], [None, "two dogs run", None]]
    assert score == pytest.approx(getattr(sacrebleu, f"corpus_{metric}")(said, streams).score / 100)
    assert score != pytest.approx(sum(o.score for o in outcomes) / 3)
    assert low < score < high and (low, high) == score_and_interval(outcomes, metric)[1:]
    assert score_and_interval(outcomes[:1], metric)[1:] == (pytest.approx(outcomes[0].score),) * 2


def test_perplexity_weighs_by_tokens():
    assert mean_score([2 * math.log(8), 6 * math.log(2)], [2, 6], "perplexity") == pytest.approx(2 ** ((6 + 6) / 8))


def test_the_interval_of_a_share_is_that_of_the_binomial():
    scores = [1.0] * 300 + [0.0] * 100
    low, high = bootstrap_interval(scores, [1.0] * 400, "accuracy")
    wide = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - wide, abs=0.005)
    assert high == pytest.approx(0.75 + wide, abs=0.005)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        low, high = bootstrap_interval(generator.random(100) < 0.6, np.ones(100), "accuracy")
        inside += low <= 0.6 <= high
    assert 180 <= inside <= 199


def test_the_interval_of_perplexity_contains_it_and_follows_the_seed():
    generator = np.random.default_rng(1)
    tokens = generator.integers(1, 30, 50)
    losses = tokens * generator.normal(3, 0.5, 50)
    score = mean_score(losses, tokens, "perplexity")
    low, high = bootstrap_interval(losses, tokens, "perplexity", seed=3)
    assert low < score < high
    assert (low, high) == bootstrap_interval(losses, tokens, "perplexity", seed=3)
    assert (low, high) != bootstrap_interval(losses, tokens, "perplexity", seed=4)


@pytest.mark.parametrize(("metric", "count"), [("token_f1", 37), ("perplexity", 37), ("perplexity", 400)])
def test_the_interval_is_that_of_resampling_one_by_one(metric, count):
    """Plain resampling, of other draws: ends agree up to a fraction of the width, which other draws move, too."""
    generator = np.random.default_rng(2)
    weights = generator.integers(1, 30, count) if metric == "perplexity" else np.ones(count)
    scores = weights * generator.gamma(2.0, 0.4, count)
    found = bootstrap_interval(scores, weights, metric)
    resampled = []
    for _ in range(8000):
        chosen = generator.integers(0, count, count)
        resampled.append(mean_score(scores[chosen], weights[chosen], metric))
    expected = np.quantile(resampled, [0.025, 0.975])
    np.testing.assert_allclose(found, expected, atol=0.06 * (expected[1] - expected[0]))


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_examples_that_are_all_alike_have_no_interval(count, metric):
    weights = [3.0 if metric == "perplexity" else 1.0] * count
    score = mean_score([0.1] * count, weights, metric)
    assert bootstrap_interval([0.1] * count, weights, metric) == (score, score)


def test_many_examples_are_resampled_in_little_memory():
    import tracemalloc

    scores = np.arange(20_000) % 3 == 0
    bootstrap_interval(scores[:10], np.ones(10), "accuracy")  # imports
    tracemalloc.start()
    low, high = bootstrap_interval(scores, np.ones(20_000), "accuracy")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert low < 1 / 3 < high
    assert peak < 150e6  # all resamples at once are 320 MB of indices alone
