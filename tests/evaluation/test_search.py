"""`--search` and the strategies that go through it."""

from __future__ import annotations

import sys

import pytest

from neuron_methods.evaluation.tuning.search import CmaEs, key_of, make_strategy, parse_search, show_point
from neuron_methods.support.errors import UserError


def values(text):
    (parameter,) = parse_search([text])
    return tuple(parameter.values)


def points(name, searches, budget=None, seed=0):
    return [p for batch in make_strategy(name, parse_search(searches), budget, seed).batches() for p in batch]


def test_ranges_have_both_ends_and_no_rounding_in_between():
    assert values("lambda_orthogonal=0.5:4.0:0.25")[:3] == (0.5, 0.75, 1.0)
    assert values("lambda_orthogonal=0.5:4.0:0.25")[-1] == 4.0
    assert values("a=0:0.3:0.1") == (0.0, 0.1, 0.2, 0.3)
    assert values("a=0:1:0.3") == (0.0, 0.3, 0.6, 0.9)
    assert values("a=1:1:1") == (1.0,)
    assert values("a=-1e-3:1e-3:1e-3") == (-0.001, 0.0, 0.001)


def test_lists_of_numbers_and_words():
    assert values("density=0.1, 0.2,0.5") == (0.1, 0.2, 0.5)
    assert values("trim=model,tensor") == ("model", "tensor")
    assert values("lambda_orthogonal=auto,1,2.5") == ("auto", 1, 2.5)
    assert values("normalize=true,false") == (True, False)
    assert values("a=3") == (3,)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "--search: name a parameter"),
        (["lambda"], "--search 'lambda': expected NAME=LOW:HIGH:STEP"),
        (["=1:2:3"], "expected NAME"),
        (["a="], "expected NAME"),
        (["a=2:1:0.5"], "an empty range"),
        (["a=1:2:0"], "an empty range"),
        (["a=1:2:-1"], "an empty range"),
        (["a=1:1"], "an empty range"),
        (["a=1:b:1"], "a range is of numbers"),
        (["a=0:inf:1"], "a range is of finite numbers"),
        (["a=nan:1:1"], "a range is of finite numbers"),
        (["a=0:1:1e-17"], "values; give a larger step"),
        (["a=0:1:nan"], "a range is of finite numbers"),
        (["a=0:1e39:1"], "no larger than 1e.30"),
        (["a=.inf,1"], "expected a number no larger than"),
        (["a=.nan,1"], "expected a number no larger than"),
        (["a=" + ",".join(map(str, range(2000)))], "2000 values; give fewer"),
        (["a=1,,2"], "None is no value"),
        (["a=1,1"], "a value appears twice"),
        (["a=[1,2]"], "is no value|expected"),
        (["a=1:2:1", "a=3"], "--search a: given twice"),
    ],
)
def test_searches_that_are_none(texts, message):
    with pytest.raises(UserError, match=message):
        parse_search(texts)


def test_a_search_of_many_points_is_drawn_as_it_is_tried():
    huge = ["a=0:1:1e-8", "b=0:1:1e-8"]
    (first, *_) = make_strategy("random", parse_search(huge), 2**31 - 1, 0).batches().__next__()
    assert all(0 <= value <= 1 and round(value, 8) == value for value in first.values())
    assert len(points("random", huge, budget=5)) == 5
    with pytest.raises(UserError, match=r"--budget 100000: the grid has 10000000200000001 points"):
        points("grid", huge)


def test_the_grid_is_every_combination():
    found = points("grid", ["a=0:1:0.5", "b=x,y"])
    assert len({key_of(point) for point in found}) == 6
    assert {point["a"] for point in found} == {0.0, 0.5, 1.0}
    assert points("grid", ["a=1"], budget=1) == [{"a": 1}]
    with pytest.raises(UserError, match="--budget 5: the grid has 6 points"):
        points("grid", ["a=0:1:0.5", "b=x,y"], budget=5)
    with pytest.raises(UserError, match="--search a: a grid needs steps: 0:1:STEP"):
        points("grid", ["a=0:1"])


def test_random_points_are_different_within_the_range_and_follow_the_seed():
    found = points("random", ["a=0:1", "b=1:3:1", "c=x,y"], budget=30)
    assert len({key_of(point) for point in found}) == 30
    assert all(0 <= p["a"] <= 1 and p["b"] in (1.0, 2.0, 3.0) and p["c"] in ("x", "y") for p in found)
    assert {p["b"] for p in found} == {1.0, 2.0, 3.0} and {p["c"] for p in found} == {"x", "y"}
    assert found == points("random", ["a=0:1", "b=1:3:1", "c=x,y"], budget=30)
    assert found != points("random", ["a=0:1", "b=1:3:1", "c=x,y"], budget=30, seed=1)
    assert len(points("random", ["b=1:3:1"], budget=30)) == 3


@pytest.mark.parametrize("searches", [["a=-1:3", "b=0:10"], ["a=-1:3"]])
def test_cma_finds_the_best_point_and_keeps_to_range_and_budget(searches):
    strategy = make_strategy("cma", parse_search(searches), 120, 0)
    target, tried = {"a": 2.2, "b": 3.1}, []
    for batch in strategy.batches():
        worth = [-sum((point[k] - target[k]) ** 2 for k in point) for point in batch]
        tried += zip(worth, batch, strict=True)
        strategy.tell(batch, worth)
    assert len(tried) <= 120
    assert all(-1 <= point["a"] <= 3 for _, point in tried)
    best = max(tried, key=lambda entry: entry[0])[1]
    assert best["a"] == pytest.approx(2.2, abs=0.1)


def test_cma_keeps_to_steps():
    strategy = make_strategy("cma", parse_search(["a=0:1:0.25", "b=0:1"]), 12, 0)
    tried = []
    for batch in strategy.batches():
        tried += batch
        strategy.tell(batch, [point["a"] for point in batch])
    assert len(tried) == 12
    assert {point["a"] for point in tried} <= {0.0, 0.25, 0.5, 0.75, 1.0}


def test_cma_needs_ranges_and_its_package(monkeypatch):
    with pytest.raises(UserError, match="--search a: cma needs a range LOW:HIGH"):
        make_strategy("cma", parse_search(["a=1,2"]), 10, 0)
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(UserError, match=r"pip install 'mergekit-neuron\[tune\]'"):
        CmaEs(parse_search(["a=1:2"]), 10, 0)


def test_points_are_told_apart_by_their_values():
    assert key_of({"a": 1, "b": "x"}) == key_of({"b": "x", "a": 1.0})
    assert key_of({"a": True}) != key_of({"a": 1})
    assert show_point({"a": 0.5, "b": "auto"}) == "a=0.5, b=auto"
