"""Commands in processes of their own that need not read torch, transformers and peft again.

Reading them takes a process four seconds of computing, most of what a command on tiny models takes. Here one process
reads them, and every command is a fork of it, which runs the installed script from its first line to its exit code. Of
mergekit and of our package nothing is read before the fork: the start-up hook does its work in each command.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ALREADY_READ = ("torch", "transformers.modeling_utils", "accelerate", "peft", "safetensors.torch")
# What differs from test to test, and no library reads.
PASSING = ("PYTEST_CURRENT_TEST", "PWD", "OLDPWD")


class Nursery:
    """A process that forks commands, for the environment it was started in."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = lasting(environment)
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def serves(self, environment: dict[str, str]) -> bool:
        """Whether a command in this environment may be forked here: what was read may have looked at it."""
        return self._process.poll() is None and lasting(environment) == self.environment

    def run(self, command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        """Run a Python script with its arguments, like `subprocess.run` with `capture_output`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with TemporaryDirectory() as said:
            out, err = Path(said) / "out", Path(said) / "err"
            order = {"command": command, "folder": str(folder), "streams": [os.devnull, str(out), str(err)]}
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(command, code, out.read_text("utf-8"), err.read_text("utf-8"))

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def lasting(environment: dict[str, str]) -> dict[str, str]:
    """What of an environment is the same in all tests, or meant to differ."""
    return {name: value for name, value in environment.items() if name not in PASSING}


def _next_command() -> list[str] | None:
    """Fork for every order on stdin; returns its command in the fork, and None in the first process, at the end."""
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os.chdir(order["folder"])
            for number, (path, flags) in enumerate(
                zip(order["streams"], (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)
            ):
                opened = os.open(path, flags, 0o600)
                os.dup2(opened, number)
                os.close(opened)
            return order["command"]
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


if __name__ == "__main__":
    import gc
    import importlib

    del sys.path[0]  # where a module of this folder would stand for a library of the same name
    for name in ALREADY_READ:
        importlib.import_module(name)
    gc.freeze()
    if (command := _next_command()) is not None:
        sys.argv[:] = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
