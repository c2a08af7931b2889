"""Runs of `mergekit-neuron merge` that meet with an accident: no network, a signal, a full disk, an error."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from textwrap import dedent

import pytest

from neuron_methods.support.targets import mark
from tests.support.checkpoints import configuration
from tests.support.commands import environment, run, running
from tests.support.merges import EXPERTS

GUARDED = """
    import socket, sys

    asked = []

    def refuse(*args, **_):
        asked.append(args)
        raise OSError("the network is unreachable")

    socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse

    from neuron_methods.cli import main

    def merge(*args):
        try:
            main(["merge", *args, "--quiet"], prog_name="mergekit-neuron")
        except SystemExit as leaving:
            return leaving.code

    assert merge("local.yaml", "out/one") == 0
    assert asked == [], asked

    from huggingface_hub.utils import _http
    _http.time.sleep = lambda seconds: None  # between its tries
    assert merge("hub.yaml", "two") == 1
    assert asked
"""


def test_no_network_is_asked_about_what_is_here(checkpoints, tmp_path):
    """Without HF_HUB_OFFLINE, and with the network unreachable; relative paths look like names of repositories."""
    shutil.copytree(checkpoints("llama-tied"), tmp_path / "models")
    local = configuration(folder="models", tokenizer=None)
    (tmp_path / "local.yaml").write_text(local)
    (tmp_path / "hub.yaml").write_text(configuration(folder="models", models=[{"model": "models/expert-z"}]))
    done = subprocess.run(
        [sys.executable, "-c", dedent(GUARDED)],
        cwd=tmp_path,
        env=environment(HF_HUB_OFFLINE="0"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    warning, line = done.stderr.splitlines()
    assert "does not answer" in warning
    assert line == (
        "error: model models/expert-z: no such directory here (check the path), and not in the Hub's cache, where the "
        "Hub cannot be asked (see: mergekit-neuron help models)"
    )
    assert sorted(os.listdir(tmp_path)) == ["hub.yaml", "local.yaml", "models", "out"]


PAUSING = """
    import sys, time
    from pathlib import Path
    from neuron_methods.cli import main
    from neuron_methods.plugin.shards import ShardWriter

    save, saved = ShardWriter.save_tensor, []

    def pause(self, name, tensor):
        save(self, name, tensor)
        saved.append(name)
        if len(saved) == 5:
            while not list(self.place.parent.glob("*.json"))[1:]:
                time.sleep(0.01)
            print("merging", flush=True)
            for _ in range(600):  # a signal that comes just before a system call is noticed after it
                time.sleep(0.1)

    ShardWriter.save_tensor = pause
    main(["merge", "merge.yaml", "parent/out", "--force", "--out-shard-size", "3K"], prog_name="mergekit-neuron")
"""


def old_output(place):
    place.mkdir(parents=True)
    (place / "config.json").write_text("old")
    mark(place)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_run_leaves_what_was_there(checkpoints, tmp_path, name, code):
    folder = tmp_path / "work"
    shutil.copytree(checkpoints("llama-tied"), folder)
    (folder / "merge.yaml").write_text(configuration())
    old = name == "SIGTERM"  # once over an old output, once where there is none
    if old:
        old_output(folder / "parent" / "out")
    with running("-c", dedent(PAUSING), folder=folder) as process:
        assert process.stdout.readline() == "merging\n"
        pieces = list((folder / "parent" / ".out.unfinished").glob("*.safetensors"))
        assert pieces
        process.send_signal(getattr(signal, name))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    # What is finished is kept, and nothing that could be taken for an output.
    assert all(path.exists() for path in pieces)
    assert "the same command with --resume goes on" in errors
    assert sorted(os.listdir(folder)) == ["base", *EXPERTS, "merge.yaml", "parent"]
    assert sorted(os.listdir(folder / "parent")) == [".out.unfinished", *["out"] * old]
    if old:
        assert (folder / "parent" / "out" / "config.json").read_text() == "old"


def test_a_full_disk_leaves_what_was_there(checkpoints, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(checkpoints("llama-tied"), folder)
    (folder / "merge.yaml").write_text(configuration())
    old_output(folder / "out")
    done = run(
        "mergekit-neuron",
        "merge",
        "merge.yaml",
        "out",
        "--force",
        "--quiet",
        folder=folder,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert done.returncode == 1
    assert done.stderr == "error: out: no space left on the disk, or for a file (18.2 kB to write)\n"
    assert sorted(os.listdir(folder)) == ["base", *EXPERTS, "merge.yaml", "out"]
    assert (folder / "out" / "config.json").read_text() == "old"


def test_debug_shows_the_traceback_before_the_line(checkpoints, tmp_path):
    (tmp_path / "merge.yaml").write_text(configuration(folder=checkpoints("llama-tied"), parameters={"density": 2}))
    done = run("mergekit-neuron", "merge", "merge.yaml", "out", "--debug", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1] == ("error: merge.yaml: parameters: density must be a number in (0, 1]; got 2")
    assert os.listdir(tmp_path) == ["merge.yaml"]
