"""Tasks for a classifier of texts, or of pairs of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from neuron_methods.data.images import class_index
from neuron_methods.evaluation.examples import Examples, Outcome
from neuron_methods.evaluation.kinds.base import Scorer, number_setting, text_limit, wrong_model
from neuron_methods.evaluation.kinds.images import (
    check_labels,
    classified,
    lacks_label,
    restricted_classes,
    target_classes,
)
from neuron_methods.evaluation.tasks import Task


class TextClassification(Scorer):
    """The class with the largest logit, among all or among `labels` alone. The column `pair` holds a second text."""

    columns: ClassVar[Mapping[str, str]] = {"text": "text", "label": "label"}
    optional_columns = ("pair",)
    settings = ("labels", "max_length")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        config, tokenizer = self.model.config, self.part("tokenizer")
        self.targets = target_classes(self.examples, config)
        classes = restricted_classes(self.examples, config)
        self.classes = None if classes is None else torch.tensor(classes)
        self.names = config.id2label or {}
        bound = min(filter(None, (text_limit(config), self.task.settings.get("max_length"))), default=None)
        self.inputs: list[dict[str, list[int]]] = []
        self.truncated: list[bool] = []
        for index in range(len(self.examples)):
            pair = self.examples.text(index, "pair") if "pair" in self.task.columns else None
            texts = (self.examples.text(index, "text"), *([pair] if pair is not None else []))
            whole = tokenizer(*texts)
            cut = bound is not None and len(whole["input_ids"]) > bound
            self.inputs.append(dict(tokenizer(*texts, truncation=True, max_length=bound) if cut else whole))
            self.truncated.append(cut)
        self.pad = getattr(config, "pad_token_id", None)

    @classmethod
    def check_task(cls, task: Task, place: str) -> None:
        """`labels` is a list of different names or numbers."""
        check_labels(task, place, (str, int))
        number_setting(task, "max_length", place)

    @classmethod
    def check_model(cls, task: Task, config: Any, architecture: str, shown: str) -> None:
        """A text classifier that has the task's labels."""
        if not architecture.endswith("ForSequenceClassification"):
            needed = "a text classifier with its head (…ForSequenceClassification)"
            raise wrong_model(task, shown, architecture, needed)
        for label in task.settings.get("labels", ()):
            if class_index(label, None, config) is None:
                raise lacks_label(task, label, config, shown)

    @classmethod
    def check_examples(cls, examples: Examples, config: Any) -> None:
        """Every label is one of the model's, and one of the task's."""
        target_classes(examples, config)

    def length(self, index: int) -> int:
        """Tokens."""
        return len(self.inputs[index]["input_ids"])

    def score(self, indices: Sequence[int]) -> list[Outcome]:
        """Classify."""
        # A decoder that knows no padding cannot tell where a padded text ends.
        size = len(indices) if self.pad is not None else 1
        logits = torch.cat([self._logits(indices[i : i + size]) for i in range(0, len(indices), size)])
        outcomes = classified(self, logits, indices)
        return [replace(o, truncated=self.truncated[i]) for i, o in zip(indices, outcomes, strict=True)]

    def _logits(self, indices: Sequence[int]) -> torch.Tensor:
        width = max(self.length(i) for i in indices)
        fill = {"input_ids": self.pad or 0, "attention_mask": 0, "token_type_ids": 0}
        inputs = {
            name: torch.tensor(
                [[*self.inputs[i][name], *[value] * (width - self.length(i))] for i in indices], device=self.device
            )
            for name, value in fill.items()
            if name in self.inputs[indices[0]]
        }
        return self.model(**inputs).logits.float().cpu()
