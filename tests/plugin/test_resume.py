"""An interrupted merge goes on where it was, with --resume, and leaves the bytes of one that was not interrupted."""

import errno
import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
from mergekit.options import MergeOptions

from neuron_methods.adapters.kept import Precision
from neuron_methods.plugin import merging
from neuron_methods.plugin.adapter_output import AdapterOutput
from neuron_methods.plugin.merging import MergeWitness, merge_to_directory
from neuron_methods.plugin.output import ModelOutput
from neuron_methods.plugin.shards import ShardWriter
from neuron_methods.sharing.publishing import merge_witness
from neuron_methods.support import targets
from neuron_methods.support.errors import UserError
from neuron_methods.support.fingerprints import Watch
from tests.support.checkpoints import configuration, edit
from tests.support.merges import EXPERTS, UP

OPTIONS = {"out_shard_size": 5000}


class Interrupted(BaseException):
    """What no merge is at fault for."""


def merge(source=None, out="out", *, stop=None, output=None, witness=None, options=OPTIONS, **arguments):
    """A merge, that is interrupted after `stop` tensors; returns the names of those that it merged."""
    merged = []
    inner = witness or merge_witness()

    def on_tensor(name, *rest):
        if len(merged) == stop:
            raise Interrupted
        merged.append(name)
        return inner.on_tensor(name, *rest) if inner.on_tensor is not None else None

    merge_to_directory(
        source or configuration(),
        out,
        progress=False,
        options=MergeOptions(**options),
        output=output,
        witness=MergeWitness(inner.finish, inner.on_plan, on_tensor, inner.recall),
        **arguments,
    )
    return merged


def everything(folder="out"):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def outputs():
    return {"model": None, "adapter": AdapterOutput(Precision(rank=2))}


@pytest.mark.parametrize("kind", ["model", "adapter"])
@pytest.mark.parametrize("method", ["neuro_merging", "neuron_response", "dare_linear"])
def test_what_is_missing_is_merged_and_the_bytes_are_those_of_one_run(workspace, kind, method):
    folder = workspace("llama-tied")
    parameters = {"dare_linear": {"density": 0.5, "weight": 0.5}}.get(method, {})
    source = configuration(method, parameters=parameters)
    options = {**OPTIONS, "random_seed": 3}
    everyone = merge(source, "whole/out", output=outputs()[kind], options=options)
    with pytest.raises(Interrupted):
        merge(source, output=outputs()[kind], stop=12, options=options)
    left = sorted(Path(".out.unfinished").glob("*.safetensors"))
    assert left
    first = {path.name: path.stat().st_mtime_ns for path in left}
    with pytest.raises(Interrupted):
        merge(source, output=outputs()[kind], stop=0, resume=True, options=options)
    assert {path.name: path.stat().st_mtime_ns for path in left} == first  # kept, not made anew
    again = merge(source, output=outputs()[kind], resume=True, options=options)
    assert 0 < len(again) < len(everyone)
    assert everything() == everything("whole/out")
    assert sorted(os.listdir(folder)) == ["base", *EXPERTS, "out", "whole"]


def test_without_the_option_it_is_named(workspace):
    folder = workspace("llama-tied")
    with pytest.raises(Interrupted):
        merge(stop=15)
    with pytest.raises(
        UserError, match=r"out: an unfinished merge of this plan is there, and \d of .*--resume goes on"
    ):
        merge()
    assert Path(".out.unfinished").is_dir()  # nothing of it is lost by that
    everyone = merge(force=True)
    assert len(everyone) == 20
    assert sorted(os.listdir(folder)) == ["base", *EXPERTS, "out"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: edit(Path("expert-b"), lambda tensors: tensors[UP].mul_(2)), "expert-b/model.safetensors"),
        (lambda: None, "--random-seed"),
    ],
)
def test_another_plan_is_not_gone_on_with(workspace, change, named, capfd):
    workspace("llama-tied")
    with pytest.raises(Interrupted):
        merge(stop=15)
    change()
    options = {**OPTIONS, **({"random_seed": 1} if named == "--random-seed" else {})}
    with pytest.raises(UserError, match=rf"out: the unfinished merge there was begun otherwise \({named}\)"):
        merge(resume=True, options=options)
    assert Path(".out.unfinished").is_dir()
    assert len(merge(options=options)) == 20  # what is of no use goes, and that is said
    assert f"an unfinished merge of another plan was there ({named}); begun anew" in capfd.readouterr().err


def test_a_piece_that_is_not_as_it_was_is_made_again(workspace):
    workspace("llama-tied")
    merge(out="whole/out")
    with pytest.raises(Interrupted):
        merge(stop=15)
    first, second, *_ = sorted(Path(".out.unfinished").glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    second.with_suffix(".json").write_text('{"file": [')
    merge(resume=True)
    assert everything() == everything("whole/out")


@pytest.mark.parametrize("ending", ["safetensors", "json"])
def test_a_piece_that_leads_elsewhere_is_made_again(workspace, ending):
    folder = workspace("llama-tied")
    merge(out="whole/out")
    with pytest.raises(Interrupted):
        merge(stop=15)
    file = min(Path(".out.unfinished").glob(f"0*.{ending}"))
    before = file.rename(folder / "whole" / "elsewhere").read_bytes()
    file.symlink_to(folder / "whole" / "elsewhere")
    merge(resume=True)
    assert everything() == everything("whole/out")
    assert not any(path.is_symlink() for path in Path("out").iterdir())
    assert Path("whole/elsewhere").read_bytes() == before
    assert sorted(os.listdir(folder)) == ["base", *EXPERTS, "out", "whole"]


RECORDS = {
    "tensors of none": lambda content: content.update(tensors=None),
    "a trace that is none": lambda content: content["tensors"].update(dict.fromkeys(content["tensors"], 3)),
    "another figure": lambda content: next(iter(content["tensors"].values())).update(parallel="much"),
    "a tensor too few": lambda content: content["tensors"].popitem(),
    "a tensor of another model": lambda content: content["tensors"].update(alien={}),
}


@pytest.mark.parametrize("change", RECORDS)
def test_a_record_that_was_changed_is_of_no_use(workspace, change):
    folder = workspace("llama-tied")
    merge(out="whole/out")
    with pytest.raises(Interrupted):
        merge(stop=15)
    record = min(Path(".out.unfinished").glob("0*.json"))
    content = json.loads(record.read_text())
    RECORDS[change](content)
    record.write_text(json.dumps(content))
    merge(resume=True)
    assert everything() == everything("whole/out")
    assert sorted(os.listdir(folder)) == ["base", *EXPERTS, "out", "whole"]


@pytest.mark.parametrize("content", ["garbage", *(json.dumps({"seed": 1, "made_from": m}) for m in ([], {}, "all"))])
def test_what_a_merge_was_begun_from_may_be_damaged(workspace, content, capfd):
    workspace("llama-tied")
    with pytest.raises(Interrupted):
        merge(stop=15)
    Path(".out.unfinished/begun.json").write_text(content)
    damaged = r"^out: \.out\.unfinished/begun\.json, which .*, is damaged; leave --resume out to begin anew$"
    with pytest.raises(UserError, match=damaged):
        merge(resume=True)
    assert Path(".out.unfinished").is_dir()
    assert len(merge()) == 20
    assert "out: an unfinished merge was there (its begun.json is damaged); begun anew" in capfd.readouterr().err


def test_a_yaml_is_what_it_says_and_not_what_it_is_called(workspace):
    workspace("llama-tied")
    merge(out="whole/out")
    for name in ("one.yml", "other.yml"):
        Path(name).write_text(configuration())
    with pytest.raises(Interrupted):
        merge(stop=12, config_name="one.yml")
    with pytest.raises(UserError, match=r"begun otherwise \(the YAML\)"):
        merge(configuration() + "# more\n", resume=True, config_name="one.yml")
    Path("one.yml").unlink()
    assert len(merge(resume=True, config_name="other.yml")) < 20
    assert everything() == everything("whole/out")


def test_what_no_report_has_looked_at_is_in_no_report(workspace):
    workspace("llama-tied")
    with pytest.raises(Interrupted):
        merge(stop=12)
    with pytest.raises(UserError, match=r"begun otherwise \(--report\)"):
        merge(resume=True, witness=merge_witness(report=True))


def test_what_no_merge_has_left_is_not_removed(workspace):
    workspace("llama-tied")
    place = Path(".out.unfinished")
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    for make in (
        lambda: place.symlink_to("mine"),
        lambda: Path("mine").rename(place),
        lambda: place.write_text("mine"),
    ):
        make()
        with pytest.raises(
            UserError, match=r"\.out\.unfinished: is in the way, and was left by no merge; move it away"
        ):
            merge(resume=True, force=True)
        assert os.path.lexists(place) and not Path("out").exists()
        if place.is_dir() and not place.is_symlink():
            assert (place / "notes.txt").read_text() == "mine"
            place.rename("mine")
        else:
            place.unlink()
    place.mkdir()  # of a run that was killed as it began
    merge()
    assert not place.exists()


def test_a_removal_that_is_broken_off_is_in_nobodys_way(workspace, monkeypatch):
    folder, unlink, scandir, left = workspace("llama-tied"), os.unlink, os.scandir, [0]

    class InOrder(ExitStack):
        """What a file system gives in any order, the record of the merge first."""

        def __init__(self, path="."):
            super().__init__()
            self.entries = sorted(scandir(path), key=lambda entry: entry.name)

        def __iter__(self):
            return self

        def __next__(self):
            if not self.entries:
                raise StopIteration
            return self.entries.pop()

    def counted(path, **where):
        if os.path.basename(path).startswith(("0", "begun")):  # of an unfinished merge
            left[0] -= 1
            if not left[0]:
                raise Interrupted
        unlink(path, **where)

    monkeypatch.setattr(os, "unlink", counted)
    monkeypatch.setattr(os, "scandir", InOrder)
    for number in range(1, 10):
        left[0] = number
        with pytest.raises(Interrupted):
            merge(force=True)
        assert Path(".out.unfinished").is_dir()
    merge(force=True)
    assert sorted(os.listdir(folder)) == ["base", *EXPERTS, "out"]


def test_nothing_is_kept_of_a_merge_that_is_at_fault_or_has_finished_no_piece(workspace):
    folder = workspace("llama-tied")
    with pytest.raises(Interrupted):
        merge(stop=1)
    edit(folder / "expert-b", lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(UserError, match="NaN or Inf"):
        merge()
    assert sorted(os.listdir(folder)) == ["base", *EXPERTS]
    assert merge(resume=True, allow_nonfinite=True)  # there is nothing to go on with


def test_nothing_is_kept_for_a_command_that_never_goes_on(workspace, capfd):
    folder = workspace("llama-tied")
    with pytest.raises(Interrupted):
        merge(stop=15, resume=False)
    assert sorted(os.listdir(folder)) == ["base", *EXPERTS]
    assert "--resume" not in capfd.readouterr().err


def raising(error):
    def fail(*_args, **_keys):
        raise error

    return fail


def full_at_the_end(patch):
    """The disk is full as the last piece is written."""
    write, left = ShardWriter.save_tensor, [16]

    def save_tensor(self, *tensor):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, *tensor)

    patch.setattr(ShardWriter, "save_tensor", save_tensor)


def appears(patch):
    """Something else comes to where the output will be."""
    check = Watch.check

    def and_something_comes(self):
        check(self)
        Path("out").mkdir()

    patch.setattr(Watch, "check", and_something_comes)


SURROUNDINGS = {
    "no room for a piece": (full_at_the_end, "no space left on the disk"),
    "no room, as safetensors has it": (
        lambda patch: patch.setattr(
            merging, "write_text", raising(RuntimeError("Error while serializing: No space left on device"))
        ),
        "no space left on the disk",
    ),
    "no room for the mark": (
        lambda patch: patch.setattr(targets, "mark", raising(UserError("mark: cannot be written"))),
        "mark: cannot be written",
    ),
    "an input that cannot be read": (
        lambda patch: patch.setattr(ModelOutput, "verify", raising(OSError(errno.EIO, os.strerror(errno.EIO), "base"))),
        "Input/output error",
    ),
    "another output there": (appears, "exists already"),
}


@pytest.mark.parametrize("what", SURROUNDINGS)
def test_what_is_finished_outlasts_a_failure_around_it(workspace, monkeypatch, capfd, what):
    folder = workspace("llama-tied")
    merge(out="whole/out", profile_out="whole/out/profile.json")
    fail, message = SURROUNDINGS[what]
    with monkeypatch.context() as patch, pytest.raises((UserError, OSError), match=message):
        fail(patch)
        merge(profile_out="out/profile.json")
    assert "kept; the same command with --resume goes on" in capfd.readouterr().err
    if Path("out").exists():
        Path("out").rmdir()
    assert len(merge(resume=True, profile_out="out/profile.json")) < 20
    assert everything() == everything("whole/out")
    assert sorted(os.listdir(folder)) == ["base", *EXPERTS, "out", "whole"]


@pytest.mark.parametrize("arguments", [{"resume": True}, {"force": True}])
def test_what_is_finished_needs_no_room_a_second_time(workspace, monkeypatch, arguments):
    workspace("llama-tied")
    merge(out="whole/out")
    with pytest.raises(Interrupted):
        merge(stop=15)
    there = sum(path.stat().st_size for path in Path(".out.unfinished").glob("*.safetensors"))
    need = sum(path.stat().st_size for path in Path("whole/out").glob("*.safetensors"))
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need - there))
    with pytest.raises(UserError, match=r"to write, .* free; make room"):
        merge(out="other")
    merge(**arguments)
    assert everything() == everything("whole/out")


def refuse_the_output(folder, patch):
    """What was written is not what was planned, and says so after a file was not there."""
    patch.setattr(ModelOutput, "finish", lambda *_: None)


def change_an_input(folder, patch):
    patch.setattr(ModelOutput, "verify", lambda *_: edit(folder / "expert-b", lambda tensors: tensors[UP].mul_(2)))


def spoil_an_input(folder, patch):
    edit(folder / "expert-b", lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (refuse_the_output, "verification failed"),
        (change_an_input, "changed while it was read"),
        (spoil_an_input, "NaN or Inf"),
    ],
)
def test_what_cannot_be_gone_on_with_is_not_kept(workspace, monkeypatch, capfd, fault, message):
    folder = workspace("llama-tied")
    fault(folder, monkeypatch)
    with pytest.raises(UserError, match=message):
        merge()
    assert "kept" not in capfd.readouterr().err
    assert sorted(os.listdir(folder)) == ["base", *EXPERTS]


def test_a_report_is_that_of_a_merge_in_one_run(workspace):
    workspace("llama-tied")
    merge(out="whole/out", witness=merge_witness(report=True))
    with pytest.raises(Interrupted):
        merge(stop=12, witness=merge_witness(report=True))
    merge(resume=True, witness=merge_witness(report=True))
    there, whole = (json.loads(Path(out, "report/report.json").read_text()) for out in ("out", "whole/out"))
    assert there == whole
