"""What our command looks at while mergekit merges tensor by tensor."""

from types import SimpleNamespace

import pytest
import torch
from mergekit.options import MergeOptions

from neuron_methods.plugin.session import (
    MergeSession,
    SessionOptions,
    is_finite,
    nonfinite_inputs,
    session_of,
)
from neuron_methods.support.errors import UserError

NAN, INF = float("nan"), float("inf")
SOUND = torch.ones(3)


@pytest.mark.parametrize(
    ("tensor", "finite"),
    [
        (torch.zeros(0), True),
        (torch.tensor(1.0), True),
        (torch.tensor(INF), False),
        (torch.tensor([1.0, NAN]), False),
        (torch.tensor([INF, -INF]), False),
        (torch.tensor([3e38, 3e38]), True),  # finite, though their sum is not
        (torch.full((70000,), 60000.0, dtype=torch.float16), True),
        (torch.tensor([1, 2]), True),
        (torch.tensor([1.0, INF], dtype=torch.bfloat16), False),
    ],
)
def test_finite(tensor, finite):
    assert is_finite(tensor) == finite


def merge(session, inputs, result):
    with session.merging("layer.weight", inputs) as inspect:
        return inspect(result() if callable(result) else result)


def test_a_sound_result_passes():
    assert merge(MergeSession(quiet=True), {"a": SOUND}, SOUND) is SOUND
    assert merge(MergeSession(quiet=True), {"a": SOUND}, None) is None


def test_the_culprits_among_the_inputs_are_named():
    inputs = {"base": SOUND, "expert-a": SOUND * NAN, "expert-b": SOUND * INF}
    assert nonfinite_inputs(inputs) == ["expert-a", "expert-b"]
    with pytest.raises(UserError, match=r"layer.weight: NaN or Inf in expert-a, expert-b; .*--allow-nonfinite"):
        merge(MergeSession(quiet=True), inputs, SOUND * NAN)


def test_an_overflow_of_sound_inputs_is_told_apart():
    with pytest.raises(UserError, match="though all inputs are finite; are the weights too large, or 0"):
        merge(MergeSession(quiet=True), {"a": SOUND}, SOUND * INF)


def test_where_it_is_allowed_it_is_noted():
    session = MergeSession(quiet=True, allow_nonfinite=True)
    merge(session, {"a": SOUND * NAN}, SOUND * NAN)
    assert session.traces == {"layer.weight": {"nonfinite": True}}


def fail(error):
    def raise_it():
        raise error

    return raise_it


def test_a_method_that_fails_on_bad_input_is_excused():
    with pytest.raises(UserError, match="NaN or Inf in a"):
        merge(MergeSession(quiet=True), {"a": SOUND * NAN}, fail(RuntimeError("quantile")))


def test_a_method_that_fails_on_sound_input_is_not():
    with pytest.raises(RuntimeError, match="quantile"):
        merge(MergeSession(quiet=True), {"a": SOUND}, fail(RuntimeError("quantile")))


def test_integers_that_differ_are_the_users_matter():
    inputs = {"base": torch.arange(3), "a": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(UserError, match=r"layer.weight: the models hold integers here, and not the same ones"):
        merge(MergeSession(quiet=True), inputs, fail(ValueError("buffer differs")))


def test_a_users_error_passes_as_it_is():
    with pytest.raises(UserError, match=r"^density$"):
        merge(MergeSession(quiet=True), {"a": SOUND * NAN}, fail(UserError("density")))


def test_the_session_goes_with_the_options():
    options, session = MergeOptions(lazy_unpickle=True, device="meta", out_shard_size=7), MergeSession(quiet=True)
    sent = SessionOptions.of(options, session)
    assert session_of(sent) is session
    assert session_of(sent.model_copy(update={"quiet": True})) is session
    assert {key: value for key, value in dict(sent).items() if key != "session"} == dict(options)
    assert session_of(options) is None


@pytest.mark.parametrize("quiet", [False, True])
def test_progress(capsys, quiet):
    class Planner:
        _tensors = ((SimpleNamespace(name="a"), None), (SimpleNamespace(name="b"), None))
        config = SimpleNamespace(out_dtype=None)

    session = MergeSession(quiet=quiet)
    session.planned(Planner)
    merge(session, {"a": SOUND}, SOUND)
    session.close()
    shown = capsys.readouterr().err
    assert (shown == "") if quiet else ("Merging tensors: 0 of 2 tensors" in shown and "\r" not in shown)
