"""Answers that are programs: run with their tests, in a process with limits, and only where the user allows it.

The limits hold what a model writes by mistake, not an attacker: a program may read and write what its user may. It has
no network, no environment, a directory of its own, and an end to its time, memory and files; what it has begun ends
with it. Where a process cannot be cut off from the network (it takes Linux and its user namespaces), nothing runs.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress

from neuron_methods.support.errors import UserError

#: The metric: share of answers that pass their tests, one answer each (pass@1 of Chen et al., 2021, arXiv:2107.03374).
PASS_AT_1 = "pass_at_1"
SECONDS = 10
MEMORY = 1 << 30
LARGEST_FILE = 10 << 20

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.S)
_CUT_OFF = 77
# CLONE_NEWUSER, CLONE_NEWNET and CLONE_NEWPID: a network of its own, with nothing in it, and processes of its own, of
# which none outlives the first (root may begin some, whatever the limit); that one dies with its parent
# (PR_SET_PDEATHSIG).
_LAUNCHER = f"""
import ctypes, os, resource, sys
program = sys.stdin.read()
try:
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.unshare(0x10000000 | 0x40000000 | 0x20000000)
except (AttributeError, OSError):
    failed = True
if failed:
    sys.exit({_CUT_OFF})
first = os.fork()
if first:
    sys.exit(os.waitpid(first, 0)[1] != 0)
libc.prctl(1, 9)
for what, most in (
    (resource.RLIMIT_CPU, {SECONDS}), (resource.RLIMIT_AS, {MEMORY}), (resource.RLIMIT_FSIZE, {LARGEST_FILE}),
    (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 0),
):
    resource.setrlimit(what, (most, most))
sys.stdin = open("/dev/null")
exec(compile(program, "answer.py", "exec"), {{"__name__": "__main__"}})
"""


def program(asked: str, answer: str) -> str:
    """Take the program out of an answer: its first fenced block, else the prompt that it goes on from with it.

    Args:
        asked: the prompt that an answer goes on from; empty in a chat.
        answer: what the model has said, without blanks around it.
    """
    fenced = _FENCED.search(answer)
    return fenced[1] if fenced else asked + answer


def passes(code: str, tests: Sequence[str], what: str) -> float:
    """Run a program with its tests; 1.0 if they end without an error in good time, else 0.0.

    Args:
        code: Python, for the standard library alone.
        tests: Python that raises where the program is wrong; all have to pass.
        what: for the message.

    Raises:
        UserError: a process cannot be cut off from the network on this machine.
    """
    # A program that ends before its tests do does not come to this last word.
    word = secrets.token_hex(16)
    whole = "\n".join([code, *tests, f"__import__('sys').__stdout__.write('\\n{word}')"]) + "\n"
    with tempfile.TemporaryDirectory(prefix="mergekit-neuron-code-") as folder, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            process.communicate(whole.encode("utf-8", "backslashreplace"), timeout=SECONDS + 2)
        except subprocess.TimeoutExpired:
            return 0.0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode == _CUT_OFF:
            raise UserError(
                f"{what}: metric {PASS_AT_1}: a program cannot be cut off from the network on this machine (that takes "
                "Linux with user namespaces), so none is run"
            )
        said.seek(0)
        return float(process.returncode == 0 and said.read().endswith(word.encode()))
