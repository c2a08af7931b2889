"""What all classifiers with a head share: which classes there are, and which one is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from neuron_methods.evaluation.examples import Examples, Outcome
from neuron_methods.evaluation.kinds.scorer import Scorer
from neuron_methods.evaluation.kinds.setting_checks import different_labels, string
from neuron_methods.evaluation.kinds.task_classes import TaskClasses
from neuron_methods.evaluation.tasks import Task
from neuron_methods.support.errors import UserError


class Classification(Scorer):
    """The class with the largest logit, among all or among `labels` alone; `head` says whose numbered labels are.

    Attributes:
        targets: the model's class of every example.
        classes: the model's classes to choose from, int64 (classes of the task,); None: all.
    """

    settings: ClassVar = {"labels": different_labels(str, int), "head": string("the name of an expert")}

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        config = self.model.config
        self.known = TaskClasses.of(self.task, config)
        self.targets = target_classes(self.examples, config)
        labels = self.task.settings.get("labels")
        chosen = {self.known.index(label, None) for label in labels or ()}
        every = range(config.num_labels)
        self.classes = None if labels is None else torch.tensor([c for c in every if self.known.same(c) in chosen])

    @classmethod
    def check_model(cls, task: Task, config: Any, architecture: str, shown: str) -> None:
        """Refuse what is no such classifier, and one that lacks a label of the task."""
        super().check_model(task, config, architecture, shown)
        known = TaskClasses.of(task, config)
        for label in task.settings.get("labels", ()):
            if known.index(label, None) is None:
                names = [name for name in config.label2id or {} if not name.startswith("LABEL_")]
                there = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
                raise UserError(
                    f"task {task.name!r}: labels: the model {shown} has no label {label!r} (it has "
                    f"{there or f'0 to {config.num_labels - 1}'})"
                )

    @classmethod
    def check_examples(cls, examples: Examples, config: Any) -> None:
        """Refuse a label that is none of the model's, or none of the task's."""
        target_classes(examples, config)

    def outcomes(self, logits: Tensor, indices: Sequence[int]) -> list[Outcome]:
        """Say what the logits of a batch, float32 (batch, classes of the model) on the CPU, mean."""
        found = logits.argmax(dim=1)
        if self.classes is not None:
            best, place = logits[:, self.classes].max(dim=1)
            # A head of a routed model may have none of the task's classes: then it is wrong, whatever it says.
            found = torch.where(best > float("-inf"), self.classes[place], found)
        return self.chosen(indices, list(map(self.known.same, found.tolist())), self.model.config.id2label or {})


def target_classes(examples: Examples, config: Any) -> list[int]:
    """Find the model's class of every example.

    Raises:
        UserError: a label is none of the model's, or none that the task restricts it to.
    """
    labels, known = examples.task.settings.get("labels"), TaskClasses.of(examples.task, config)
    allowed = None if labels is None else {known.index(label, None) for label in labels}
    names = examples.reader.labels
    targets = []
    for index in range(len(examples)):
        found = known.index(examples.value(index, "label"), names)
        if found is None:
            raise examples.wrong(index, "label", f"one of the model's {config.num_labels} labels")
        if allowed is not None and found not in allowed:
            raise examples.wrong(index, "label", "one of the task's labels")
        targets.append(found)
    return targets
