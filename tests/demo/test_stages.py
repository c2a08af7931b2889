"""Finished stages are kept, unfinished ones leave nothing."""

import pytest

from neuron_methods.demo.stages import run_stage, write_text
from neuron_methods.support.errors import UserError


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


def test_a_finished_stage_is_kept_and_its_result_remembered(tmp_path) -> None:
    place = tmp_path / "deep" / "stage"
    first = run_stage(place, {"steps": 1, "rates": (1, 2)}, building("one"))
    before = everything(tmp_path)
    second = run_stage(place, {"steps": 1, "rates": (1, 2)}, never)
    assert everything(tmp_path) == before
    assert (first.built, second.built) == (True, False)
    assert first.result == second.result == {"text": "one"}
    assert second.seconds == first.seconds


def test_other_settings_or_redo_build_again_and_replace(tmp_path) -> None:
    place = tmp_path / "stage"
    run_stage(place, {"steps": 1}, building("one"))
    assert run_stage(place, {"steps": 2}, building("two")).built
    assert (place / "model").read_text() == "two"
    assert run_stage(place, {"steps": 2}, building("three"), redo=True).built
    assert (place / "model").read_text() == "three"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_stage_leaves_nothing(tmp_path, error) -> None:
    def breaks(path):
        path.mkdir()
        (path / "half").write_text("a model")
        raise error

    with pytest.raises(error):
        run_stage(tmp_path / "stage", {}, breaks)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_replacement_leaves_the_old_stage(tmp_path) -> None:
    run_stage(tmp_path / "stage", {"steps": 1}, building("one"))
    before = everything(tmp_path / "stage")

    def breaks(path):
        path.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "stage", {"steps": 2}, breaks)
    assert everything(tmp_path / "stage") == before
    assert not run_stage(tmp_path / "stage", {"steps": 1}, never).built


def test_what_a_killed_run_left_is_removed(tmp_path) -> None:
    left = tmp_path / ".partial" / "stage"
    left.mkdir(parents=True)
    (left / "half").write_text("a model")
    run_stage(tmp_path / "stage", {}, building("one"))
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["demo-stage.json", "model"]
    assert not (tmp_path / ".partial").exists()


def test_somebody_elses_directory_is_refused_and_untouched(tmp_path) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "thesis.txt").write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(UserError, match="was not written by the demo"):
        run_stage(tmp_path / "stage", {}, never)
    assert everything(tmp_path) == before


def test_write_text_replaces_whole(tmp_path) -> None:
    write_text(tmp_path / "file", "one")
    write_text(tmp_path / "file", "two")
    assert (tmp_path / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
