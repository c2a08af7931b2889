"""Jobs of the page: commands in processes of their own."""

from __future__ import annotations

import pytest

import neuron_methods
from neuron_methods.plugin.work import Work, forget
from neuron_methods.support.errors import UserError
from neuron_methods.support.progress import LINE_VARIABLE, Counted, line_interval, progress_bar
from neuron_methods.support.runs import claimed
from neuron_methods.ui.jobs import Desk, Job
from neuron_methods.ui.showing import job_told


def test_a_job_says_what_the_command_says_and_takes_no_module_from_where_it_runs(tmp_path):
    for name in ("yaml", "click", "neuron_methods"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken')")
    desk = Desk()
    job = desk.start("me", lambda: Job("version", ["--version"], tmp_path))
    with pytest.raises(UserError, match="a version is running on this page's machine"):
        desk.start("you", lambda: Job("other", ["--version"], tmp_path))
    for _ in job.follow():
        pass
    assert job.code == 0 and job_told(job).startswith('<p class="good"')
    assert job.lines[0].endswith(neuron_methods.__version__)
    assert desk.start("you", lambda: Job("fail", ["merge"], tmp_path)).what == "fail"
    desk.close()
    assert desk.of("me") is None


def test_what_a_command_says_is_shown_as_it_is(tmp_path):
    job = Job("merge", ["<b>no such command</b>"], tmp_path)
    for _ in job.follow():
        pass
    assert job.code == 2 and "<b>" not in job_told(job) and "&lt;b&gt;" in job_told(job)


def test_lines_of_progress_are_read_as_they_are_written(capsys, monkeypatch):
    monkeypatch.setenv(LINE_VARIABLE, "0")
    with progress_bar(total=3, what="Merging tensors", unit="tensor") as bar:
        bar.update(2)
    assert Counted("Merging tensors", 2, 3) in [Counted.read(line) for line in capsys.readouterr().err.splitlines()]
    assert Counted.read("  in all: 20 tensors, 26,816 parameters") is None
    for wrong in ("x", "-1"):
        monkeypatch.setenv(LINE_VARIABLE, wrong)
        assert line_interval() >= 0


def test_only_pieces_of_a_merge_are_forgotten_and_those_of_a_living_one_are_not(tmp_path):
    target = tmp_path / "out"
    work = Work(target)
    work.place.mkdir()
    forget(target)
    assert work.place.is_dir()
    work.place.rmdir()
    work.open({}, "out", resume=False, anew=False)
    with claimed(target), pytest.raises(UserError, match="another run"):
        forget(target)
    assert work.place.is_dir()
    forget(target)
    assert list(tmp_path.iterdir()) == []
