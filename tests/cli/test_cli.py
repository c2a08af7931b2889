"""The command's frame: laziness, help, and what the end of a run becomes. Subcommands here are made up."""

import importlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from textwrap import dedent

import click
import pytest
from click.testing import CliRunner

import neuron_methods
from neuron_methods.cli import SUBCOMMANDS, LazyGroup, Subcommand, main
from neuron_methods.cli.common import debug_option
from tests.support import commands

HEAVY = {"torch", "numpy", "transformers", "mergekit", "accelerate", "datasets", "peft", "huggingface_hub"}

FAKE_SUBCOMMAND = """
    import errno
    import sys
    import time
    from pathlib import Path

    import click

    from neuron_methods.cli.common import debug_option
    from neuron_methods.support.errors import UserError

    FAILURES = {
        "user": UserError("merge.yaml: parameter density:\\n  2 is out of range"),
        "bug": ValueError("two\\nlines"),
        "bare": RuntimeError(),
        "interrupt": KeyboardInterrupt(),
        "full": OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors"),
        "wrapped": RuntimeError("Error while serializing: No space left on device (os error 28)"),
        "missing": FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        "exit": SystemExit(7),
        "usage": click.UsageError("not like this"),
    }

    @click.command("fake-run")
    @click.argument("failure", default="")
    @click.option("--wait", type=click.Path(path_type=Path))
    @debug_option
    @click.pass_context
    def fake_run(ctx, failure, wait):
        '''A subcommand that ends as told.'''
        if wait:
            try:
                print("ready", flush=True)
                for _ in range(600):  # a signal that comes just before a system call is noticed after it
                    time.sleep(0.1)
            finally:
                wait.write_text("cleaned up")
        if failure == "ctx":
            ctx.exit(5)
        if failure:
            raise FAILURES[failure]
        click.echo("done")
"""


@pytest.fixture
def module_folder(tmp_path, monkeypatch):
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "fake_subcommands.py").write_text(dedent(FAKE_SUBCOMMAND), encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("fake_subcommands", None)


TABLE = {
    "fake-run": Subcommand("fake_subcommands", "End as told."),
    "broken": Subcommand("no_such_module_at_all", "Cannot be imported."),
}


@pytest.fixture
def run(module_folder, monkeypatch):
    """Run the fake command in this process: `run("fake-run", "user").stderr`."""
    monkeypatch.delenv("MERGEKIT_NEURON_DEBUG", raising=False)

    @click.group(cls=LazyGroup, subcommands=TABLE)
    @debug_option
    def group():
        pass

    def invoke(*args):
        return CliRunner().invoke(group, list(args), prog_name="fake")

    return invoke


def run_command(*args, **environment):
    return subprocess.run(
        [sys.executable, "-m", "neuron_methods", *args],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


# --- laziness


def modules_after(code):
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_is_light():
    loaded = modules_after("import neuron_methods")
    assert not loaded & HEAVY
    assert {name for name in loaded if name.startswith("neuron_methods")} == {"neuron_methods"}


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["no-such-subcommand"], []])
def test_the_frame_is_light(args):
    code = f"""
from neuron_methods.cli import main
try:
    main({args!r}, prog_name="mergekit-neuron")
except SystemExit:
    pass
"""
    loaded = modules_after(code)
    assert not loaded & HEAVY
    assert not {entry.module for entry in SUBCOMMANDS.values()} & loaded


def test_public_names_are_lazy_and_listed():
    assert set(neuron_methods.__all__) <= set(dir(neuron_methods))
    assert neuron_methods.UserError is importlib.import_module("neuron_methods.support.errors").UserError
    with pytest.raises(AttributeError, match="no attribute 'rgister'"):
        neuron_methods.rgister  # noqa: B018


# --- help, version, usage


def test_help_lists_every_subcommand_with_its_help():
    done = run_command("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name, entry in SUBCOMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(entry.help)}$", done.stdout, re.MULTILINE)
    assert "mergekit-neuron merge merge.yaml" in done.stdout


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_help_and_takes_debug(name):
    done = run_command(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--debug" in done.stdout
    assert "--quiet" not in done.stdout or re.search(r"-q, --quiet\b", done.stdout)


def test_version():
    done = run_command("--version")
    assert (done.returncode, done.stdout) == (0, f"mergekit-neuron, version {neuron_methods.__version__}\n")


def test_unknown_subcommand_names_the_known_ones():
    done = run_command("mrge")
    assert done.returncode == 2
    assert f"'mrge' (there are: {', '.join(SUBCOMMANDS)})" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("args", [["--no-such-option"], ["merge", "--no-such-option"], []])
def test_wrong_usage_exits_with_2(args):
    done = run_command(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_the_installed_command_is_this_group():
    (script,) = (
        point for point in importlib.metadata.entry_points(group="console_scripts") if point.name == "mergekit-neuron"
    )
    assert script.load() is main


# --- how runs end


def test_success(run):
    result = run("fake-run")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "done\n", "")


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        ("user", 1, "error: merge.yaml: parameter density: 2 is out of range"),
        ("bug", 1, "error: unexpected ValueError: two lines; run again with --debug for the traceback"),
        ("bare", 1, "error: unexpected RuntimeError; run again with --debug for the traceback"),
        ("full", 1, "error: out/model.safetensors: No space left on device"),
        (
            "wrapped",
            1,
            "error: no space left on device (Error while serializing: No space left on device (os error 28))",
        ),
        ("missing", 1, "error: x: No such file or directory"),
    ],
)
def test_an_error_is_one_line_on_stderr(run, failure, code, line):
    result = run("fake-run", failure)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"{line}\n")


def test_interrupt(run):
    result = run("fake-run", "interrupt")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(("failure", "code"), [("exit", 7), ("ctx", 5)])
def test_an_explicit_exit_passes_through(run, failure, code):
    result = run("fake-run", failure)
    assert (result.exit_code, result.output) == (code, "")


def test_a_usage_error_of_a_subcommand(run):
    result = run("fake-run", "usage")
    assert result.exit_code == 2
    assert "Usage: fake fake-run" in result.stderr
    assert "Error: not like this" in result.stderr


def test_a_subcommand_that_cannot_be_imported_is_an_error_and_does_not_disturb_help(run):
    result = run("broken")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: unexpected ModuleNotFoundError: No module named 'no_such_module_at_all'")
    assert "Cannot be imported." in run("--help").stdout


@pytest.mark.parametrize("args", [["--debug", "fake-run", "{}"], ["fake-run", "{}", "--debug"]])
@pytest.mark.parametrize("failure", ["user", "bug"])
def test_debug_shows_the_traceback_before_the_line(run, args, failure):
    result = run(*(arg.format(failure) for arg in args))
    assert result.exit_code == 1
    assert result.stderr.startswith("Traceback (most recent call last)")
    assert "in fake_run" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_whatever_may_take_long_can_be_quiet():
    options = {name: main.get_command(click.Context(main), name).params for name in SUBCOMMANDS}
    loud = [name for name, given in options.items() if not any("--quiet" in option.opts for option in given)]
    assert loud == ["recipes", "verify", "ui", "doctor", "help", "completion"]


def test_debug_by_environment(run, monkeypatch):
    monkeypatch.setenv("MERGEKIT_NEURON_DEBUG", "1")
    assert "Traceback" in run("fake-run", "user").stderr


# --- signals


@pytest.fixture
def running(module_folder, tmp_path):
    """The fake command in a process of its own, waiting inside a `try` whose `finally` writes a file."""
    cleaned = tmp_path / "cleaned"
    code = f"""
import sys
sys.path.insert(0, {str(module_folder)!r})
from neuron_methods.cli import LazyGroup, Subcommand
group = LazyGroup(subcommands={{"fake-run": Subcommand("fake_subcommands", "")}})
group(["fake-run", "--wait", {str(cleaned)!r}])
"""
    process = commands.running("-c", code, folder=tmp_path)
    assert process.stdout.readline() == "ready\n"
    yield process, cleaned
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, "")],
)
def test_a_signal_lets_clean_up_run(running, number, code, message):
    process, cleaned = running
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert stderr.strip() == message
    assert cleaned.read_text() == "cleaned up"


def test_signal_handlers_are_put_back(run):
    before = signal.getsignal(signal.SIGTERM)
    run("fake-run")
    assert signal.getsignal(signal.SIGTERM) is before
