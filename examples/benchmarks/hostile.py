"""Count what is tried on purpose to break the commands, and whether it does: inputs, faults of a Hub, kills.

Runs tests/hostile at length: every fault of the Hub's stand-in at every step, and so many random changes of every
format's files. Then kills commands at random.

    python examples/benchmarks/hostile.py
    python examples/benchmarks/hostile.py --examples 1000 --kills 180
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = ROOT / "tests" / "hostile"


def run_tests(examples: int, report: Path) -> Counter[str]:
    """Run the suite but its kills, and count what it tried: {what: how many}, and `failed`."""
    environment = {**os.environ, "MERGEKIT_NEURON_HOSTILE": str(examples), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", f"--junitxml={report}"]
    command += [str(HOSTILE), "--ignore", str(HOSTILE / "test_kills.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment)
    if done.returncode not in (0, 1):  # all has been tried, or all and some of it failed
        raise SystemExit(f"tests/hostile was not run to its end: pytest ended with {done.returncode}")
    tried: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname", "").rpartition(".")[2]
        # Those tests say in their names that there are two outcomes; what is left there is unchanged files.
        fuzzed = file.startswith("test_fuzz") and "_or_" in case.get("name", "").partition("[")[0]
        what = "faults of a Hub" if file == "test_hub_faults" else "random changes" if fuzzed else "inputs by hand"
        tried[what] += examples if fuzzed else 1
        tried["failed"] += any(child.tag in ("failure", "error") for child in case)
    return tried


def kill(kills: int, found: Path) -> tuple[int, list[str]]:
    """Kill commands; how many times, and what went wrong."""
    script = Path(__file__).with_name("kills.py")
    subprocess.run([sys.executable, script, "--kills", str(kills), "--json", found], cwd=ROOT)
    content = json.loads(found.read_text(encoding="utf-8"))
    return sum(content["kills"].values()), content["faults"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=60, help="random changes per fuzzed format  [60]")
    parser.add_argument("--kills", type=int, default=36, help="kills, over all commands  [36]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tried = run_tests(arguments.examples, Path(folder) / "report.xml")
        killed, wrong = kill(arguments.kills, Path(folder) / "kills.json")
    failed = tried.pop("failed", 0)
    for what, number in [*tried.items(), ("kills", killed)]:
        print(f"{what:16} {number:6,}")
    print(f"{'went wrong':16} {failed + len(wrong):6,}")
    for line in wrong:
        print(f"  {line}")
    sys.exit(bool(failed or wrong))


if __name__ == "__main__":
    main()
