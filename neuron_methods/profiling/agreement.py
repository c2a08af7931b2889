"""How often two ways of labelling neurons agree, and how much more often than by chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from neuron_methods.neurons.profile_file import NeuronProfile
from neuron_methods.profiling import MIN_FIRING, THRESHOLD
from neuron_methods.profiling.grouping import classify
from neuron_methods.profiling.labels_file import NeuronLabels
from neuron_methods.support.errors import UserError


@dataclass(frozen=True)
class Agreement:
    """Two labels of each of `count` neurons.

    Attributes:
        count: of neurons.
        share: of them that have the same label twice.
        by_chance: the share expected where the two know nothing of each other: Σ of the products of their shares.
        kappa: Cohen's (1960): (share − by_chance) / (1 − by_chance); 0 where both give all neurons one label.
    """

    count: int
    share: float
    by_chance: float
    kappa: float

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]]) -> Agreement:
        """Compare labels, one or more pairs."""
        counts = Counter(pairs)
        total = counts.total()
        ones, others = Counter[str](), Counter[str]()
        for (one, other), number in counts.items():
            ones[one] += number
            others[other] += number
        share = sum(number for (one, other), number in counts.items() if one == other) / total
        chance = sum(ones[name] * others[name] for name in ones) / total**2
        return cls(total, share, chance, (share - chance) / (1 - chance) if chance < 1 else 0.0)

    def __str__(self) -> str:
        return (
            f"{self.share:.1%} of {self.count} neurons have the same label, where chance makes {self.by_chance:.1%} "
            f"(Cohen's kappa {self.kappa:.2f})"
        )


def by_activations(
    profile: NeuronProfile, labels: NeuronLabels, threshold: float = THRESHOLD, min_firing: float = MIN_FIRING
) -> list[str] | str:
    """Give each label's neuron the group of its top activations, in the same order; or say why that cannot be told."""
    if not set(profile.sources).intersection(label.group for label in labels.labels):
        return "no label is the name of a data source of the profile"
    try:
        groups = classify(profile, threshold, min_firing)
    except UserError as error:
        return str(error)
    return [groups.groups[groups.labels[label.layer][label.neuron]] for label in labels.labels]


def describe_agreement(labels: NeuronLabels, activations: list[str] | str) -> str:
    """Say how often labels agree with what `by_activations` found, in a line."""
    if isinstance(activations, str):
        return f"agreement with activations: not known ({activations})"
    pairs = zip((label.group for label in labels.labels), activations, strict=True)
    return f"agreement with activations: {Agreement.of(pairs)}"
