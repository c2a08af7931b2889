"""Words for messages and columns for the screen."""

import pytest

from neuron_methods.support.text import columns, did_you_mean, first_line, format_bytes, listed, one_line, unknown


@pytest.mark.parametrize(
    ("text", "joined", "first"),
    [
        ("plain", "plain", "plain"),
        ("\n  one\n\n two \n", "one two", "one"),
        ("", "", "ValueError"),
        (" \n ", "", "ValueError"),
    ],
)
def test_an_exception_on_one_line(text, joined, first):
    assert one_line(ValueError(text)) == joined
    assert first_line(ValueError(text)) == first


def test_a_similar_word_is_suggested_or_all_are_named():
    assert did_you_mean("metirc", ("metric", "limit")) == "; did you mean 'metric'?"
    assert did_you_mean("zzz", ("metric", "limit")) == ""
    assert did_you_mean(None, ("metric",)) == ""
    assert unknown("key", "metirc", iter(("metric", "limit"))) == "unknown key 'metirc'; did you mean 'metric'?"
    assert unknown("key", 7, iter(("metric", "limit"))) == "unknown key 7 (there are: metric, limit)"


def test_a_long_list_is_cut_and_the_rest_counted():
    assert listed([]) == ""
    assert listed(["a", 2, "c"]) == "a, 2, c"
    assert listed("abcde") == "a, b, c and 2 more"
    assert listed("abcde", most=1) == "a and 4 more"


def test_columns_stand_under_each_other():
    rows = [("task", "score", "metric"), ("sums", "100.0 %", "accuracy"), ("a longer one", "9.5 %", "")]
    assert columns(iter(rows), left=(0, 2)) == [
        "task            score  metric",
        "sums          100.0 %  accuracy",
        "a longer one    9.5 %",
    ]
    assert columns([("a", "b"), ("cc", "dd")]) == ["a    b", "cc  dd"]
    with pytest.raises(ValueError, match="zip"):
        columns([("a", "b"), ("c", "d", "e")])


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_550_000, "1.6 MB"), (3.2e9, "3.2 GB"), (2.5e12, "2.50 TB")],
)
def test_bytes_in_powers_of_1000(count, shown):
    assert format_bytes(count) == shown
