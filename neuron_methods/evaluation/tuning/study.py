"""A whole search: check everything, try points, write the best configuration, score it on test data once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from neuron_methods.evaluation.examples import Examples
from neuron_methods.evaluation.models import ModelSpec, open_model
from neuron_methods.evaluation.score_files import format_score, table, task_record
from neuron_methods.evaluation.scoring import Evaluation, prepare_tasks, start_opened
from neuron_methods.evaluation.tasks import Task
from neuron_methods.evaluation.tuning.bench import Bench, Effort
from neuron_methods.evaluation.tuning.objective import OBJECTIVES, experts_of_task, goodness, objective
from neuron_methods.evaluation.tuning.plot import can_plot, plot_search
from neuron_methods.evaluation.tuning.recipe import METHOD, Recipe
from neuron_methods.evaluation.tuning.search import (
    DEFAULT_BUDGET,
    Parameter,
    Point,
    Strategy,
    key_of,
    make_strategy,
    parse_search,
    show_point,
)
from neuron_methods.evaluation.tuning.trace import Trace, Trial, fingerprint_of_examples, is_new
from neuron_methods.models.processes import process_state
from neuron_methods.models.reference import ModelName
from neuron_methods.plugin.merging import plan_merge
from neuron_methods.plugin.preflight import MergePlan
from neuron_methods.plugin.run import named_files
from neuron_methods.support.documents import parse_yaml
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import file_in_place_after, write_text
from neuron_methods.support.fingerprints import tree_state
from neuron_methods.support.progress import progress_bar
from neuron_methods.support.runs import claimed
from neuron_methods.support.targets import refuse_within
from neuron_methods.support.text import format_bytes


@dataclass(frozen=True)
class TuneSettings:
    """How to search.

    Attributes:
        strategy: ``grid``, ``random`` or ``cma``.
        budget: points at most.
        objective: ``mean``, ``relative`` or ``minimum``.
        seed: of draws and strategies.
        limit: examples per task at most.
        dtype: the model computes in.
        shortcut: recombine parts where parameters enter linearly, instead of merging every point, and keep what merges
            by other values of a cheap parameter have in common.
        allow_same_split: validation and test data may be the same.
        test: score the best point on test data, once, at the end.
        force: forget the search that OUT holds.
        progress: show bars.
    """

    strategy: str = "grid"
    budget: int | None = None
    objective: str = "mean"
    seed: int = 0
    limit: int | None = None
    dtype: str = "auto"
    shortcut: bool = True
    allow_same_split: bool = False
    test: bool = False
    force: bool = False
    progress: bool = True


@dataclass
class TuneResult:
    """What a search found.

    Attributes:
        best: the best point.
        objective: its objective.
        scores: its scores on validation data, by task.
        trials: all, in the order in which they were run.
        effort: of this run.
        confirmed: validation scores of a real merge at the best point, where points were recombined.
        difference: largest difference there between a weight as recombined and as merged, in shares of the largest
            weight of its tensor; None where the parts are gone.
        test: the best point on test data, if that was asked for.
    """

    best: Point
    objective: float
    scores: dict[str, float]
    trials: list[Trial]
    effort: Effort
    confirmed: dict[str, float] | None = None
    difference: float | None = None
    test: Evaluation | None = None


def tune(
    source: str,
    tasks: Sequence[Task],
    search: Sequence[str],
    out: Path,
    settings: TuneSettings = TuneSettings(),
    *,
    config_name: str = "the configuration",
    say: Callable[[str], None] = lambda line: None,
) -> TuneResult:
    """Search parameters of a merge for the best scores on validation data; several processes score together.

    Args:
        source: text of a mergekit YAML.
        tasks: from `load_tasks`.
        search: as ``--search`` takes them.
        out: directory for best.yml, trace.jsonl, tune.json and scores.png; resumed if it holds the same search.
        settings: see `TuneSettings`.
        config_name: file name for messages.
        say: takes lines for the user.

    Raises:
        UserError: anything is wrong with configuration, search, tasks, data or models.
    """
    started = time.perf_counter()
    first = process_state().is_main_process
    if not first:
        settings, say = replace(settings, progress=False), lambda line: None
    if settings.objective not in OBJECTIVES:
        raise UserError(f"--objective {settings.objective!r}: expected {', '.join(OBJECTIVES)}")
    parameters = parse_search(search)
    strategy = make_strategy(settings.strategy, parameters, settings.budget, settings.seed)
    tasks = [with_validation(task, settings.allow_same_split) for task in tasks]
    recipe = Recipe(source, config_name, parameters)
    start = {p.name: p.extremes[0] for p in parameters}
    for method in next((p.values for p in parameters if p.name == METHOD and p.values is not None), (None,)):
        point = start if method is None else {**start, METHOD: method}
        plan = plan_merge(recipe.source_at(point), config_name=f"{config_name} by {method}" if method else config_name)
    if not can_plot():
        say("scores.png will not be drawn: it needs matplotlib: pip install 'mergekit-neuron[report]'")
    spec = ModelSpec.parse(recipe.base)
    prepared = prepare_tasks(tasks, spec, "validation", settings.seed, settings.limit)
    # What is wrong with the test data must not come out after the search.
    test = prepare_tasks(tasks, spec, "test", settings.seed, settings.limit) if settings.test else []
    refuse_within(out, f"-o {out}", recipe.reads(tasks))
    for line in told_of_processes(plan):
        say(line)
    if first:
        is_new(out)
    with claimed(out, f"-o {out}", inside=True) if first else nullcontext():
        trace = Trace(out, _identity(recipe, parameters, prepared, settings), settings.force)
        return _tune(recipe, parameters, strategy, prepared, test, trace, settings, say, started)


def told_of_processes(plan: MergePlan) -> list[str]:
    """Say what several processes take for merges, of which each makes all; nothing of one process."""
    count = process_state().num_processes
    if count == 1:
        return []
    need = format_bytes(count * (plan.bytes_to_write + plan.memory.peak))
    return [f"{count} processes: they share out the scoring, and each makes every merge in memory, {need} together"]


def _tune(
    recipe: Recipe,
    parameters: Sequence[Parameter],
    strategy: Strategy,
    prepared: Sequence[tuple[Task, Examples]],
    test: Sequence[tuple[Task, Examples]],
    trace: Trace,
    settings: TuneSettings,
    say: Callable[[str], None],
    started: float,
) -> TuneResult:
    """Search on where the trace ends."""
    out, tasks = trace.folder, [task for task, _ in prepared]
    metrics = {task.name: task.metric for task in tasks}
    experts = _experts(recipe, prepared, trace, settings, say) if settings.objective == "relative" else None

    def value_of(trial: Trial) -> float:
        return objective(settings.objective, trial.scores, metrics, experts)

    arguments: dict[str, Any] = {"dtype": settings.dtype, "seed": settings.seed, "shortcut": settings.shortcut}
    folder = out if trace.writes else None
    with Bench(recipe, prepared, **arguments, folder=folder, progress=settings.progress, say=say) as bench:
        _search(strategy, bench, trace, value_of, settings)
        trials = list(trace.trials.values())
        best = max(trials, key=value_of)
        note = f"# {settings.objective} {value_of(best):.4f} on validation data, the best of {len(trials)} points\n"
        if trace.writes:
            write_text(out / "best.yml", note + recipe.source_at(best.point))
        result = TuneResult(best.point, value_of(best), best.scores, trials, bench.effort)
        if settings.test or bench.effort.recombined:
            result.confirmed, result.difference, scored = bench.confirm(best.point, test)
            result.test = Evaluation("best.yml", scored, settings.seed) if settings.test else None
    if can_plot() and trace.writes:
        with file_in_place_after(out / "scores.png") as beside:
            plot_search(trials, [value_of(t) for t in trials], parameters, settings.objective, beside)
    result.effort.seconds = time.perf_counter() - started
    trace.finish(_summary(result, settings, experts, trace.summary))
    return result


def with_validation(task: Task, allow_same_split: bool = False) -> Task:
    """Give the task back, if its validation data is not its test data; where there is none, the latter may be allowed.

    Raises:
        UserError: it has no validation data, or some of its rows are the test's.
    """
    if task.test is None:
        raise UserError(f"task {task.name!r}: kind {task.kind} has no validation split; leave it away to tune")
    if task.validation is None:
        if allow_same_split:
            return replace(task, validation=task.test)
        raise UserError(
            f"task {task.name!r}: data: there is no validation_split to tune on, and test data does not tune; name "
            "one, or give --allow-same-split"
        )
    if task.validation.overlaps(task.test) and not allow_same_split:
        raise UserError(
            f"task {task.name!r}: data: validation_split {task.validation.split_shown!r} and split "
            f"{task.test.split_shown!r} share rows, and test data does not tune; name another, or give "
            "--allow-same-split"
        )
    return task


def _search(
    strategy: Strategy, bench: Bench, trace: Trace, value_of: Callable[[Trial], float], settings: TuneSettings
) -> None:
    """Try what the strategy proposes and the trace does not know."""
    with progress_bar(what="points", unit="point", shown=settings.progress) as bar:
        for batch in strategy.batches():
            new = {key_of(point): point for point in batch if trace.get(point) is None}
            # Whoever proposes generations goes on after this one.
            budget = DEFAULT_BUDGET if settings.budget is None else settings.budget
            expected = budget if settings.strategy == "cma" else 0
            bar.total = (bar.total or 0) + len(new)
            started = time.perf_counter()
            for point, results, how in bench.try_points(list(new.values()), expected):
                scores = {result.name: result.score for result in results}
                trace.add(Trial(point, scores, how, round(time.perf_counter() - started, 3)))
                bar.set_postfix_str(f"best {max(map(value_of, trace.trials.values())):.4f}", refresh=False)
                bar.update()
                started = time.perf_counter()
            strategy.tell(batch, [value_of(trace.get(point)) for point in batch])
        if not bar.disable and bar.n > bar.last_print_n:
            bar.refresh()  # where bars are lines, a short search would end without one


def _experts(
    recipe: Recipe,
    prepared: Sequence[tuple[Task, Examples]],
    trace: Trace,
    settings: TuneSettings,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Score each task's best expert on the examples that points are scored on; each is scored once."""
    wanted = {task.name: experts_of_task(task, recipe.experts) for task, _ in prepared}
    for expert in recipe.experts:
        new = [(t, e) for t, e in prepared if expert in wanted[t.name] and expert not in trace.experts.get(t.name, {})]
        if not new:
            continue
        with open_model(expert, settings.dtype) as opened:
            for task, examples in new:
                running = start_opened(opened, task, "validation", examples, settings.seed)
                trace.add_expert(task.name, expert, running.run(settings.progress).score)
    best = {}
    for task, _ in prepared:
        found = {expert: trace.experts[task.name][expert] for expert in wanted[task.name]}
        leading = max(found, key=lambda expert: goodness(found[expert], task.metric))
        best[task.name] = found[leading]
        if found[leading] <= 0:
            raise UserError(f"--objective relative: the experts score 0 on {task.name!r}; relative to that nothing is")
        say(f"expert on {task.name}: {leading}, {format_score(found[leading], task.metric)}")
    return best


def _identity(
    recipe: Recipe,
    parameters: Sequence[Parameter],
    prepared: Sequence[tuple[Task, Examples]],
    settings: TuneSettings,
) -> dict[str, Any]:
    """Say what a point's scores depend on, named as messages name it."""
    names = [parameter.name for parameter in parameters]
    source = recipe.source_at(dict.fromkeys(names))
    return {
        "set of parameters": sorted(names),
        "configuration": source,
        "state of the models' files": {m: ModelName.find(m).fingerprint for m in (recipe.base, *recipe.experts)},
        "state of the files that the configuration names": {
            file: tree_state(file) for file in sorted(named_files(parse_yaml(source, recipe.name)))
        },
        "state of the data": {file: tree_state(file) for task, _ in prepared for file in task.files()},
        "set of tasks": [
            {"name": t.name, "kind": t.kind, "metric": t.metric, "settings": dict(t.settings)} for t, _ in prepared
        ],
        "set of validation examples": {t.name: [fingerprint_of_examples(e), len(e)] for t, e in prepared},
        "--dtype": settings.dtype,
    }


def _summary(
    result: TuneResult, settings: TuneSettings, experts: Mapping[str, float] | None, earlier: Mapping[str, Any]
) -> dict[str, Any]:
    """Say what tune.json tells besides the search's identity; `earlier` is what it told before this run."""
    summary: dict[str, Any] = {
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("progress", "force")},
        "best": {"point": result.best, "objective": result.objective, "scores": result.scores},
        "experts": experts,
        "confirmed": result.confirmed,
        "largest_difference": result.difference,
        "last_run": {key: round(value, 1) for key, value in asdict(result.effort).items()},
        "test": None
        if result.test is None
        else {"tasks": [task_record(task) for task in result.test.tasks], "mean": result.test.mean},
    }
    if (earlier.get("best") or {}).get("point") == result.best:  # what was found out about this point still holds
        for key in ("confirmed", "largest_difference", "test"):
            summary[key] = earlier.get(key) if summary[key] is None else summary[key]
    return summary


def report_lines(result: TuneResult, out: Path, metrics: Mapping[str, str], objective_name: str) -> list[str]:
    """Write what the user is told at the end."""
    scores = ", ".join(f"{name} {format_score(score, metrics[name])}" for name, score in result.scores.items())
    effort = result.effort
    plain = effort.points - effort.recombined
    lines = [
        f"best: {show_point(result.best)}",
        f"  validation: {scores}; objective ({objective_name}) {result.objective:.4f}, of {len(result.trials)} points",
    ]
    if effort.points:
        lines.append(
            f"{effort.points} points tried: {effort.recombined} recombined in memory, {plain} merged; {effort.merges} "
            f"merges in {effort.merge_seconds:.1f} s, {effort.seconds:.1f} s in all"
        )
    else:
        lines.append(f"0 points tried: all of them are in {out / 'trace.jsonl'}")
    if effort.recombined and effort.merges:
        each = effort.merge_seconds / effort.merges
        spared = effort.points + 1 - effort.merges
        lines.append(f"  one merge per point would have been {max(spared, 0)} merges more, about {spared * each:.0f} s")
    if result.confirmed is not None:
        again = ", ".join(f"{name} {format_score(score, metrics[name])}" for name, score in result.confirmed.items())
        off = "" if result.difference is None else f"; weights differ by {result.difference:.1e} of a tensor's largest"
        lines.append(f"best.yml merged: {again}{off}")
        if (result.difference or 0.0) > 2**-7:
            lines.append(
                "  more than writing in 16 bits explains: mergekit's own methods compute in dtype, tune in float32; "
                "with dtype: float32 and out_dtype: bfloat16 the merge is what was searched"
            )
    if result.test is not None:
        lines += ["test data, scored once:", *(f"  {line}" for line in table(result.test))]
    return lines
