"""Processes at one piece of work end when the one that has started them is no more."""

import os
import socket
import subprocess
import sys

import pytest

from neuron_methods.models.team import teamed
from neuron_methods.support.errors import UserError
from tests.support.commands import environment

#: Starts two processes that work together, and dies once they do; one of them looks later whether it still lives.
LAUNCHER = """
import os, sys, time
from functools import partial
import torch.distributed
from neuron_methods.models import processes
from neuron_methods.models.team import teamed

arrived, arrive = os.pipe()
for rank in range(2):
    if os.fork() == 0:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        if rank == int(sys.argv[1]):
            time.sleep = partial(lambda sleep, seconds: sleep(3 * seconds), time.sleep)
        with teamed():
            os.write(arrive, b".")
            for _ in range(6000):  # a signal that comes just before a system call is noticed after it
                time.sleep(0.1)
for _ in range(2):
    os.read(arrived, 1)
os._exit(0)
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


@pytest.mark.parametrize("late", [0, 1])
def test_processes_end_with_the_launcher(late):
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"}
    command, path = [sys.executable, "-c", LAUNCHER, str(late)], os.pathsep.join(sys.path)
    # It returns when the last process that holds its output is gone.
    done = subprocess.run(
        command, env=environment(PYTHONPATH=path, **meeting), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stderr == "error: the launcher has died, so the processes that it has started end, too\n"


def test_a_launcher_that_has_died_before_is_not_waited_for(monkeypatch):
    port = free_port()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    said = rf"^process 1: the launcher does not answer at 127.0.0.1:{port} \(Connection refused\); it has died, or"
    with pytest.raises(UserError, match=said), teamed():
        pass
