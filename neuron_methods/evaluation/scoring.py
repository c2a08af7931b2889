"""A model on tasks: check, score in batches of like size, on one process or several, and add up."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from neuron_methods.data.batching import batched, by_length
from neuron_methods.evaluation.examples import Examples, Outcome, read_examples
from neuron_methods.evaluation.kinds import KINDS
from neuron_methods.evaluation.kinds.harness import run_harness
from neuron_methods.evaluation.kinds.prompting import chat_notes, chats
from neuron_methods.evaluation.kinds.scorer import processor_part
from neuron_methods.evaluation.models import ModelSpec, OpenedModel, architecture_of, open_model
from neuron_methods.evaluation.scores import bootstrap_interval, is_share, score_and_interval
from neuron_methods.evaluation.tasks import Task
from neuron_methods.models.processes import process_state
from neuron_methods.support.errors import UserError
from neuron_methods.support.progress import progress_bar
from neuron_methods.support.quiet import quiet_transformers


@dataclass(frozen=True)
class TaskResult:
    """How a model did on one task.

    `score` and the ends of its 95 % interval, `low` and `high`, are 0 to 1, or a perplexity or another number that is
    no share; `outcomes` are in the order of their rows; `notes` are what the user should know, `prompts` is how prompts
    were made: `chat`, `few_shot`.
    """

    name: str
    kind: str
    metric: str
    score: float
    low: float
    high: float
    count: int
    source: str
    split: str
    seconds: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list, repr=False)
    notes: list[str] = field(default_factory=list)
    prompts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """How a model did on all tasks."""

    model: str
    tasks: list[TaskResult]
    seed: int = 0
    processes: int = 1

    @property
    def mean(self) -> float | None:
        """The mean score; None where scores cannot be averaged, as one is no share."""
        if not all(is_share(task.metric) for task in self.tasks):
            return None
        return sum(task.score for task in self.tasks) / len(self.tasks)


def evaluate_model(
    model: Any,
    processor: Any,
    task: Task,
    split: str = "test",
    *,
    examples: Examples | None = None,
    seed: int = 0,
    progress: bool = False,
) -> TaskResult:
    """Score a model that is in memory on one task; arguments and errors are those of `start_task`."""
    return start_task(model, processor, task, split, examples=examples, seed=seed).run(progress)


def start_task(
    model: Any,
    processor: Any,
    task: Task,
    split: str = "test",
    *,
    examples: Examples | None = None,
    device: torch.device | None = None,
    seed: int = 0,
) -> RunningTask | HarnessTask:
    """Get a task ready for a model in memory; what is made of the examples serves every `RunningTask.run`.

    Whoever changes the model's weights in place runs it again.

    Args:
        model: as transformers makes it.
        processor: its tokenizer, its image processor, or something that holds both.
        task: from `load_tasks`.
        split: ``test`` or ``validation``.
        examples: from `read_examples`, to read them once for several models.
        device: where inputs go; None: where the model is.
        seed: of the draw of examples, where the task has a limit, and of the interval.

    Raises:
        UserError: the data cannot be read, or the model cannot do the task.
    """
    kind = KINDS[task.kind]
    shown = Path(getattr(model, "name_or_path", "") or "in memory").name
    kind.check_model(task, model.config, architecture_of(model), shown)
    if not kind.reads_data:
        return HarnessTask(model, processor_part(processor, "tokenizer"), task, seed)
    if examples is None:
        examples = read_examples(task, split, seed)
    kind.check_examples(examples, model.config)
    return RunningTask(kind(model, processor, examples, device or model.device), examples, seed)


def start_opened(
    opened: OpenedModel, task: Task, split: str, examples: Examples | None, seed: int
) -> RunningTask | HarnessTask:
    """Get a task ready, as `start_task` does, for what `open_model` has loaded."""
    return start_task(opened.model, opened.processor, task, split, examples=examples, device=opened.device, seed=seed)


class RunningTask:
    """A task ready to be scored on one model, as often as one likes."""

    def __init__(self, scorer: Any, examples: Examples, seed: int) -> None:
        self.scorer, self.examples, self.seed = scorer, examples, seed
        self.task = examples.task

    def run(self, progress: bool = False) -> TaskResult:
        """Score the examples; under ``accelerate launch`` every process scores its share and all know the result."""
        started = time.perf_counter()
        state = process_state()
        order = by_length([self.scorer.length(i) for i in range(len(self.examples))])
        own = order[state.process_index :: state.num_processes]
        training = self.scorer.model.training
        self.scorer.model.eval()
        outcomes: list[Outcome] = []
        shown = progress and state.is_main_process
        bar = progress_bar(total=len(own), what=self.task.name, unit="example", shown=shown, leave=False)
        with bar, torch.inference_mode(), quiet_transformers():
            self.scorer.begin()
            for batch in batched(own, self.task.batch_size):
                with _sound_output(self.scorer.model, f"{self.task.name!r}", self.examples.samples[batch[0]].row):
                    outcomes += self.scorer.score(batch)
                bar.update(len(batch))
        self.scorer.model.train(training)
        if state.num_processes > 1:
            from accelerate.utils import gather_object

            outcomes = gather_object(outcomes)
        outcomes.sort(key=lambda outcome: outcome.row)
        task = self.task
        score, low, high = score_and_interval(outcomes, task.metric, self.seed)
        notes = [*self.scorer.notes]
        if self.examples.skipped:
            notes.append(f"{self.examples.skipped} rows with an empty column left out")
        if truncated := sum(o.truncated for o in outcomes):
            notes.append(f"{truncated} inputs cut to what the model can read")
        return TaskResult(
            name=task.name,
            kind=task.kind,
            metric=task.metric,
            score=score,
            low=low,
            high=high,
            count=len(outcomes),
            source=task.source,
            split=task.rows(self.examples.split).split_shown,
            seconds=round(time.perf_counter() - started, 3),
            outcomes=outcomes,
            notes=notes,
            prompts=self.scorer.prompting,
        )


@contextmanager
def _sound_output(model: Any, task: str, row: int) -> Iterator[None]:
    """Within the block, logits that are NaN or Inf end in a UserError with the task and the row its batch begins with.

    Inf below 0 is what some models put in the place of what they rule out.
    """

    def look(_module: Any, _arguments: Any, output: Any) -> None:
        for name in ("logits", "logits_per_image"):
            logits = getattr(output, name, None)
            if isinstance(logits, torch.Tensor) and logits.numel() and not float(logits.amax()) < float("inf"):
                raise UserError(
                    f"task {task}: in the batch that begins with row {row + 1} the model's output is NaN or Inf, "
                    "though its weights are finite; compute in another dtype (--dtype float32)"
                )

    handle = model.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


class HarnessTask:
    """A task of lm-evaluation-harness, ready to be scored on one model; every process scores all of it."""

    def __init__(self, model: Any, tokenizer: Any, task: Task, seed: int) -> None:
        self.model, self.tokenizer, self.task, self.seed = model, tokenizer, task, seed

    def run(self, progress: bool = False) -> TaskResult:
        """Let the harness score it.

        The interval is ours where the score is the mean of the examples' scores, else 1.96 of the harness's standard
        errors on either side.
        """
        started = time.perf_counter()
        found = run_harness(self.model, self.tokenizer, self.task, self.seed)
        outcomes = [Outcome(row, score) for row, score in found.scores]
        score = found.score
        low, high = score - 1.96 * found.error, score + 1.96 * found.error
        scores = [outcome.score for outcome in outcomes]
        if scores and abs(sum(scores) / len(scores) - score) < 1e-6:
            low, high = bootstrap_interval(scores, [1.0] * len(scores), "", self.seed)
        return TaskResult(
            name=self.task.name,
            kind=self.task.kind,
            metric=found.metric,
            score=score,
            low=low,
            high=high,
            count=found.count,
            source=self.task.settings["task"],
            split="test",
            seconds=round(time.perf_counter() - started, 3),
            outcomes=outcomes,
            notes=chat_notes(self.tokenizer, self.task),
            prompts={"chat": chats(self.task.settings), "few_shot": self.task.settings.get("num_fewshot")},
        )


def evaluate(
    model: str,
    tasks: Sequence[Task],
    *,
    split: str = "test",
    dtype: str = "auto",
    limit: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Score MODEL, as `open_model` takes it, on tasks; whatever can be refused is refused before it is loaded.

    A limit counts where it is less than the task's own; the seed is of the draw of examples and of the intervals.

    Raises:
        UserError: anything is wrong with the model, the tasks or their data.
    """
    from transformers import set_seed

    spec = ModelSpec.parse(model)
    prepared = prepare_tasks(tasks, spec, split, seed, limit)
    set_seed(seed)
    results = []
    with open_model(spec, dtype) as opened:
        for task, examples in prepared:
            results.append(start_opened(opened, task, split, examples, seed).run(progress))
    return Evaluation(spec.shown, results, seed, process_state().num_processes)


def prepare_tasks(
    tasks: Sequence[Task], spec: ModelSpec, split: str, seed: int, limit: int | None = None
) -> list[tuple[Task, Examples | None]]:
    """Check all that can be checked without the model's weights, and read the tasks' examples.

    Raises:
        UserError: a task does not fit the model, its data cannot be read, or the model has no processor for it.
    """
    for task in tasks:
        KINDS[task.kind].check_model(task, spec.config, spec.architecture, spec.shown)
    prepared = []
    processors = spec.processors
    for task in tasks:
        kind = KINDS[task.kind]
        examples = read_examples(task, split, seed, limit) if kind.reads_data else None
        if examples is not None:
            kind.check_examples(examples, spec.config)
        elif split != "test":
            raise UserError(f"task {task.name!r}: kind {task.kind} has no validation split; leave it away to tune")
        for part in kind.needs:
            getattr(processors, part)
        prepared.append((task, examples))
    return prepared
