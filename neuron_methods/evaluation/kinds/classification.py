"""What all classifiers with a head share: which classes there are, and which one is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from neuron_methods.data.images import class_index
from neuron_methods.evaluation.examples import Examples, Outcome
from neuron_methods.evaluation.kinds.scorer import Scorer
from neuron_methods.evaluation.kinds.setting_checks import different_labels
from neuron_methods.evaluation.tasks import Task
from neuron_methods.support.errors import UserError


class Classification(Scorer):
    """The class with the largest logit, among all or among `labels` alone.

    Attributes:
        targets: the model's class of every example.
        classes: the model's classes to choose from, int64 (classes of the task,); None: all.
    """

    settings: ClassVar = {"labels": different_labels(str, int)}

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        config = self.model.config
        self.targets = target_classes(self.examples, config)
        labels = self.task.settings.get("labels")
        self.classes = None if labels is None else torch.tensor([class_index(v, None, config) for v in labels])

    @classmethod
    def check_model(cls, task: Task, config: Any, architecture: str, shown: str) -> None:
        """Refuse what is no such classifier, and one that lacks a label of the task."""
        super().check_model(task, config, architecture, shown)
        for label in task.settings.get("labels", ()):
            if class_index(label, None, config) is None:
                known = [name for name in config.label2id or {} if not name.startswith("LABEL_")]
                there = ", ".join(known[:5]) + (", …" if len(known) > 5 else "")
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
        if self.classes is None:
            found = logits.argmax(dim=1).tolist()
        else:
            found = self.classes[logits[:, self.classes].argmax(dim=1)].tolist()
        return self.chosen(indices, found, self.model.config.id2label or {})


def target_classes(examples: Examples, config: Any) -> list[int]:
    """Find the model's class of every example.

    Raises:
        UserError: a label is none of the model's, or none that the task restricts it to.
    """
    labels = examples.task.settings.get("labels")
    allowed = None if labels is None else {class_index(label, None, config) for label in labels}
    names = examples.reader.labels
    targets = []
    for index in range(len(examples)):
        found = class_index(examples.value(index, "label"), names, config)
        if found is None:
            raise examples.wrong(index, "label", f"one of the model's {config.num_labels} labels")
        if allowed is not None and found not in allowed:
            raise examples.wrong(index, "label", "one of the task's labels")
        targets.append(found)
    return targets
