"""A whole comparison: base, experts, and every method's merge, tuned on validation data and scored on test data."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from neuron_methods.evaluation.comparing.contenders import AS_IT_IS, Contender, contenders, parse_methods
from neuron_methods.evaluation.comparing.kept import Kept, check_folder
from neuron_methods.evaluation.comparing.rows import best_point
from neuron_methods.evaluation.examples import Examples
from neuron_methods.evaluation.models import ModelSpec, open_model
from neuron_methods.evaluation.score_files import task_record
from neuron_methods.evaluation.scores import CORPUS_METRICS, is_share
from neuron_methods.evaluation.scoring import TaskResult, prepare_tasks, start_opened
from neuron_methods.evaluation.tasks import Task
from neuron_methods.evaluation.tuning.bench import Bench
from neuron_methods.evaluation.tuning.objective import OBJECTIVES, objective
from neuron_methods.evaluation.tuning.recipe import Recipe
from neuron_methods.evaluation.tuning.search import Point, Strategy, make_strategy, show_point
from neuron_methods.evaluation.tuning.study import told_of_processes, with_validation
from neuron_methods.evaluation.tuning.trace import fingerprint_of_examples
from neuron_methods.models.processes import process_state
from neuron_methods.models.reference import ModelName
from neuron_methods.plugin.merging import plan_merge
from neuron_methods.plugin.run import named_files
from neuron_methods.support.documents import parse_yaml
from neuron_methods.support.errors import UserError
from neuron_methods.support.fingerprints import tree_state
from neuron_methods.support.progress import progress_bar
from neuron_methods.support.runs import claimed
from neuron_methods.support.targets import refuse_within
from neuron_methods.support.text import listed

#: Scores that are no mean over examples, and so have no paired differences.
_OF_ALL = ("perplexity", *CORPUS_METRICS)


@dataclass(frozen=True)
class CompareSettings:
    """How to compare.

    Attributes:
        budget: points per tuned method.
        objective: ``mean`` or ``minimum`` over tasks; what points and methods are chosen by, on validation data.
        seed: of draws and searches.
        limit: examples per task at most.
        dtype: the models compute in.
        defaults: compare the usual methods, beside those that are asked for.
        allow_same_split: validation and test data may be the same.
        force: forget the rows that OUT holds.
        progress: show bars.
    """

    budget: int = 8
    objective: str = "mean"
    seed: int = 0
    limit: int | None = None
    dtype: str = "auto"
    defaults: bool = True
    allow_same_split: bool = False
    force: bool = False
    progress: bool = True


@dataclass(frozen=True)
class Row:
    """What came out for one model.

    Attributes:
        name: of the method, the expert, or ``base``.
        kind: ``base``, ``expert`` or ``merge``.
        tasks: records of the test scores, as `evaluate` writes them.
        outcomes: score of every test example, by task.
        method: mergekit's name of it.
        source: YAML of the merge.
        point: the one that was chosen.
        points: how many were tried.
        validation: objective on validation data; None: it was not scored there.
        merge_seconds: for one merge.
        failed: why there is no merge, in one line; such a row has no scores.
    """

    name: str
    kind: str
    tasks: list[dict[str, Any]]
    outcomes: dict[str, np.ndarray]
    method: str = ""
    source: str = ""
    point: dict[str, Any] = field(default_factory=dict)
    points: int = 0
    validation: float | None = None
    merge_seconds: float | None = None
    failed: str = ""

    @property
    def mean(self) -> float | None:
        """Mean test score over tasks; None where it cannot be taken."""
        if self.failed or not all(is_share(task["metric"]) for task in self.tasks):
            return None
        return sum(task["score"] for task in self.tasks) / len(self.tasks)

    @property
    def paired(self) -> bool:
        """Whether all scores are means over examples."""
        return not self.failed and not any(task["metric"] in _OF_ALL for task in self.tasks)


@dataclass(frozen=True)
class Comparison:
    """All rows, base and experts first; `best` is the merge with the highest validation score."""

    rows: list[Row]
    best: Row
    objective: str
    budget: int
    seed: int
    notes: list[str] = field(default_factory=list)

    @property
    def merges(self) -> list[Row]:
        """The merges, the best on validation data first, those that failed last."""
        found = [row for row in self.rows if row.kind == "merge"]
        return sorted(found, key=lambda row: (bool(row.failed), -(row.validation or 0.0)))


def compare(
    source: str,
    tasks: Sequence[Task],
    out: Path,
    methods: Sequence[str] = (),
    settings: CompareSettings = CompareSettings(),
    *,
    config_name: str = "the configuration",
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Compare methods on the base and the experts of a configuration; several processes score together, all call this.

    Args:
        source: text of a mergekit YAML; its own method is one row.
        tasks: from `load_tasks`.
        out: directory where finished rows are kept.
        methods: as ``--method`` takes them.
        settings: see `CompareSettings`.
        config_name: file name for messages.
        say: takes lines for the user.

    Raises:
        UserError: anything is wrong with configuration, methods, tasks, data or models.
    """
    first = process_state().is_main_process
    if not first:
        settings, say = replace(settings, progress=False), lambda line: None
    if settings.objective not in OBJECTIVES or settings.objective == "relative":
        raise UserError(f"--objective {settings.objective!r}: expected mean or minimum")
    recipe = Recipe(source, config_name, [])
    chosen = _contenders(recipe, methods, settings, config_name)
    tasks = [with_validation(task, settings.allow_same_split) for task in tasks]
    recipes = {each.name: _recipe(each, source, config_name) for each in chosen}
    strategies = {each.name: _strategy(each, settings) for each in chosen}
    plan = plan_merge(source, config_name=config_name)
    spec = ModelSpec.parse(recipe.base)
    validation = prepare_tasks(tasks, spec, "validation", settings.seed, settings.limit)
    test = prepare_tasks(tasks, spec, "test", settings.seed, settings.limit)
    refuse_within(out, f"-o {out}", recipe.reads(tasks))
    if first:
        check_folder(out)
    with claimed(out, f"-o {out}", inside=True) if first else nullcontext():
        kept = Kept(out, _identity(recipe, validation, test, settings), settings.force)
        rows = [_reference(kept, "base", recipe.base, "base", test, settings)]
        seconds = sum(task["seconds"] for task in rows[0].tasks)
        say(_estimate(seconds, validation, test, chosen, recipe.experts, settings))
        for line in told_of_processes(plan):
            say(line)
        for expert in recipe.experts:
            rows.append(_reference(kept, _shown(expert, recipe.experts), expert, "expert", test, settings))
        notes: list[str] = []
        with progress_bar(total=len(chosen), what="methods", unit="method", shown=settings.progress) as bar:
            for each in chosen:
                row = _merge(kept, each, recipes[each.name], strategies[each.name], validation, test, settings, say)
                rows.append(row)
                if row.failed:
                    notes.append(f"{row.name}: {row.failed}")
                    say(notes[-1])
                bar.update()
    merges = [row for row in rows if row.kind == "merge" and not row.failed]
    if not merges:
        raise UserError(f"no method could be merged: {listed(notes)}")
    best = max(merges, key=lambda row: row.validation or 0.0)
    return Comparison(rows, best, settings.objective, settings.budget, settings.seed, notes)


def _contenders(recipe: Recipe, methods: Sequence[str], settings: CompareSettings, config_name: str) -> list[Contender]:
    """List what is compared; raises UserError where there is nothing, or something twice."""
    if len(recipe.experts) < 2 or not recipe.names_base:
        raise UserError(f"{config_name}: compare takes a configuration with base_model and two models or more")
    asked = parse_methods(methods)
    usual = contenders(len(recipe.experts)) if settings.defaults else []
    chosen = [Contender(AS_IT_IS, None), *usual, *asked]
    names = [each.name for each in chosen]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--method {twice}: is compared already; leave it away, or give its parameters")
    return chosen


def _recipe(contender: Contender, source: str, config_name: str) -> Recipe:
    """Make the merge of a contender; raises UserError, naming where it was asked for."""
    try:
        return Recipe(contender.source(source, config_name), config_name, contender.parameters)
    except UserError as error:
        if not contender.asked:
            raise
        what = str(error).removeprefix(f"{config_name}: ").removeprefix("parameters: ").removeprefix("--search ")
        raise UserError(f"--method {contender.asked!r}: {what}") from None


def _strategy(contender: Contender, settings: CompareSettings) -> Strategy:
    """Choose how a contender is tuned: its whole grid where the budget holds it, else points of it at random."""
    parameters = contender.parameters
    if not parameters:
        return Strategy([{}])
    try:
        return make_strategy("grid", parameters, settings.budget, settings.seed)
    except UserError:
        return make_strategy("random", parameters, settings.budget, settings.seed)


def _reference(
    kept: Kept,
    name: str,
    model: str,
    kind: str,
    test: Sequence[tuple[Task, Examples | None]],
    settings: CompareSettings,
) -> Row:
    def build() -> dict[str, Any]:
        with open_model(model, settings.dtype) as opened:
            running = [start_opened(opened, task, "test", examples, settings.seed) for task, examples in test]
            # Where bars are lines, those of the methods are enough.
            return _scores([each.run(settings.progress and sys.stderr.isatty()) for each in running])

    return _row(name, kind, kept.make(f"{kind} {name}", {"model": model}, build))


def _merge(
    kept: Kept,
    contender: Contender,
    recipe: Recipe,
    strategy: Strategy,
    validation: Sequence[tuple[Task, Examples]],
    test: Sequence[tuple[Task, Examples]],
    settings: CompareSettings,
    say: Callable[[str], None],
) -> Row:
    """Tune one contender and score its best point, or find the row as it is kept."""
    metrics = {task.name: task.metric for task, _ in validation}

    def build() -> dict[str, Any]:
        tried: list[tuple[float, Point]] = []
        bench = Bench(
            recipe,
            validation,
            dtype=settings.dtype,
            seed=settings.seed,
            folder=kept.folder if kept.writes else None,
            progress=settings.progress,
            say=lambda line: None,
        )
        with bench:
            for batch in strategy.batches():
                for point, results, _ in bench.try_points(batch):
                    scores = {result.name: result.score for result in results}
                    tried.append((objective(settings.objective, scores, metrics), dict(point)))
            value, best = best_point(tried)
            _, _, results = bench.confirm(best, test)
            effort = bench.effort
        return _scores(results) | {
            "method": recipe.method,
            "source": recipe.source_at(best),
            "point": best,
            "points": len(tried),
            "validation": value,
            "merge_seconds": round(effort.merge_seconds / max(effort.merges, 1), 2),
        }

    key = {"source": recipe.source_at({}), "search": list(contender.search), "budget": settings.budget}
    files = sorted(named_files(parse_yaml(key["source"], recipe.name)))
    key["state of the files that the configuration names"] = {file: tree_state(file) for file in files}
    started = time.perf_counter()
    found = kept.read(f"merge {contender.name}", key)
    try:
        result = kept.make(f"merge {contender.name}", key, build)
    except UserError as error:
        if contender.method is None:
            raise
        # Not every method takes every family; the others are compared.
        return Row(contender.name, "merge", [], {}, recipe.method, failed=str(error))
    row = _row(contender.name, "merge", result)
    again = ", kept" if found is not None else f", {time.perf_counter() - started:.0f} s"
    chosen = f" at {show_point(row.point)}" if row.point else ""
    say(f"{row.name}: {settings.objective} {row.validation:.4f} on validation data{chosen}{again}")
    return row


def _scores(results: Sequence[TaskResult]) -> dict[str, Any]:
    """Say what a row keeps of test scores."""
    return {
        "tasks": [task_record(result) for result in results],
        "outcomes": {result.name: [outcome.score for outcome in result.outcomes] for result in results},
    }


def _row(name: str, kind: str, kept: Mapping[str, Any]) -> Row:
    outcomes = {task: np.asarray(scores, dtype=np.float64) for task, scores in kept["outcomes"].items()}
    return Row(name, kind, **{**kept, "outcomes": outcomes})


def _identity(
    recipe: Recipe,
    validation: Sequence[tuple[Task, Examples]],
    test: Sequence[tuple[Task, Examples]],
    settings: CompareSettings,
) -> dict[str, Any]:
    """Say what every row depends on."""
    return {
        "models": {model: ModelName.find(model).fingerprint for model in (recipe.base, *recipe.experts)},
        "tasks": [
            {"name": t.name, "kind": t.kind, "metric": t.metric, "settings": dict(t.settings)} for t, _ in validation
        ],
        "data": {file: tree_state(file) for task, _ in validation for file in task.files()},
        "validation": {task.name: fingerprint_of_examples(examples) for task, examples in validation},
        "test": {task.name: fingerprint_of_examples(examples) for task, examples in test},
        "dtype": settings.dtype,
        "objective": settings.objective,
        "seed": settings.seed,
    }


def _estimate(
    seconds: float,
    validation: Sequence[tuple[Task, Examples]],
    test: Sequence[tuple[Task, Examples]],
    chosen: Sequence[Contender],
    experts: Sequence[str],
    settings: CompareSettings,
) -> str:
    """Say how long scoring will take, from what the base took on test data."""
    share = sum(len(examples) for _, examples in validation) / max(sum(len(examples) for _, examples in test), 1)
    points = sum(settings.budget if each.search else 1 for each in chosen)
    whole = seconds * (len(experts) + len(chosen) + points * share)
    shown = f"{whole / 60:.0f} min" if whole >= 90 else f"{whole:.0f} s"
    return (
        f"{len(chosen)} methods, {points} points at most: about {shown} of scoring by what the base took, and the "
        "merges; --limit makes it shorter, and what is finished is kept"
    )


def _shown(expert: str, experts: Sequence[str]) -> str:
    """Name an expert by the last parts of its path that tell it from the others."""
    parts = [part for part in expert.rstrip("/").split("/") if part]
    for count in range(1, len(parts) + 1):
        ending = "/".join(parts[-count:])
        if sum(other.rstrip("/").endswith(ending) for other in experts) == 1:
            return ending
    return expert
