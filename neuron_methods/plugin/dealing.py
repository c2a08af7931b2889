"""How several processes share a merge: that they plan the same one, meet at one directory, and who merges what."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.graph import Task

from neuron_methods.methods.share import Share
from neuron_methods.models.team import Team
from neuron_methods.plugin.preflight import MergePlan
from neuron_methods.plugin.run import MergeRun
from neuron_methods.plugin.seam import planned_tasks, replan
from neuron_methods.plugin.work import Work
from neuron_methods.support.errors import UserError
from neuron_methods.support.shares import largest_first
from neuron_methods.support.text import listed

#: Seconds that a network's file system may take to show one host what another has written.
DELAY = 20.0


def check_same_plan(team: Team, made_from: Mapping[str, Any]) -> None:
    """Make sure that all processes are about to make the same output of the same inputs.

    Args:
        team: that is to make it.
        made_from: everything that the output depends on.

    Raises:
        UserError: naming the process that is not, and what differs there.
    """
    # The times of files are those of their copies on each host.
    own = {
        what: [*how[:1], *how[2:]] if isinstance(how, list) and len(how) == 3 else how
        for what, how in made_from.items()
    }
    first, *others = team.exchange((team.shown, own))
    for shown, there in others:
        differing = sorted(what for what in {*first[1], *there} if first[1].get(what) != there.get(what))
        if differing:
            what = f"{listed(differing)} differs from that of {first[0]}"
            team.refuse(UserError(f"{shown}: {what}; all need the same files, packages and options"))


def check_enough(team: Team, work: Work) -> None:
    """Refuse more processes than there are tensors; raises UserError."""
    tensors = sum(map(len, work.groups))
    if team.count > max(tensors, 1):
        what = f"--num_processes {team.count}: the merge has {tensors} tensor{'s' * (tensors != 1)}"
        team.refuse(UserError(f"{what}; give at most as many processes"))


def meet(team: Team, work: Work, shown: object) -> set[str]:
    """See to it that all processes work in one directory, which the first has opened.

    Returns:
        The tensors that are in finished pieces.

    Raises:
        UserError: naming a process that does not see the directory.
    """
    seed, finished = team.exchange((work.seed, [*work.pieces]))[0]
    end = time.monotonic() + DELAY
    while team.rank and not work.join(seed) and time.monotonic() < end:
        time.sleep(0.2)
    (first, _), *others = team.exchange((team.shown, work.seed == seed))
    for process, sees in others:
        if not sees:
            what = f"{shown}: {process} does not see what {first} writes there"
            team.refuse(UserError(f"{what}; all hosts have to share the directory"))
    return {*finished}


class Awaited(Task[None]):
    """Have the measuring done, even where nothing is left to merge with it."""

    first: Task

    def arguments(self) -> dict[str, Task]:
        """Ask for it."""
        return {"first": self.first}

    def execute(self, first: Any) -> None:
        """Pass nothing on."""


def replan_some(planner: Any, names: Collection[str]) -> None:
    """Let a planner merge some tensors alone, but measure all that its method does."""
    planned = planned_tasks(planner)
    tasks = [(weight, task) for weight, task in planned if weight.name in names]
    measures = (getattr(task.merge, "measure", None) for _, task in planned)
    if (measure := next(filter(None, measures), None)) is not None:
        tasks.append((WeightInfo(name="measured", optional=True), Awaited(first=measure)))
    replan(planner, tasks)


def plan_reads(run: MergeRun, planner: Any, names: Collection[str], share: Share) -> None:
    """Let a planner merge these tensors, and know in which order the process reads what it measures and merges."""
    replan_some(planner, names)
    measured = [weight.name for weight, _, _ in run.plan.tensors if weight.name in run.plan.measured]
    run.reads = [[measured[number] for number in share.mine([[name] for name in measured])], sorted(names)]


def dealt(
    team: Team,
    work: Work,
    plan: MergePlan,
    finished: set[str],
    effort: Callable[[str], float] = lambda _name: 1.0,
) -> list[list[str]]:
    """Choose the pieces that this process makes: shards as a whole, as far as all get as many of them, else parts.

    Costs are the bytes that are read and written, times the effort. Tied tensors, read together, stay together.

    Args:
        team: that makes the output.
        work: says what is stored together.
        plan: of the merge.
        finished: tensors that are merged already.
        effort: of a tensor, see `PreparedMerge.effort`.
    """
    costs = {
        weight.name: round((size + sum(header.bytes for header in inputs.values())) * effort(weight.name))
        for weight, inputs, size in plan.tensors
    }
    missing = [names for group in work.groups if (names := [name for name in group if name not in finished])]
    whole = len(missing) // team.count * team.count
    shards = largest_first([sum(costs[name] for name in names) for names in missing[:whole]], team.count)
    loads = [sum(costs[name] for number in numbers for name in missing[number]) for numbers in shards]
    tied = {weight.name: min((weight.name, *(weight.tied_names or ()))) for weight, _, _ in plan.tensors}
    bundles: dict[str, list[str]] = {}
    for names in missing[whole:]:
        for name in names:
            bundles.setdefault(tied[name], []).append(name)
    together = list(bundles.values())
    parts = largest_first([sum(costs[name] for name in names) for names in together], team.count, loads)
    mine = {name for number in parts[team.rank] for name in together[number]}
    pieces = [[name for name in names if name in mine] for names in missing[whole:]]
    return [missing[number] for number in shards[team.rank]] + [names for names in pieces if names]


def check_finished(team: Team, work: Work, place: Path) -> None:
    """Make sure that all pieces are there, and as they were written; each process looks at all of its own.

    Raises:
        UserError: naming a tensor that is in none.
    """
    end = time.monotonic() + (DELAY if team.count > 1 else 0)
    while True:
        work.read()
        missing = [name for names in work.groups for name in names if name not in work.pieces]
        if not missing:
            return
        if time.monotonic() >= end:
            raise UserError(f"{place}: {listed(missing)}: merged, but what was written is not there as it was written")
        time.sleep(0.2)
