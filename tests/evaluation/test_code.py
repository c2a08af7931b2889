"""Programs that a model writes: which of them pass, and what they cannot do."""

from __future__ import annotations

import os
import select

import pytest

from neuron_methods.evaluation import load_tasks
from neuron_methods.evaluation.kinds import code
from neuron_methods.evaluation.kinds.code import passes, program
from neuron_methods.evaluation.task_file import choose_tasks
from neuron_methods.support.errors import UserError
from tests.evaluation import cases
from tests.evaluation.test_chat import GENERATION
from tests.evaluation.test_run import run

HEAD = "def add(a, b):\n"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


@pytest.mark.parametrize(
    ("body", "right"),
    [
        ("    return a + b", 1.0),
        ("    return 3", 0.0),  # the second test has to pass, too
        ("    return a +", 0.0),
        ("    print('x' * 100)\n    return a + b", 1.0),
        ("    return a + b\nimport sys; sys.exit(0)", 0.0),  # before its tests
        ("    return a + b\nimport os; os._exit(0)", 0.0),
        ("    return a + b\nraise SystemExit(0)", 0.0),
    ],
)
def test_a_program_passes_by_all_of_its_tests(body, right):
    assert passes(program(HEAD, body), TESTS, "x") == right


def test_what_a_program_cannot_do(monkeypatch, tmp_path):
    monkeypatch.setattr(code, "SECONDS", 1)
    monkeypatch.setenv("HF_TOKEN", "secret")
    tries = {
        "wait": "import time; time.sleep(60)",
        "network": "import socket; socket.create_connection(('127.0.0.1', PORT), 2)",
        "memory": "x = bytearray(3 << 30)",
        "files": "open('large', 'wb').write(bytes(20 << 20))",
    }
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        for name, tried in tries.items():
            assert passes(tried.replace("PORT", str(server.getsockname()[1])), ["pass"], "x") == 0.0, name
    assert passes("import os", ["assert 'HF_TOKEN' not in os.environ and not os.listdir()"], "x") == 1.0


@pytest.mark.parametrize("ended", ["pass", "raise SystemExit(1)", "import time; time.sleep(60)"])
def test_what_a_program_began_ends_with_it(monkeypatch, tmp_path, ended):
    """Even what left its group of processes, as daemons do."""
    monkeypatch.setattr(code, "SECONDS", 1)
    pipe = tmp_path / "held"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    begin = (
        "import os, time\nheld = os.open(PIPE, os.O_WRONLY)\nif not os.fork():\n    os.setsid()\n    time.sleep(600)\n"
    )
    passes(begin.replace("PIPE", repr(str(pipe))) + ended, [], "x")
    assert select.select([reader], [], [], 30)[0] and os.read(reader, 1) == b""  # nobody holds it any more
    os.close(reader)


def test_where_the_network_cannot_be_cut_off_nothing_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(code, "_LAUNCHER", code._LAUNCHER.replace(".unshare(", ".no_such_call("))
    with pytest.raises(UserError, match="x: metric pass_at_1: a program cannot be cut off from the network"):
        passes(f"open({str(tmp_path / 'ran')!r}, 'w')", [], "x")
    assert not (tmp_path / "ran").exists()


def test_a_fenced_block_is_the_program():
    assert program("asked", "Sure:\n```python\nx = 1\n```\nThat is it.") == "x = 1\n"
    assert program("asked", "```\nx = 1") == "x = 1"
    assert program("def f():\n", "    return 1") == "def f():\n    return 1"


def test_programs_run_where_the_user_lets_them(model, tmp_path):
    cases.questions(tmp_path, [{"prompt": "zero = 0\none = 1\n", "answer": "assert zero == 0"}] * 2)
    task = {**GENERATION, "data": "questions.jsonl", "metric": "pass_at_1", "stop": " ", "max_new_tokens": 3}
    tasks = cases.write_tasks(tmp_path, task)
    with pytest.raises(UserError, match=r"task 'a': metric pass_at_1 runs programs .*--allow-code-execution"):
        choose_tasks(load_tasks(tasks))
    done = run(model("llama"), "--task", tasks, "-o", tmp_path / "scores.json")
    assert done.exit_code == 1 and "--allow-code-execution" in done.stderr
    done = run(model("llama"), "--task", tasks, "-o", tmp_path / "scores.json", "--allow-code-execution")
    assert done.exit_code == 0 and "pass_at_1" in done.stderr + done.stdout, done.stderr
