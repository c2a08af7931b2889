"""Files are whole or absent, whatever happens; what is read back has the format and version that it should."""

import errno
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import save_file

from neuron_methods.support.documents import read_json, read_object
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import (
    file_in_place_after,
    is_disk_full,
    move_into_place,
    signals_held,
    staging_directory,
    write_json,
    write_text,
)
from neuron_methods.support.runs import beside, claimed


@pytest.fixture
def model(tmp_path):
    """An earlier output."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("old")
    return folder


# --- staging


def test_what_is_not_moved_away_is_gone(tmp_path):
    with pytest.raises(KeyboardInterrupt), staging_directory(tmp_path / "a" / "b" / "out") as staging:
        assert staging.parent == tmp_path / "a" / "b"
        (staging / "model.safetensors").write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_parents_made_for_an_output_stay_with_it(tmp_path):
    target = tmp_path / "a" / "b" / "out"
    with staging_directory(target) as staging:
        move_into_place(staging, target, force=False)
    assert os.listdir(target.parent) == ["out"]


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot write here"), staging_directory(tmp_path / "file" / "out"):
        pass


def test_permissions_follow_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        with staging_directory(tmp_path / "out") as staging:
            save_file({"a": torch.zeros(1)}, staging / "model.safetensors")
            (staging / "read-only").write_text("")
            (staging / "read-only").chmod(0o400)
            move_into_place(staging, tmp_path / "out", force=False)
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(previous)


# --- moving


def test_the_old_output_makes_way_for_the_new(model, tmp_path):
    with staging_directory(model) as staging:
        (staging / "new").write_text("")
        move_into_place(staging, model, force=True)
    assert os.listdir(model) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_that_came_into_being_meanwhile_is_kept(model, tmp_path):
    with pytest.raises(UserError, match=r"exists already"), staging_directory(model) as staging:
        move_into_place(staging, model, force=False)
    assert (model / "old").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_a_failing_move_puts_the_old_output_back(model, tmp_path):
    with pytest.raises(UserError, match=r"cannot be replaced"), staging_directory(model) as staging:
        shutil.rmtree(staging)
        move_into_place(staging, model, force=True)
    assert (model / "old").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_signals_wait_for_the_end_of_a_block():
    reached = []
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), signals_held():
        signal.raise_signal(signal.SIGINT)
        reached.append("end")
    assert reached == ["end"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_file_gets_its_name_only_after_success(tmp_path):
    path = tmp_path / "profile.json"
    with pytest.raises(ZeroDivisionError), file_in_place_after(path) as beside:
        beside.write_text("text")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    with file_in_place_after(path) as beside:
        beside.write_text("text")
        assert not path.exists()
    assert path.read_text() == "text"
    assert os.listdir(tmp_path) == ["profile.json"]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EFBIG, "File too large"), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("two"), False),
    ],
)
def test_a_full_disk_is_recognised(error, full):
    assert is_disk_full(error) == full


# --- small files


def test_a_text_is_written_whole_and_left_alone_where_it_says_so_already(tmp_path):
    path = tmp_path / "deep" / "file"
    write_text(path, "eins\nzwölf\n")
    assert path.read_bytes() == "eins\nzwölf\n".encode()
    before = path.stat()
    write_text(path, "eins\nzwölf\n")
    assert path.stat() == before
    write_text(path, "two")
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["file"]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text(path, "old")

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=r"file: cannot be written \(no space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_json_is_written_as_it_is_read_back(tmp_path):
    content = {"format": "f", "version": 2, "name": "zwölf"}
    write_json(tmp_path / "file.json", content, indent=1)
    text = (tmp_path / "file.json").read_text(encoding="utf-8")
    assert text == json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    assert read_object(tmp_path / "file.json") == content
    assert read_json(tmp_path / "file.json", "profile", format="f", version=2, again="profile again") == content


def test_what_a_dead_run_left_goes_even_before_its_parent_has_heard_that_it_died(tmp_path):
    target = tmp_path / "out"
    child = os.fork()
    if child == 0:
        beside(target, "partial").mkdir()
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    try:
        assert len(list(tmp_path.iterdir())) == 1
        with claimed(target):
            assert not list(tmp_path.glob("*.partial"))
    finally:
        os.waitpid(child, 0)
