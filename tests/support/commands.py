"""The installed commands, run as a user runs them: in a process of their own, or in this one."""

import atexit
import os
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

from click.testing import CliRunner

from neuron_methods.cli import main
from tests.support.checkpoints import configuration
from tests.support.nursery import Nursery

SCRIPTS = Path(sysconfig.get_path("scripts"))


def environment(**changes):
    unwanted = ("MERGEKIT_NEURON_", "PYTHONHASHSEED")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


@cache
def _nursery():
    nursery = Nursery(environment())
    atexit.register(nursery.close)
    return nursery


def run(command, *args, folder, preexec_fn=None, **changes):
    """The command in a process of its own, begun where libraries are read already unless they are to find `changes`."""
    line = [str(SCRIPTS / command), *map(str, args)]
    if preexec_fn is None and not changes and _nursery().serves(environment()):
        return _nursery().run(line, folder)
    return subprocess.run(
        line,
        cwd=folder,
        env=environment(**changes),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=preexec_fn,
    )


def invoke(*args, code=0, **keys):
    """The command in this process, on a configuration with `keys`, in the current directory."""
    Path("merge.yaml").write_text(configuration(**keys))
    result = CliRunner().invoke(main, ["merge", "merge.yaml", *map(str, args)])
    assert result.exit_code == code, result.output
    return result


def refused(*args, code=1, **keys):
    """The one line of an error; nothing else is said, nothing is left behind."""
    Path("merge.yaml").write_text(configuration(**keys))
    before = sorted(os.listdir())
    result = invoke("out", *args, code=code, **keys)
    assert result.stdout == ""
    assert sorted(os.listdir()) == before
    assert "Traceback" not in result.stderr
    if code == 1:
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
    return result.stderr
