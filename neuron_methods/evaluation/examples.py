"""A task's rows, read once and kept: what is asked, and what counts as right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from neuron_methods.data.sources import DataSource, Sample, SourceReader, is_empty
from neuron_methods.evaluation.tasks import Task
from neuron_methods.support.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """What a model made of one example.

    Attributes:
        row: in the data.
        score: 0 to 1; negative log-likelihood, in nats, for perplexity.
        prediction: what the model said.
        target: what counts as right.
        weight: the example's weight in the task's score: its number of tokens for perplexity.
        truncated: whether the input was cut to what the model can read.
    """

    row: int
    score: float
    prediction: Any = None
    target: Any = None
    weight: float = 1.0
    truncated: bool = False


@dataclass
class Examples:
    """The examples of one split of a task, in the order of their rows.

    Attributes:
        task: whose.
        split: ``test`` or ``validation``.
        reader: where they come from; knows the names of labels.
        samples: the rows; values in the order of `roles`.
        roles: the task's columns by role.
        skipped: rows left out because a column was empty.
        shots: examples of the validation split that are shown before each, no two of the same question, one more than
            the task asks for, where there are as many.
    """

    task: Task
    split: str
    reader: SourceReader
    samples: list[Sample]
    roles: list[str]
    skipped: int = 0
    shots: Examples | None = None

    def shots_before(self, index: int) -> list[int]:
        """List the places in `shots` of those that are shown before an example; its question is in none of them."""
        if self.shots is None:
            return []
        own = self.samples[index].values[0]
        others = [place for place, sample in enumerate(self.shots.samples) if sample.values[0] != own]
        return others[: self.task.settings["few_shot"]]

    def __len__(self) -> int:
        return len(self.samples)

    def value(self, index: int, role: str) -> Any:
        """A column of an example; None where the task does not name an optional one."""
        return self.samples[index].values[self.roles.index(role)] if role in self.roles else None

    def text(self, index: int, role: str) -> str:
        """A column that must be text; numbers are taken as they are written."""
        value = self.value(index, role)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise self.wrong(index, role, "text")
        return value

    def texts(self, index: int, role: str) -> list[str]:
        """A column that holds text or several texts."""
        value = self.value(index, role)
        if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            return value
        return [self.text(index, role)]

    def wrong(self, index: int, role: str, needed: str) -> UserError:
        """The error about a value that is not what is needed."""
        value = self.value(index, role)
        shown = repr(value) if isinstance(value, (str, int, float, bool)) and len(repr(value)) < 60 else None
        return UserError(
            f"task {self.task.name!r}: column {self.task.columns[role]!r} of row {self.samples[index].row} holds "
            f"{shown or type(value).__name__}, needed is {needed}"
        )


def read_examples(task: Task, split: str = "test", seed: int = 0, limit: int | None = None) -> Examples:
    """Open a task's data and draw its examples.

    Args:
        task: the task.
        split: ``test`` or ``validation``.
        seed: of the draw, where there are more rows than the limit; of nothing else.
        limit: instead of the task's, where it is lower; None: the task's.

    Raises:
        UserError: the data cannot be read, a column is missing, or nothing is left; there are too few examples to show.
    """
    read = _read(task, split, seed, limit)
    if count := task.settings.get("few_shot", 0):
        read.shots = _shots(task, seed, count + 1)  # one more, as an example is not shown before itself
        if any(len(read.shots_before(index)) < count for index in range(len(read))):
            raise UserError(
                f"task {task.name!r}: few_shot: {count} asked for, and its validation split has {len(read.shots)} rows "
                "of different questions; an example is not shown before itself"
            )
    return read


def _shots(task: Task, seed: int, count: int) -> Examples:
    """Draw so many rows of different questions from the validation split, or as many as there are."""
    drawn = count
    while True:
        found = _read(replace(task, limit=0), "validation", seed, drawn)
        different: list[Sample] = []
        for sample in found.samples:
            if all(sample.values[0] != other.values[0] for other in different):
                different.append(sample)
        if len(different) >= count or len(found) < drawn:
            return replace(found, samples=different[:count])
        drawn *= 2


def _read(task: Task, split: str, seed: int, limit: int | None) -> Examples:
    rows = task.rows(split)
    roles = sorted(task.columns, key="label".__eq__)  # last: the reader knows the names of the last column's labels
    columns = tuple(task.columns[role] for role in roles)
    place = (rows.location, rows.local, rows.config, rows.split)
    reader = SourceReader(DataSource(task.name, *place, columns, role="task", told_by="the task's columns"), columns)
    bound = min(filter(None, (task.limit, limit)), default=None)
    drawn = list(reader.samples(bound or 0, seed, start=rows.start, stop=rows.stop, leave_out=_asks_nothing))
    skipped = reader.left_out
    if not drawn:
        why = f", {skipped} rows with an empty column" if skipped else ""
        raise UserError(f"{reader.label}: nothing to score in split {rows.split_shown!r}{why}")
    samples = [Sample(order, s.row, s.values) for order, s in enumerate(sorted(drawn, key=lambda s: s.row))]
    return Examples(task, split, reader, samples, roles, skipped)


def _asks_nothing(values: tuple[Any, ...]) -> bool:
    """Tell whether an example is to be left out. An empty answer may be the right one; an empty question is none."""
    return any(value is None for value in values) or is_empty(values[0])
