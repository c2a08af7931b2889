"""No output takes the place of an input, or of what somebody else wrote; and one run writes to a place at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from neuron_methods.cli import main
from neuron_methods.support import files, runs, targets
from tests.support import routed, tiny

_MERGE = {
    "merge_method": "neuro_merging",
    "base_model": "base",
    "models": [{"model": "expert-a"}, {"model": "expert-b"}],
    "dtype": "float32",
}
_TASKS = {
    "tasks": [
        {
            "name": "p",
            "kind": "perplexity",
            "data": {"source": "texts.jsonl", "split": "[:4]", "validation_split": "[4:]"},
        }
    ]
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with base, experts, an adapter, data, YAMLs, and what each command makes of them."""
    folder = tiny.save_experts(tmp_path_factory.mktemp("models"))
    routed.save_adapter(folder / "base", "llama", folder / "lora", 3)
    tiny.write_texts(folder / "texts.jsonl", 8)
    tiny.write_texts(folder / "others.jsonl", 8, 1)
    (folder / "merge.yml").write_text(yaml.safe_dump(_MERGE))
    shutil.copy(folder / "merge.yml", folder / "grouped.yml")
    (folder / "tasks.yml").write_text(yaml.safe_dump(_TASKS))
    here = os.getcwd()
    os.chdir(folder)
    try:
        for name in ("profile", "groups", "prompts", "linearity", "evaluate", "recipe", "merge"):
            run(COMMANDS[name], OUT[name])
    finally:
        os.chdir(here)
    return folder


_DATA = ("--data", "a=texts.jsonl:text", "--data", "b=others.jsonl:text")
COMMANDS = {
    "profile": ("profile", "base", *_DATA, "--samples", "4", "--top", "2", "-o"),
    "groups": ("groups", "profile.safetensors", "-o"),
    "prompts": ("describe", "profile.safetensors", "--describer", "base", "--limit", "2", "--export-prompts"),
    "linearity": ("linearity", "grouped.yml", "--tokens", "8", "-o"),
    "evaluate": ("evaluate", "base", "--task", "tasks.yml", "-q", "-o"),
    "recipe": ("recipes", "new", "llama", "neuro_merging", "--base", "base", "--expert", "expert-a", "-o"),
    "merge": ("merge", "merge.yml", "merged", "--quiet", "--profile-out"),
}
OUT = {
    "profile": "profile.safetensors",
    "groups": "groups.json",
    "prompts": "prompts.jsonl",
    "linearity": "linearity.json",
    "evaluate": "scores.json",
    "recipe": "recipe.yml",
    "merge": "thresholds.json",
}
_DIRECTORIES = {
    "merge": ("merge", "merge.yml", "OUT", "--quiet"),
    "adapter": ("merge", "merge.yml", "OUT", "--quiet", "--as-adapter"),
    "tune": ("tune", "merge.yml", "--task", "tasks.yml", "-q", "--search", "density=0.1,0.2", "-o", "OUT"),
}


def run(arguments, *more, code=0):
    result = CliRunner().invoke(main, [*map(str, arguments), *map(str, more)])
    assert result.exit_code == code, result.output
    assert code == 2 or "unexpected" not in result.stderr
    return result


def refused(arguments, *more):
    """The one line; not a byte has changed, and nothing has come."""
    before = everything()
    result = run(arguments, *more, code=1)
    (line,) = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    assert everything() == before, line
    return line


def everything():
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in Path().rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------------ files

_READ = {
    "profile": ["texts.jsonl", "base/model.safetensors"],
    "groups": ["profile.safetensors", "profile.exemplars.jsonl"],
    "prompts": ["profile.safetensors", "profile.exemplars.jsonl"],
    "linearity": ["grouped.yml", "base/config.json", "expert-a/model.safetensors"],
    "evaluate": ["tasks.yml", "texts.jsonl", "base/model.safetensors"],
    "recipe": ["base/config.json", "expert-a/model.safetensors"],
    "merge": ["merge.yml", "base/config.json", "expert-a/model.safetensors"],
}


@pytest.mark.parametrize(("command", "read"), [(name, read) for name in _READ for read in _READ[name]])
def test_no_file_that_is_read_is_written(place, command, read):
    shutil.rmtree("merged")
    for force in ((), ("--force",)):
        refused(COMMANDS[command], read, *force)
    Path("link.json").symlink_to(read)
    refused(COMMANDS[command], "link.json", "--force")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_wrote_is_replaced_by_force_and_nothing_else_is(place, command):
    shutil.rmtree("merged")
    out = Path(OUT[command])
    if command != "profile":  # which goes on with what is there
        assert "exists already; " in refused(COMMANDS[command], out)
    run(COMMANDS[command], out, "--force")
    for foreign in ('{"mine": 1}', "x", "merge_method: linear\n"):
        out.write_text(foreign)
        for force in ((), ("--force",)):
            assert "is something else" in refused([*COMMANDS[command][:2], *_other(command)], out, *force)


def _other(command):
    """What comes after the first two words; a merge that was made is not in the way."""
    shutil.rmtree("merged", ignore_errors=True)
    return COMMANDS[command][2:]


_NAMES = {
    "a directory": "base",
    "below a file": "merge.yml/out.json",
    "too long": "x" * 300 + ".json",
    "in what cannot be written to": "/proc/out.json",
    "a loop of links": "loop.json",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", _NAMES)
def test_places_where_no_file_can_be(place, command, name):
    for loop in ("loop.json", "loop.safetensors"):
        Path(loop).symlink_to(loop)
    shutil.rmtree("merged")
    end = ".safetensors" if command == "profile" else ".json"
    out = _NAMES[name].replace(".json", end)
    before = everything_but_links()
    result = CliRunner().invoke(main, [*COMMANDS[command], out])
    assert result.exit_code in (1, 2) and "unexpected" not in result.stderr, result.output
    assert everything_but_links() == before


def everything_but_links():
    return {str(p): p.read_bytes() for p in Path().rglob("*") if p.is_file() and not p.is_symlink()}


# ------------------------------------------------------------------------------------------------ directories


def _into(command, out, *more):
    return [str(out) if word == "OUT" else word for word in _DIRECTORIES[command]] + list(more)


_FOREIGN = {
    "a model of somebody": lambda out: shutil.copytree("base", out),
    "a config": lambda out: (out / "config.json").write_text("{}"),
    "a pickle": lambda out: (out / "weights.bin").write_text("x"),
    "a project": lambda out: (out / ".git").mkdir(),
    "a thesis": lambda out: (out / "thesis.tex").write_text("x"),
}


@pytest.mark.parametrize("command", _DIRECTORIES)
@pytest.mark.parametrize("what", _FOREIGN)
def test_a_directory_of_somebody_is_never_replaced(place, command, what):
    out = Path("out")
    if what != "a model of somebody":
        out.mkdir()
    _FOREIGN[what](out)
    for force in ((), ("--force",)):
        refused(_into(command, out, *force))
    assert out.is_dir()


@pytest.mark.parametrize("added", ["notes.txt", ".git/config", "checkpoint-1/model.safetensors", "empty/"])
def test_what_has_come_into_an_output_of_ours_keeps_it(place, added):
    path = Path("merged", added)
    (path if added.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
    if not added.endswith("/"):
        path.write_text("mine")
    line = refused(("merge", "merge.yml", "merged", "--quiet", "--force"))
    assert f"merged: {added.rstrip('/')} in it is not of mergekit-neuron's making" in line


def test_an_output_of_ours_is_replaced_by_force(place):
    run(("merge", "merge.yml", "merged", "--quiet", "--force", "--as-adapter"))
    assert Path("merged/adapter_config.json").exists() and not Path("merged/config.json").exists()
    run(("merge", "merge.yml", "merged", "--quiet", "--force"))
    Path("merged", targets.MARK).unlink()  # as releases before there was a mark wrote it
    run(("merge", "merge.yml", "merged", "--quiet", "--force"))
    Path("merged", targets.MARK).unlink()
    Path("merged/train.log").write_text("mine")
    refused(("merge", "merge.yml", "merged", "--quiet", "--force"))


@pytest.mark.parametrize(
    "out",
    ["base", "expert-a", "base/", ".", "..", "link", "merge.yml", "merge.yml/x", "x" * 300, "/proc/x/y", "base\n"],
)
def test_places_where_no_merge_goes(place, out):
    Path("link").symlink_to("expert-b")
    os.rename("base", "base\n") if out == "base\n" else None
    if out == "base\n":
        Path("merge.yml").write_text(yaml.safe_dump({**_MERGE, "base_model": "base\n"}))
    refused(("merge", "merge.yml", out, "--quiet", "--force"))


def test_a_merge_may_go_into_the_directory_of_a_model(place):
    run(("merge", "merge.yml", "base/merged", "--quiet"))
    assert "is or holds" in refused(("merge", "merge.yml", "base", "--quiet", "--force"))


@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "config.json", "tokenizer.json", "README.md", targets.MARK, "adapter_model.safetensors"),
        *("report/report.json", "config.json/x", "model-00001-of-00002.safetensors", "x" * 300, "normalizer.json"),
    ],
)
def test_a_profile_within_the_output_is_none_of_its_files(place, name):
    for out, force in (("out", ()), ("merged", ("--force",))):
        line = refused(("merge", "merge.yml", out, "--quiet", "--profile-out", f"{out}/{name}", *force))
        assert "name another file" in line
    Path("base/labels.json").write_text("{}")  # goes along, as any companion does
    line = refused(("merge", "merge.yml", "out", "--quiet", "--profile-out", "out/labels.json"))
    assert "the output has a file of this name" in line


def test_files_of_sentence_transformers_and_speech_are_of_an_earlier_output(place):
    Path("merged", targets.MARK).unlink()
    for name in ("config_sentence_transformers.json", "sentence_bert_config.json", "normalizer.json", "tekken.json"):
        Path("merged", name).write_text("{}")
    run(("merge", "merge.yml", "merged", "--quiet", "--force"))


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize(
    ("command", "lock"),
    [
        (_into("merge", "out"), ".out.lock"),
        (_into("tune", "out"), "out/.lock"),
        (("report", "merged", "--quiet"), ".merged.lock"),
        *(((*COMMANDS[name], OUT[name], "--force"), f".{OUT[name]}.lock") for name in COMMANDS if name != "merge"),
    ],
)
def test_one_run_at_a_place(place, command, lock):
    Path(lock).parent.mkdir(exist_ok=True)
    with open(lock, "w") as other:
        other.write("process 1 on somewhere")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        line = refused(command)
    assert "another run (process 1 on somewhere) writes to it now" in line
    run(command)  # the lock went with its holder
    assert not Path(lock).exists()


def _left(name, host=None, ending="partial", process=2**22 + 1):
    return f".{name}.{host or runs._host()}.{process}.{77}.{runs._boot()}.{ending}"


def test_what_dead_runs_left_goes_with_the_next(place):
    for name in ("out", "out2"):
        Path(_left(name)).mkdir()
        Path(_left(name), "model.safetensors").write_text("half")
    Path(_left("out", host="elsewhere")).mkdir()
    alive = _left("out", process=os.getppid()).replace(".77.", f".{runs._started(os.getppid())}.")
    Path(alive).mkdir()
    result = run(_into("merge", "out"))
    left = sorted(name for name in os.listdir() if name.endswith(".partial"))
    assert left == sorted([_left("out2"), _left("out", host="elsewhere"), alive])
    notes = [line for line in result.stderr.splitlines() if line.endswith("is no more") or "elsewhere" in line]
    assert len(notes) == 2, result.stderr


def test_an_output_that_a_killed_run_had_moved_away_comes_back(place):
    old = Path(_left("merged", ending="old"))
    old.mkdir()
    Path("merged").rename(old / "merged")
    assert "exists already" in run(("merge", "merge.yml", "merged", "--quiet"), code=1).stderr
    assert Path("merged/model.safetensors").exists() and not old.exists()


# ------------------------------------------------------------------------------------------------ full disks


@pytest.mark.parametrize("moment", range(3))
@pytest.mark.parametrize("command", [*(name for name in COMMANDS if name != "merge"), "to merge", "to tune"])
def test_a_full_disk_blocks_no_run_after_it(place, monkeypatch, command, moment):
    """The disk is full as the n-th file is finished; then there is room again."""
    arguments = _into(command[3:], "out") if command.startswith("to ") else [*COMMANDS[command], f"new-{OUT[command]}"]
    shutil.copy("profile.safetensors", "new-base.safetensors")
    settle, count = files._settle, [moment]

    def full(file):
        count[0] -= 1
        if count[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        settle(file)

    monkeypatch.setattr(files, "_settle", full)
    result = CliRunner().invoke(main, list(map(str, arguments)))
    if count[0] >= 0:  # fewer files than that
        assert result.exit_code == 0, result.output
        return
    assert result.exit_code == 1 and "no space left" in result.stderr.lower(), result.output
    monkeypatch.setattr(files, "_settle", settle)
    assert not [p for p in Path().rglob("*") if p.name.endswith((".partial", ".lock", ".old"))]
    kept = Path(".out.unfinished").exists()
    assert kept == ("--resume goes on" in result.stderr)
    run([*arguments, *["--resume"] * kept])


def test_a_pair_is_never_of_two_runs(tmp_path, monkeypatch):
    """Killed between its renames, a pair has no first file; where the second serves the old one, too, that stays."""
    first, second = tmp_path / "first", tmp_path / "second"

    def write(text, **options):
        with files.pair_in_place_after(first, second, **options) as (one, other):
            one.write_text(text)
            other.write_text(text)

    write("old")
    replace = os.replace

    def killed(source, target):
        if Path(target) == first:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write("new", extends=True)
    assert (first.read_text(), second.read_text()) == ("old", "new")
    with pytest.raises(KeyboardInterrupt):
        write("newer")
    assert not first.exists()
    monkeypatch.undo()
    write("newest")
    assert (first.read_text(), second.read_text()) == ("newest", "newest")


def test_scores_that_were_killed_between_their_files_are_written_again(place):
    Path("scores.json").unlink()
    run(COMMANDS["evaluate"], "scores.json")
    assert json.loads(Path("scores.json").read_text())["model"] == "base"
