"""The installed commands, run as a user runs them: in a process of their own, or in this one."""

import atexit
import os
import signal
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

from click.testing import CliRunner

from neuron_methods.cli import main
from tests.support.checkpoints import configuration
from tests.support.nursery import Nursery, lasting

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))


def environment(**changes):
    unwanted = ("MERGEKIT_NEURON_", "PYTHONHASHSEED")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def running(*arguments, folder):
    """A Python process that signals end, though its parent ignores some, as `nohup` and `&` have it."""

    def with_usual_signals():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=with_usual_signals,
    )


_USUAL = environment()
_nurseries = []


@contextmanager
def begun(**changes):
    """Let what `run` is given within the block with these `changes` begin where libraries are read already, too."""
    nursery = Nursery(environment(**changes))
    _nurseries.append(nursery)
    try:
        yield
    finally:
        _nurseries.remove(nursery)
        nursery.close()


def _nursery_for(wanted):
    found = next((nursery for nursery in _nurseries if nursery.serves(wanted)), None)
    if found is None and lasting(wanted) == lasting(_USUAL):
        found = Nursery(_USUAL)
        _nurseries.append(found)
        atexit.register(found.close)
    return found


def run(command, *args, folder, preexec_fn=None, **changes):
    """The command in a process of its own, begun where libraries are read already unless they are to find `changes`."""
    line = [str(SCRIPTS / command), *map(str, args)]
    wanted = environment(**changes)
    if preexec_fn is None and (nursery := _nursery_for(wanted)) is not None:
        return nursery.run(line, folder)
    return subprocess.run(
        line,
        cwd=folder,
        env=wanted,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=preexec_fn,
    )


def launched(*arguments, folder, processes=2, options=()):
    """A module run by the processes of one `accelerate launch`, on the CPU."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [*launch, *options, "-m", *map(str, arguments)],
        cwd=folder,
        env=environment(CUDA_VISIBLE_DEVICES="", PYTHONPATH=path, HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        check=False,
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
