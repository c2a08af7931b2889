"""A whole merge, from YAML to a verified directory: plan, check, stage, execute, verify, notes, move.

Everything that can be refused is refused before the first tensor; the output is complete or absent. What is written is
up to an `Output`: a model, or an adapter on the base.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mergekit.options import MergeOptions
from torch import Tensor

from neuron_methods.adapters.export import AdapterSummary
from neuron_methods.methods.contract import PreparedMerge
from neuron_methods.methods.neuro_merging import PreparedNeuroMerging
from neuron_methods.methods.share import Share
from neuron_methods.methods.trim_profile import FORMAT as TRIM_PROFILE
from neuron_methods.methods.trim_profile import TrimProfile
from neuron_methods.models.states import watched
from neuron_methods.models.team import Team
from neuron_methods.plugin.dealing import check_enough, check_finished, check_same_plan, dealt, meet, plan_reads
from neuron_methods.plugin.output import ModelOutput, Output
from neuron_methods.plugin.preflight import MergePlan
from neuron_methods.plugin.run import MergeRun
from neuron_methods.plugin.session import MergeSession
from neuron_methods.plugin.work import Work
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import (
    check_space,
    file_in_place_after,
    is_disk_full,
    is_own_fault,
    signals_held,
    staging_directory,
    write_text,
)
from neuron_methods.support.kept import Kept
from neuron_methods.support.runs import claimed, workplace
from neuron_methods.support.targets import check_file, check_target, deliver, is_part, json_of
from neuron_methods.support.text import format_bytes, listed


@dataclass
class MergeSummary:
    """What a merge did.

    Attributes:
        out_path: where the output is.
        method: the method's name.
        what: was written, in a few words.
        seconds: time from start to the verified output.
        bytes_written: bytes of tensors written.
        profile: thresholds, σ and energies, for `neuro_merging`.
        adapter: what an adapter keeps of the merge; None for a model.
        findings: what the method found, in figures.
        notes: what the user should know.
    """

    out_path: str
    method: str
    what: str
    seconds: float
    bytes_written: int
    profile: TrimProfile | None = None
    adapter: AdapterSummary | None = None
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        written = f"{format_bytes(self.bytes_written)} written"
        lines = [f"{self.method}: {self.what}, {written}, {self.seconds:.1f} s"]
        if self.profile is not None:
            for expert in self.profile.experts.values():
                threshold = "per tensor" if expert.threshold is None else f"{expert.threshold:.4g}"
                lines.append(f"  {expert.model}: trim threshold {threshold}, sigma {expert.sigma:.4f}")
            if self.profile.sigma is not None:
                scale = self.profile.automatic_lambda("mean")
                lines.append(f"  sigma {self.profile.sigma:.4f}, automatic lambda_orthogonal {scale:.4f}")
        if self.adapter is not None:
            lines += [f"  {line}" for line in str(self.adapter).splitlines()]
        lines += [f"  {line}" for line in (*self.findings, *self.notes)]
        lines.append(f"  complete and verified: {self.out_path}")
        return "\n".join(lines)


@dataclass
class MergeWitness:
    """Who looks on while a merge runs, and has something to add to its output: a card, a report.

    Attributes:
        on_plan: called with the run and mergekit's planner once the plan stands, before any tensor is merged.
        on_tensor: called with (name, {model: input}, merged tensor) for every tensor that is merged and not copied, in
            whichever run it is; returns what it has seen, for JSON.
        recall: called with (name, what `on_tensor` has seen) for all these tensors, in an order of the plan's, before
            `finish`.
        finish: called with the run, the written and verified directory before it is moved into place, its name, and
            the merge by a method of ours, if it is one; writes README.md and what else goes beside the weights, and
            returns notes.
    """

    finish: Callable[[MergeRun, Path, str, Any], list[str]]
    on_plan: Callable[[MergeRun, Any], None] | None = None
    on_tensor: Callable[[str, Mapping[Hashable, Tensor], Tensor], Any] | None = None
    recall: Callable[[str, Any], None] | None = None


def merge_to_directory(
    config_source: str,
    out_path: str | os.PathLike[str],
    *,
    output: Output | None = None,
    options: MergeOptions | None = None,
    force: bool = False,
    progress: bool = True,
    allow_nonfinite: bool = False,
    profile_out: str | None = None,
    config_name: str = "the configuration",
    head: str | None = None,
    witness: MergeWitness | None = None,
    common: Kept | None = None,
    resume: bool | None = None,
    team: Team | None = None,
) -> MergeSummary | None:
    """Run any mergekit configuration and leave a complete, verified directory, or nothing.

    Args:
        config_source: text of the YAML.
        out_path: directory to create.
        output: what to write; a model by default.
        options: mergekit's options.
        force: replace an earlier output at `out_path`, and a file that `profile_out` wrote, once the new is verified.
        progress: show progress bars.
        allow_nonfinite: go on where an input holds NaN or Inf.
        profile_out: JSON file for thresholds and σ (`neuro_merging`).
        config_name: file name for messages.
        head: what becomes of the models' heads; see `heads.heads_of_merge`.
        witness: writes the card, and more; without one mergekit's own card is written.
        common: what this merge shares with others of the same models.
        resume: go on with an unfinished merge of this plan, where there is one; False: begin anew, and keep
            nothing unfinished; None: refuse, unless by `force`.
        team: the processes that make it together, if there are several; all of them call this.

    Returns:
        What was done, printable; None in all processes but the first.

    Raises:
        UserError: anything the user can put right; `out_path` is as it was before.
    """
    started, team = time.perf_counter(), team or Team()
    output = output or ModelOutput()
    run = MergeRun(config_source, config_name, options, head)
    inputs = run.paths_read()
    target = check_target(out_path, force, inputs)
    profile_place = _profile_place(profile_out, target, force, inputs)
    output.configure(run)
    watch, work = watched(inputs), Work(target, resumable=resume is not False)

    def check(planner: Any) -> None:
        run.inspect(planner)
        output.plan(run, planner, work)
        if profile_place is not None:
            _check_profile_wanted(run.plan, session.prepared)
        check_space(target.parent, run.plan.bytes_to_write - work.bytes_there())
        run.plan.memory.check(config_name)
        if witness is not None and witness.on_plan is not None:
            witness.on_plan(run, planner)
        made_from = {**watch.before, **run.made_from(), **output.made_from(), "--allow-nonfinite": allow_nonfinite}
        made_from["--report"] = witness is not None and witness.recall is not None
        made_from.pop(config_name, None)  # whatever its file is called, the YAML is what it says
        check_same_plan(team, made_from)
        check_enough(team, work)
        if not team.rank:
            work.open(made_from, out_path, resume=bool(resume), anew=force or resume is False)
        finished = meet(team, work, out_path)
        effort = session.prepared.effort if session.prepared is not None else lambda _name: 1.0
        pieces = dealt(team, work, run.plan, finished, effort)
        session.seed = run.options.random_seed if run.options.random_seed is not None else work.seed
        work.start(pieces)
        plan_reads(run, planner, {name for names in pieces for name in names}, session.share)
        session.planned_tensors = sum(map(len, work.groups)) - len(finished)

    on_tensor = witness.on_tensor if witness is not None else None
    costs = cache(lambda: {w.name: sum(h.bytes for h in inputs.values()) for w, inputs, _ in run.plan.tensors})
    session = MergeSession(
        check,
        on_tensor,
        allow_nonfinite=allow_nonfinite,
        quiet=not progress or team.rank > 0,
        traces=work.told,
        common=common,
        share=Share(team.rank, team.count, lambda name: costs().get(name, 1), team.exchange, team.add_up),
        on_done=team.progress,
    )
    team.on_progress = session.done_elsewhere
    with _staged(team, work, target, out_path, profile_place) as staging, run.opened():
        try:
            if not team.rank:
                output.begin(run, staging)
            with closing(session):
                with work.writing():
                    run.execute(staging, session)
                team.exchange(None)  # all have made their pieces
            check_finished(team, work, target)
            if team.rank:
                team.exchange(None)
                return None
            output.finish(run, staging, work)
            output.verify(run, staging)
            notes = _recalled(run, session, work, witness)
            if witness is None:
                run.write_card(staging, target.name, output.library)
            else:
                notes += witness.finish(run, staging, target.name, session.prepared)
            profile = session.prepared.profile if isinstance(session.prepared, PreparedNeuroMerging) else None
            watch.check()
            with _written_with(profile, profile_place, staging, target):
                work.verified = True
                deliver(staging, target, force)
            team.exchange(None)  # the others wait for that
        except Exception as error:
            if is_disk_full(error):
                need = format_bytes(run.plan.bytes_to_write)
                raise UserError(f"{out_path}: no space left on the disk, or for a file ({need} to write)") from error
            raise
    return MergeSummary(
        out_path=str(out_path),
        method=run.configuration.merge_method,
        what=output.headline(run),
        seconds=time.perf_counter() - started,
        bytes_written=run.plan.bytes_to_write if output.adapter is None else output.adapter.bytes,
        profile=profile,
        adapter=output.adapter,
        findings=[] if session.prepared is None else session.prepared.findings(),
        notes=notes,
    )


def plan_merge(
    config_source: str,
    *,
    options: MergeOptions | None = None,
    config_name: str = "the configuration",
    head: str | None = None,
    output: Output | None = None,
) -> MergePlan:
    """Plan a merge into `output`, by default a model, with every check that needs no tensor data; nothing is left.

    Raises:
        UserError: what the merge itself would refuse before it starts.
    """
    run, output = MergeRun(config_source, config_name, options, head), output or ModelOutput()
    output.configure(run)

    def look(planner: Any) -> None:
        output.plan(run, planner, Work(Path(os.devnull)))
        # What lies beside the weights is loaded as the merge will load it, and thrown away.
        with tempfile.TemporaryDirectory(prefix="mergekit-neuron-plan-") as scratch:
            output.begin(run, Path(scratch))

    run.plan_only(look)
    return run.plan


@contextmanager
def _staged(team: Team, work: Work, target: Path, shown: object, profile_place: Path | None) -> Iterator[Path]:
    """Give the directory that the output is made in; processes but the first need one for what mergekit writes."""
    if team.rank:
        with workplace("mergekit-neuron-merge") as place:
            yield place
        return
    with (
        claimed(target, shown),
        _claimed_apart(profile_place, target),
        _left_behind(team, work),
        staging_directory(target) as staging,
    ):
        yield staging


@contextmanager
def _left_behind(team: Team, work: Work) -> Iterator[None]:
    """Within the block a merge is made; finished pieces of one that is broken off by no fault of its own are kept.

    They are of no use where it can only succeed with other inputs or another plan, or its output was refused.
    """
    try:
        yield
    except BaseException as error:
        with signals_held():
            team.gather_up()
            work.leave(keep=work.verified or not (team.at_fault or is_own_fault(error)))
        raise
    work.leave(keep=False)


def _recalled(run: MergeRun, session: MergeSession, work: Work, witness: MergeWitness | None) -> list[str]:
    """Tell method and witness what the merges of all tensors told, whichever run they were made in.

    Returns:
        What the user should know: the plan's notes, and where NaN or Inf was let through.
    """
    notes, traces = list(run.plan.notes), work.traces()
    tellers = session.prepared.tellers() if session.prepared is not None else []
    for name, trace in traces.items():
        for teller, told in zip(tellers, trace.get("told", ()), strict=False):
            if told:
                teller.told[name] = told
    if witness is not None and witness.recall is not None:
        for name, trace in traces.items():
            if "seen" in trace:
                witness.recall(name, trace["seen"])
    if nonfinite := [name for name, trace in traces.items() if "nonfinite" in trace]:
        notes.append(f"NaN or Inf in the output, as --allow-nonfinite has it: {listed(nonfinite)}")
    return notes


def _profile_place(profile_out: str | None, target: Path, force: bool, inputs: list[str]) -> Path | None:
    """Where `--profile-out` is to be written; within the output, too."""
    if profile_out is None:
        return None
    shown, place = f"--profile-out {profile_out}", Path(os.path.realpath(profile_out))
    if place == target:
        raise UserError(f"{shown}: a directory; name a file")
    if target in place.parents:
        inside = place.relative_to(target)
        if is_part(inside.as_posix()) or max(len(os.fsencode(part)) for part in inside.parts) > 255:
            raise UserError(f"{shown}: a name that the output's own files have, or none of a file; name another file")
        return place
    place = check_file(profile_out, shown, json_of(TRIM_PROFILE), force, inputs)
    if not place.parent.is_dir():
        raise UserError(f"{shown}: its directory is missing")
    return place


def _claimed_apart(place: Path | None, target: Path) -> AbstractContextManager[None]:
    return nullcontext() if place is None or target in place.parents else claimed(place)


def _check_profile_wanted(plan: MergePlan, prepared: PreparedMerge | None) -> None:
    if prepared is None:
        raise UserError(f"--profile-out: {plan.method} measures no trim profile; neuro_merging does")
    if not plan.measures and not any(shared.get("profile") for shared, _ in plan.parameters.values()):
        raise UserError(
            "--profile-out: this merge measures nothing (trim: differing, or trim: tensor with a number for "
            "lambda_orthogonal); leave --profile-out away"
        )


@contextmanager
def _written_with(profile: TrimProfile | None, place: Path | None, staging: Path, target: Path) -> Iterator[None]:
    """Within the block the output is moved into place, and the profile's file with it."""
    if profile is None or place is None:
        yield
    elif target in place.parents:
        inside = staging / place.relative_to(target)
        if os.path.lexists(inside):
            raise UserError(f"--profile-out {place}: the output has a file of this name; name another")
        write_text(inside, profile.to_json())
        yield
    else:
        with file_in_place_after(place) as beside:
            beside.write_text(profile.to_json(), encoding="utf-8")
            yield
