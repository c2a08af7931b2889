"""What the doctor finds, and that it finds what is wrong."""

from __future__ import annotations

import os
import subprocess
from importlib import metadata

import pytest
from click.testing import CliRunner

from neuron_methods.cli import main
from neuron_methods.sharing import doctor
from tests.sharing.conftest import TOKEN


def run(*arguments):
    done = CliRunner().invoke(main, ["doctor", *arguments])
    assert TOKEN not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    lines = done.output.splitlines()
    return done.exit_code, {line[:18].strip(): line[18:] for line in lines}, lines


def test_it_names_what_is_installed_and_whose_the_token_is(standin):
    code, found, lines = run()
    assert code == 0 and lines[-1] == "all is well"
    assert found["torch"] == metadata.version("torch") and found["mergekit"] == metadata.version("mergekit")
    assert found["hook"].startswith("mergekit_neuron_autoload.pth is in ")
    assert found["token"] == "of alice, may write" and found["Hub"] == f"{standin.url} answers"


def test_a_token_that_the_hub_does_not_take_is_wrong(standin, monkeypatch):
    standin.users.clear()
    code, found, lines = run()
    assert (code, lines[-1]) == (1, "1 of these is wrong")
    assert found["token"].startswith("wrong: the Hub does not take it (")
    monkeypatch.delenv("HF_TOKEN")
    assert run()[1]["token"].startswith("note: none")


def test_the_hub_is_not_asked_where_it_is_not_to_be(standin):
    assert run("--no-hub")[1]["Hub"] == "note: not asked"
    assert standin.asked == []


def test_what_is_too_old_or_missing_is_wrong(monkeypatch):
    version = metadata.version

    def other(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return {"torch": "1.0", "matplotlib": "1.0"}.get(name) or version(name)

    monkeypatch.setattr(doctor.metadata, "version", other)
    code, found, lines = run("--no-hub")
    assert (code, lines[-1]) == (1, "3 of these are wrong")
    assert found["torch"] == "wrong: 1.0, and torch>=2.6 is needed: pip install 'torch>=2.6'"
    assert found["peft"] == "wrong: not installed; pip install 'peft>=0.21'"
    assert found["matplotlib"].startswith("wrong: 1.0, and ")


def test_a_hook_that_is_off_or_gone(monkeypatch):
    monkeypatch.setattr(doctor, "_PTH", "no-such.pth")
    assert run("--no-hub")[1]["hook"].startswith("wrong: no-such.pth is nowhere on the path")
    monkeypatch.setenv("MERGEKIT_NEURON_AUTOLOAD", "0")
    assert run("--no-hub")[1]["hook"].startswith("note: switched off by MERGEKIT_NEURON_AUTOLOAD=0")


def test_a_look_that_fails_is_a_line_and_the_others_go_on(monkeypatch):
    def broken():
        raise RuntimeError("no such driver")
        yield

    broken.__name__ = "_devices"
    monkeypatch.setattr(doctor, "_devices", broken)
    code, found, _ = run("--no-hub")
    assert code == 1 and found["devices"] == "wrong: RuntimeError: no such driver" and "memory" in found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_the_command(shell):
    script = CliRunner().invoke(main, ["completion", shell])
    assert script.exit_code == 0 and "_MERGEKIT_NEURON_COMPLETE" in script.output and "mergekit-neuron" in script.output
    asked = {"COMP_WORDS": "mergekit-neuron comp", "COMP_CWORD": "1"}
    if shell == "bash":
        environment = {**os.environ, **asked, "_MERGEKIT_NEURON_COMPLETE": "bash_complete"}
        told = subprocess.run(["mergekit-neuron"], env=environment, capture_output=True, text=True, check=True)
        assert told.stdout.split() == ["plain,compare", "plain,completion"]


@pytest.mark.parametrize(
    "line",
    [
        "evaluate x/fo",
        "profile x/fo",
        "generate a x/fo",
        "recipes new --base x/fo",
        "verify x/fo",
        "evaluate a -o x/fo",
    ],
)
def test_models_and_files_are_completed_as_paths(line):
    words = f"mergekit-neuron {line}"
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1), "_X_COMPLETE": "bash_complete"}
    told = CliRunner().invoke(main, env=asked, prog_name="mergekit-neuron", complete_var="_X_COMPLETE")
    assert told.stdout.split() in (["file,x/fo"], ["dir,x/fo"])
