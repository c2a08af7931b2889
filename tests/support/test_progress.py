"""Progress: a bar on a terminal; elsewhere a line now, another one every ten seconds, and no carriage returns."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from neuron_methods.support import progress
from neuron_methods.support.progress import progress_bar


@pytest.fixture
def log(capsys):
    """What stderr, which is no terminal here, has held so far."""
    held = []

    def read():
        held.append(capsys.readouterr().err)
        return "".join(held)

    return read


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self, bar) -> None:
        self.now = bar.start_t
        bar._time = lambda: self.now


def test_a_log_has_a_line_at_the_start_and_one_every_ten_seconds(log):
    with progress_bar(total=100, what="sums", unit="example") as bar:
        clock = Clock(bar)
        assert log() == "sums: 0 of 100 examples, 00:00 elapsed, ? to go\n"
        for _ in range(60):
            clock.now += 0.5
            bar.update()
    assert log().splitlines()[1:] == [
        "sums: 20 of 100 examples, 00:10 elapsed, 00:40 to go",
        "sums: 40 of 100 examples, 00:20 elapsed, 00:30 to go",
        "sums: 60 of 100 examples, 00:30 elapsed, 00:20 to go",
    ]
    assert "\r" not in log()


def test_work_that_is_done_within_ten_seconds_is_one_line(log):
    assert list(progress_bar(range(50), what="layers", unit="layer")) == list(range(50))
    assert log() == "layers: 0 of 50 layers, 00:00 elapsed, ? to go\n"


def test_one_slow_unit_says_nothing_before_it_is_done(log):
    with progress_bar(total=2, what="merge", unit="tensor") as bar:
        clock = Clock(bar)
        clock.now += 3600
        assert len(log().splitlines()) == 1
        bar.update()
        assert log().splitlines()[1:] == ["merge: 1 of 2 tensors, 1:00:00 elapsed, 1:00:00 to go"]


def test_where_the_end_is_not_known_none_is_told(log):
    with progress_bar(iter("abc"), what="points", unit="point") as bar:
        clock = Clock(bar)
        for _ in bar:
            clock.now += 10
            bar.set_postfix_str("best 0.5", refresh=False)
    lines = log().splitlines()
    assert lines[0] == "points: 0 points, 00:00 elapsed"
    assert lines[-1].startswith("points: ") and lines[-1].endswith(" elapsed, best 0.5")


def test_an_end_that_comes_to_be_known_is_told(log):
    with progress_bar(what="points", unit="point") as bar:
        clock = Clock(bar)
        bar.total = 4
        clock.now += 60
        bar.update()
    assert log().splitlines()[1:] == ["points: 1 of 4 points, 01:00 elapsed, 03:00 to go"]


def test_nothing_is_shown_where_nothing_is_wanted(log):
    with progress_bar(total=3, what="sums", unit="example", shown=False) as bar:
        bar.update(3)
    assert list(progress_bar([1, 2], what="sums", unit="example", shown=False)) == [1, 2]
    assert log() == ""


def test_the_interval_is_ten_seconds():
    assert progress.LINE_INTERVAL == 10.0


@pytest.mark.parametrize("leave", [True, False])
def test_a_terminal_has_a_bar(leave):
    code = f"""
from neuron_methods.support.progress import progress_bar
for _ in progress_bar(range(3), what="sums", unit="example", leave={leave}): pass
"""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
    shown = os.read(ours, 10_000).decode()
    os.close(theirs)
    os.close(ours)
    assert "\r" in shown and "sums:   0%|" in shown
    assert shown.endswith("\r\n") == leave
