"""What a kind of task is: the columns it reads, the models it fits, and how one batch is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from neuron_methods.evaluation.examples import Examples, Outcome
from neuron_methods.evaluation.kinds.setting_checks import Check
from neuron_methods.evaluation.tasks import Task
from neuron_methods.models.kinds import model_kind, text_limit
from neuron_methods.support.errors import UserError


class Scorer(ABC):
    """One task at work on one model in memory. What it made of the examples (tokens, pixels) it keeps.

    Attributes:
        columns: role -> column taken where the task names none. The first one is the question.
        optional_columns: roles that a task may name besides.
        metrics: names, the default first.
        settings: keys that a task of this kind may have besides the common ones, each with its check.
        required: those of them that a task must have.
        path_settings: those of them that are paths, relative to the file of tasks.
        batch_size: where the task gives none.
        models: kinds of model that fit, by `neuron_methods.models.kinds`.
        needed: what such a model is, for messages.
        needs: what the model's processor must hold, ``tokenizer`` and ``image_processor``.
        reads_data: whether the task names its data.
    """

    columns: ClassVar[Mapping[str, str]] = {}
    optional_columns: ClassVar[tuple[str, ...]] = ()
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    settings: ClassVar[Mapping[str, Check]] = {}
    required: ClassVar[tuple[str, ...]] = ()
    path_settings: ClassVar[tuple[str, ...]] = ()
    batch_size: ClassVar[int] = 32
    models: ClassVar[tuple[str, ...]] = ("causal", "text-to-text")
    needed: ClassVar[str] = "a causal or a text-to-text model"
    needs: ClassVar[tuple[str, ...]] = ("tokenizer",)
    reads_data: ClassVar[bool] = True

    def __init__(self, model: Any, processor: Any, examples: Examples, device: torch.device) -> None:
        """Get ready to score; the processor is a tokenizer, an image processor, or holds both."""
        self.model, self.processor, self.examples, self.device = model, processor, examples, device
        self.task = examples.task
        #: How prompts were made, and what the user should know of it.
        self.prompting: dict[str, Any] = {}
        self.notes: list[str] = []

    @classmethod
    def check_model(cls, task: Task, config: Any, architecture: str, shown: str) -> None:
        """Refuse, by its config alone, a model that cannot do the task; `shown` is its name."""
        if not cls.fits(architecture, config):
            raise UserError(
                f"task {task.name!r}: model {shown} is a {architecture}, kind {task.kind} needs {cls.needed}"
            )

    @classmethod
    def fits(cls, architecture: str, config: Any) -> bool:
        """Tell whether a model of this class is one for this kind of task."""
        return model_kind(architecture, config) in cls.models

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> tuple[str, str] | None:
        """Find settings that do not go together; (key, what is wrong), None if all is well."""
        return None

    @classmethod  # noqa: B027 - optional
    def check_examples(cls, examples: Examples, config: Any) -> None:
        """Refuse examples that the model has no answer for, by its config alone."""

    def begin(self) -> None:  # noqa: B027 - optional
        """Get ready for one run over the examples: the model's weights may have changed since the last."""

    def length(self, index: int) -> int:
        """Measure an example's input, to put like to like."""
        return 0

    @abstractmethod
    def score(self, indices: Sequence[int]) -> list[Outcome]:
        """Score one batch."""

    def chosen(self, indices: Sequence[int], found: Sequence[int], names: Mapping[int, Any]) -> list[Outcome]:
        """Say what it means that these classes were found, where `targets` holds the right one of every example."""
        rows = [self.examples.samples[i].row for i in indices]
        pairs = [(predicted, self.targets[i]) for i, predicted in zip(indices, found, strict=True)]
        return [
            Outcome(row, float(predicted == target), names.get(predicted, predicted), names.get(target, target))
            for row, (predicted, target) in zip(rows, pairs, strict=True)
        ]

    def part(self, name: str) -> Any:
        """Give the tokenizer or the image processor."""
        return processor_part(self.processor, name)


def processor_part(processor: Any, name: str) -> Any:
    """Find the ``tokenizer`` or ``image_processor`` that a processor holds, or is."""
    found = getattr(processor, name, None)
    if found is None and callable(processor) and hasattr(processor, "batch_decode") == (name == "tokenizer"):
        found = processor
    if found is None:
        raise UserError(f"there is no {name.replace('_', ' ')} to read the task's data with, but a {type(processor)}")
    return found


def shortened(tokens: list[int], longest: int | None, *, keep_end: bool) -> tuple[list[int], bool]:
    """Cut tokens to what a model can read, and tell whether that was needed.

    Kept is their end, where an answer follows there, else their beginning and the token that ends them.
    """
    if longest is None or len(tokens) <= longest:
        return tokens, False
    return tokens[-longest:] if keep_end else [*tokens[: longest - 1], tokens[-1]], True


def longest_input(task: Task, config: Any, reserved: int = 0, unless_set: int | None = None) -> int | None:
    """Tell how many tokens a task lets a model read; None: any number.

    Args:
        task: its `max_length` is one bound.
        config: of the model; what it can read is the other.
        reserved: tokens of the model's room that are for the answer.
        unless_set: the bound where the task has no `max_length`.
    """
    room = text_limit(config)
    bounds = (None if room is None else room - reserved, task.settings.get("max_length", unless_set))
    return min(filter(None, bounds), default=None)
