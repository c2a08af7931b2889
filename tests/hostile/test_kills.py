"""A command that is killed leaves nothing that is wrong, and the same command again does what it would have done."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.commands import environment

ROOT = Path(__file__).parents[2]


def test_killed_commands_leave_nothing_wrong(tmp_path):
    """Nine kills, one of each command; more of them: python examples/benchmarks/kills.py."""
    script, found = ROOT / "examples" / "benchmarks" / "kills.py", tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, script, "--kills", "9", "--seed", "3", "--json", found],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.exists(), done.stderr
    content = json.loads(found.read_text())
    assert content["faults"] == []
    assert sum(content["kills"].values()) == 9
    assert done.returncode == 0
