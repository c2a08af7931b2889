"""What a label means to a classifier, and to a routed model whose experts have heads of their own.

A routed model's answer is right if its label is called as the right one is, whichever head it comes from. Numbers mean
nothing across heads: a task whose labels are numbers says whose, by `head`. Classes that have no names are told by
their head, and are nobody else's.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from neuron_methods.data.classes import class_index
from neuron_methods.evaluation.tasks import Task
from neuron_methods.routing.heads import ATTRIBUTE
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import unknown


@dataclass(frozen=True)
class TaskClasses:
    """A model's classes as one task sees them.

    Attributes:
        task: whose.
        config: of the model.
        heads: name -> its first class and the end of its classes; empty where the model has one head.
    """

    task: Task
    config: Any
    heads: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, task: Task, config: Any) -> TaskClasses:
        """Look them up.

        Raises:
            UserError: the task names a head that the model does not have.
        """
        heads = {name: (start, stop) for name, start, stop in getattr(config, ATTRIBUTE, ())}
        named = task.settings.get("head")
        if heads and named is not None and named not in heads:
            raise UserError(f"task {task.name!r}: head: {unknown('head', named, heads)}")
        return cls(task, config, heads)

    def index(self, label: Any, names: list[str] | None) -> int | None:
        """Find the model's class of a label, whose number `names` may tell; None where it has none.

        Of classes that are called alike, the first one stands for all.

        Raises:
            UserError: the label is a number without a name, and no head is named whose it is.
        """
        if not self.heads:
            return class_index(label, names, self.config)
        named = self.task.settings.get("head")
        if named is None and len(self.heads) == 1:
            named = next(iter(self.heads))
        if isinstance(label, int) and names and 0 <= label < len(names) and not names[label].isdecimal():
            label = names[label]
        if named is not None:
            start, stop = self.heads[named]
            own = [str(self.config.id2label[number]) for number in range(start, stop)]
            own = [name.removeprefix(f"{named}: ") if f"{named}: LABEL_" in name else name for name in own]
            label2id = {name: number for number, name in enumerate(own)}
            found = class_index(label, names, SimpleNamespace(label2id=label2id, num_labels=len(own)))
            return None if found is None else self.same(start + found)
        if isinstance(label, int) and names and 0 <= label < len(names):
            label = names[label]
        if isinstance(label, int) and not isinstance(label, bool):
            raise UserError(
                f"task {self.task.name!r}: its labels are numbers, which each head counts in an order of its own; say "
                f"whose they are: head: NAME ({', '.join(self.heads)})"
            )
        return self.config.label2id.get(label) if isinstance(label, str) else None

    def same(self, found: int) -> int:
        """Give the class that stands for all that are called as this one is."""
        return self.config.label2id[self.config.id2label[found]] if self.heads else found
