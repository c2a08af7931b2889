"""A stage: built once, moved in whole, its record apart from it, and nothing of an interrupted one."""

import json

import pytest

from neuron_methods.support.errors import UserError
from neuron_methods.support.stages import Stages, own_directory


@pytest.fixture
def stages(tmp_path):
    return Stages(tmp_path / ".stages", "the demo")


def building(text):
    def build(path):
        assert not path.exists()
        path.mkdir()
        (path / "model").write_text(text)
        return {"text": text}

    return build


def never(path):
    raise AssertionError("built again")


def everything(root):
    return {path.relative_to(root): path.stat().st_mtime_ns for path in root.rglob("*")}


def test_a_finished_stage_is_kept_and_its_result_remembered(stages, tmp_path):
    place = tmp_path / "deep" / "stage"
    first = stages.run(place, {"steps": 1, "rates": (1, 2)}, building("one"))
    before = everything(tmp_path)
    second = Stages(tmp_path / ".stages", "the demo").run(place, {"steps": 1, "rates": (1, 2)}, never)
    assert everything(tmp_path) == before
    assert (first.built, second.built) == (True, False)
    assert first.result == second.result == {"text": "one"}
    assert (second.place, second.seconds) == (place, first.seconds)


def test_nothing_of_ours_lies_in_a_stage(stages, tmp_path):
    stages.run(tmp_path / "merged", {}, building("one"))
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["model"]


def test_other_settings_or_redo_build_again_and_replace(stages, tmp_path):
    place = tmp_path / "stage"
    stages.run(place, {"steps": 1}, building("one"))
    assert stages.run(place, {"steps": 2}, building("two")).built
    assert (place / "model").read_text() == "two"
    assert stages.run(place, {"steps": 2}, building("three"), redo=True).built
    assert (place / "model").read_text() == "three"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".stages", "stage"]
    assert [path.name for path in (tmp_path / ".stages").iterdir()] == ["stage.json"]


def test_looking_up_builds_nothing(stages, tmp_path):
    place = tmp_path / "stage"
    assert stages.kept(place, {"steps": 1}) is None
    stages.run(place, {"steps": 1}, building("one"))
    assert stages.kept(place, {"steps": 1}).result == {"text": "one"}
    assert stages.kept(place, {"steps": 2}) is None
    (place / "model").unlink()
    place.rmdir()
    assert stages.kept(place, {"steps": 1}) is None
    assert stages.run(place, {"steps": 1}, building("again")).built


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_stage_leaves_nothing(stages, tmp_path, error):
    def breaks(path):
        path.mkdir()
        (path / "half").write_text("a model")
        raise error

    with pytest.raises(error):
        stages.run(tmp_path / "stage", {}, breaks)
    assert [path.name for path in tmp_path.rglob("*")] == [".stages"]


def test_an_interrupted_replacement_leaves_the_old_stage(stages, tmp_path):
    stages.run(tmp_path / "stage", {"steps": 1}, building("one"))
    before = everything(tmp_path / "stage")

    def breaks(path):
        path.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run(tmp_path / "stage", {"steps": 2}, breaks)
    assert everything(tmp_path / "stage") == before
    assert not stages.run(tmp_path / "stage", {"steps": 1}, never).built


def test_what_a_killed_run_left_is_removed(stages, tmp_path):
    left = tmp_path / ".stages" / "partial" / "stage"
    left.mkdir(parents=True)
    (left / "half").write_text("a model")
    stages.run(tmp_path / "stage", {}, building("one"))
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["model"]
    assert not left.parent.exists()


@pytest.mark.parametrize("record", ["", "[]", '{"made_from": {}}'])
def test_a_record_that_is_not_whole_is_none(stages, tmp_path, record):
    stages.run(tmp_path / "stage", {}, building("one"))
    (tmp_path / ".stages" / "stage.json").write_text(record)
    assert stages.kept(tmp_path / "stage", {}) is None


def test_somebody_elses_directory_is_refused_and_untouched(stages, tmp_path):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "thesis.txt").write_text("mine")
    before = everything(tmp_path)
    for redo in (False, True):
        with pytest.raises(UserError, match="was not written by the demo"):
            stages.run(tmp_path / "stage", {}, never, redo=redo)
    assert everything(tmp_path) == before


def test_stages_of_one_name_in_different_places_are_told_apart(stages, tmp_path):
    stages.run(tmp_path / "a" / "x", 1, building("one"))
    stages.run(tmp_path / "b" / "x", 2, building("two"))
    assert stages.run(tmp_path / "a" / "x", 1, never).result == {"text": "one"}


def test_records_are_found_again_where_the_whole_directory_was_moved(stages, tmp_path):
    stages.run(tmp_path / "out" / "stage", {}, building("one"))
    moved = Stages(tmp_path / "out" / ".stages", "the demo")
    moved.run(tmp_path / "out" / "other", {}, building("two"))
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    moved = Stages(tmp_path / "elsewhere" / ".stages", "the demo")
    assert not moved.run(tmp_path / "elsewhere" / "other", {}, never).built


def test_removing_forgets(stages, tmp_path):
    stages.run(tmp_path / ".stages" / "within", {}, building("one"))
    stages.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write here .*; choose another directory"):
        Stages(tmp_path / "file" / "records", "the demo").run(tmp_path / "stage", {}, never)


def test_a_directory_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def own(name, **about):
        return own_directory(tmp_path / name, "mark.json", about, f"--out {name}", "the demo")

    assert own("new/out", seed=1) == tmp_path / "new" / "out"
    (tmp_path / "new" / "out" / "model").write_text("ours")
    assert own("new/out", seed=2) == tmp_path / "new" / "out"
    assert json.loads((tmp_path / "new" / "out" / "mark.json").read_text()) == {"seed": 2}
    (tmp_path / "empty").mkdir()
    own("empty")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    for name, message in (
        ("theirs", "holds files that the demo did not write"),
        ("file", "exists and is not a directory"),
        ("a+b", r"a '\+' in a model's path"),
    ):
        with pytest.raises(UserError, match=f"--out {name.replace('+', '.')}: .*{message}"):
            own(name)
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "a+b").exists()
