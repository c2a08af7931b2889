"""The demo's three tasks, built from what every machine has.

Each has a train and a held-out list, drawn by a seed, without overlap in what has to be combined:

- ``arithmetic``: whole hundreds plus a smaller number; no held-out sum is trained on.
- ``german``: German phrases in English; no held-out pair of adjective and noun is trained on.
- ``python``: the shortest call a standard library signature allows; no held-out function name is trained on.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

from neuron_methods.demo.signatures import library_signatures
from neuron_methods.demo.words import ADJECTIVES, NOUNS, phrases
from neuron_methods.support.errors import UserError

#: Train items per task. Training that takes more steps than these last for goes through them again.
TRAIN_EXAMPLES = 640


@dataclass(frozen=True)
class Example:
    """A prompt and the one answer that counts as right (without the blank that separates them)."""

    prompt: str
    answer: str


class QuickTraining(NamedTuple):
    """Many small steps at a high rate: `steps` of `batch_size` examples, and the peak of the learning rate."""

    steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class DemoTask:
    """Train and held-out examples under one name.

    Attributes:
        name: short, used for directories and table columns.
        title: what the task is, in a few words.
        max_new_tokens: an upper bound on the answers' lengths in tokens of the demo's model.
        steps: training steps that suffice to learn it. More would move the expert further from the base than it has
            to, and experts that stay close merge better.
        quick: how most of it is learnt in a third of the time.
    """

    name: str
    title: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    max_new_tokens: int
    steps: int
    quick: QuickTraining


def digest(examples: tuple[Example, ...]) -> str:
    """Digest examples: with others, of another word list or Python version, experts are trained and scored again."""
    text = json.dumps([(e.prompt, e.answer) for e in examples])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def arithmetic_examples() -> list[tuple[Hashable, Example]]:
    """Make ``300 + 47 =`` → ``347``: hundreds plus 1…99. The key is the sum itself."""
    return [
        (large + small, Example(f"{large} + {small} =", str(large + small)))
        for large in range(100, 1000, 100)
        for small in range(1, 100)
    ]


def german_examples() -> list[tuple[Hashable, Example]]:
    """Make ``German: drei rote Häuser`` → ``three red houses``. The key is the pair of adjective and noun."""
    return [
        ((adjective, noun.singular), Example(f"German: {german}\nEnglish:", english))
        for adjective in ADJECTIVES
        for noun in NOUNS
        for german, english in phrases(adjective, noun)
    ]


def python_examples() -> list[tuple[Hashable, Example]]:
    """Make ``def urljoin(base, url, allow_fragments=True):`` → ``urljoin(base, url)``.

    The key is the function's name.
    """
    return [(name, Example(f"{signature}\nShortest call:", call)) for name, signature, call in library_signatures()]


def split(
    keyed: list[tuple[Hashable, Example]], train: int, held_out: int, rng: random.Random
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Draw train and held-out examples that share no key.

    Held-out keys are drawn first, one example of each; training takes from the keys that are left, each as often as
    it comes.
    """
    keyed = list(keyed)
    rng.shuffle(keyed)
    held: dict[Hashable, Example] = {}
    for key, example in keyed:
        if len(held) == held_out:
            break
        held.setdefault(key, example)
    rest = [example for key, example in keyed if key not in held]
    return tuple(rest[:train]), tuple(held.values())


_SOURCES: tuple[tuple[str, str, int, int, QuickTraining, Callable[[], list[tuple[Hashable, Example]]]], ...] = (
    # name, title, max_new_tokens, steps, quick, source
    ("arithmetic", "a number added to hundreds", 6, 60, QuickTraining(40, 6, 1.5e-3), arithmetic_examples),
    ("german", "German phrases in English", 8, 36, QuickTraining(36, 6, 2e-3), german_examples),
    ("python", "shortest call of a function", 16, 30, QuickTraining(20, 4, 1.5e-3), python_examples),
)

#: Examples held out of training, of which a run scores as many as it is asked to: training does not depend on that.
HELD_OUT_EXAMPLES = 120


def build_tasks(held_out: int, seed: int) -> list[DemoTask]:
    """Build the three tasks with `held_out` examples each, the same for the same seed (and Python, for ``python``).

    Raises:
        UserError: when `held_out` is not between 1 and `HELD_OUT_EXAMPLES`.
    """
    if not 1 <= held_out <= HELD_OUT_EXAMPLES:
        raise UserError(
            f"--examples {held_out}: each task holds out 1 to {HELD_OUT_EXAMPLES} examples; choose from those"
        )
    tasks = []
    for name, title, max_new_tokens, steps, quick, source in _SOURCES:
        train, held = split(source(), TRAIN_EXAMPLES, HELD_OUT_EXAMPLES, random.Random(f"{name}-{seed}"))
        tasks.append(DemoTask(name, title, train, held[:held_out], max_new_tokens, steps, quick))
    return tasks
