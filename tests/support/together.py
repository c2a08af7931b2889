"""What the processes of one `accelerate launch` do: run in each by tests/plugin/test_dealing.py, in a folder of models.

    accelerate launch ... -m tests.support.together JOBS

JOBS is a JSON of merges that are made one after the other; see `main`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from mergekit.options import MergeOptions

from neuron_methods.adapters.kept import Precision
from neuron_methods.models.team import Team, teamed
from neuron_methods.plugin.adapter_output import AdapterOutput
from neuron_methods.plugin.merging import MergeWitness, merge_to_directory
from neuron_methods.sharing.publishing import merge_witness
from neuron_methods.support.errors import UserError


def merge(job: dict, team: Team | None = None, stop: int | None = None) -> None:
    """Make one merge; `stop` is the tensor, by number, at which this process is killed, once a piece is finished."""
    inner, seen = merge_witness(report=job.get("report", False)), []

    def on_tensor(name, *_):
        seen.append(name)
        if len(seen) == stop:
            out, latest = Path(job["out"]), time.monotonic() + 60
            while not [*out.parent.glob(f".{out.name}.unfinished/0*.json")] and time.monotonic() < latest:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    merge_to_directory(
        job["yaml"],
        job["out"],
        progress=False,
        options=MergeOptions(**job["options"]),
        output=AdapterOutput(Precision(rank=2)) if job["adapter"] else None,
        profile_out=job.get("profile_out"),
        resume=job.get("resume"),
        witness=MergeWitness(inner.finish, inner.on_plan, on_tensor, None) if stop is not None else inner,
        team=team,
    )


def main(path: str) -> None:
    """Make the merges of a file, each by all processes.

    A job may spoil what one process has (`other`: a directory that it works in) or kill it (`killed`: its rank).
    """
    for job in json.loads(Path(path).read_text()):
        here = os.getcwd()
        try:
            with teamed() as team:
                if job.get("other") and team.rank:
                    os.chdir(job["other"])
                try:
                    merge(job, team, 3 if job.get("killed") == team.rank else None)
                finally:
                    os.chdir(here)
        except UserError as error:
            sys.stdout.write(f"refused {job['out']}: {error}\n")  # in one piece, as others write there
            sys.stdout.flush()
        except SystemExit:
            if "killed" in job:
                raise


if __name__ == "__main__":
    main(sys.argv[1])
