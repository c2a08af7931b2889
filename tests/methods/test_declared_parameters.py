"""Parameters as our methods declare them: what they take, what they refuse, and whose they are."""

from __future__ import annotations

import math

import pytest
from mergekit.merge_methods.base import ParameterScope

from neuron_methods.methods.parameters import choice, number, text
from neuron_methods.support.errors import UserError

SHARE = number("knob", 0.0, 1.0, default=0.5, about="a share")
POSITIVE_SHARE = number("knob", 0.0, 1.0, low_open=True, default=0.5, of="expert", about="a share")
ANY = number("knob", default=0.0, about="a number")


@pytest.mark.parametrize(("value", "expected"), [(0, 0.0), (1, 1.0), (0.5, 0.5), ("0.25", 0.25), ("1e-3", 1e-3)])
def test_numbers_within_bounds_are_floats(value: object, expected: float) -> None:
    found = SHARE.validate(value)
    assert found == expected
    assert isinstance(found, float)


@pytest.mark.parametrize("value", [-0.001, 1.001, math.nan, math.inf, "x", "", None, [0.5], True, False])
def test_numbers_out_of_bounds_are_refused(value: object) -> None:
    with pytest.raises(UserError) as error:
        SHARE.validate(value)
    assert str(error.value) == f"knob must be a number in [0, 1]; got {value!r}"


def test_open_bounds_are_out_of_bounds() -> None:
    assert POSITIVE_SHARE.validate(1e-300) == 1e-300
    with pytest.raises(UserError, match=r"^knob must be a number in \(0, 1\]; got 0$"):
        POSITIVE_SHARE.validate(0)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "many"])
def test_unbounded_numbers_are_finite(value: object) -> None:
    assert ANY.validate(-1e38) == -1e38
    with pytest.raises(UserError, match=r"^knob must be a finite number; got "):
        ANY.validate(value)


@pytest.mark.parametrize("value", [1e39, -1e300])
def test_numbers_that_float32_does_not_hold_are_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"^knob must be within what float32 holds, 3.4e\+38 at most; got "):
        ANY.validate(value)


def test_whole_numbers_are_not_cut() -> None:
    count = number("knob", 0, words=("auto",), whole=True, default="auto", about="a count")
    assert (count.validate("auto"), count.validate(3), count.validate("4.0")) == ("auto", 3.0, 4.0)
    with pytest.raises(UserError, match=r"^knob must be whole, a number in \[0, inf\] or 'auto'; got 1.5$"):
        count.validate(1.5)


def test_choices_begin_with_the_default() -> None:
    knob = choice("knob", "one", "two", about="a word")
    assert knob.default == "one"
    assert knob.validate("two") == "two"
    for wrong in ("three", 1, None, "One", ""):
        with pytest.raises(UserError) as error:
            knob.validate(wrong)
        assert str(error.value) == f"knob must be one of one, two; got {wrong!r}"


def test_a_number_or_a_word() -> None:
    knob = number("knob", words=("auto",), default="auto", about="a scale")
    assert knob.validate("auto") == "auto"
    assert knob.validate("0.5") == 0.5
    assert knob.validate(-3) == -3.0
    for wrong in ("Auto", math.inf, math.nan, None, True, [1.0]):
        with pytest.raises(UserError) as error:
            knob.validate(wrong)
        assert str(error.value) == f"knob must be a finite number or 'auto'; got {wrong!r}"


def test_a_text_is_a_text() -> None:
    knob = text("knob", about="a file")
    assert (knob.default, knob.validate("a.json")) == ("", "a.json")
    for wrong in (5, None, ["a.json"]):
        with pytest.raises(UserError) as error:
            knob.validate(wrong)
        assert str(error.value) == f"knob must be a text; got {wrong!r}"


def test_a_parameter_is_the_merges_or_an_experts() -> None:
    assert SHARE.scope == text("knob", about="a file").scope == ParameterScope.SHARED
    assert POSITIVE_SHARE.scope == text("knob", of="expert", about="a file").scope == ParameterScope.NON_BASE
    assert (SHARE.default, SHARE.description) == (0.5, "a share")
