"""The T5 zoo's texts: six tasks from text to text, and the relatives of theirs that the base is pre-trained on.

The base learns to fill gaps in English text, and a part of each task's craft: it sorts and reverses digits where the
tasks have letters, forms pasts where the task has plurals, names numbers where the task adds them, translates words
where the task has phrases. So it has what an expert needs, and can do none of the tasks.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from neuron_methods.demo.words import ADJECTIVES, NOUNS, NUMBERS, POSSESSIVES, phrases

VOWELS = "aeiou"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
#: What stands for a gap in the text, and begins its filling.
SENTINELS = tuple(f"<extra_id_{index}>" for index in range(8))
#: Every character that a text may hold; others are left out.
CHARACTERS = LETTERS + "0123456789äöüß :.,-'"

Pair = tuple[str, str]


@dataclass(frozen=True)
class TextTask:
    """A task: `make` draws a prompt and its answer; `key` says which prompts must not be in two splits at once."""

    name: str
    make: Callable[[random.Random], Pair]


@cache
def reference_text() -> str:
    """The reference of the Python language, which Python itself carries: 700 kB of English prose, simplified."""
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics)).lower()
    return re.sub(r"\s+", " ", re.sub(rf"[^{re.escape(CHARACTERS)}]+", " ", text))


@cache
def words() -> tuple[str, ...]:
    """Words of 3 to 7 letters of that text, each that occurs twice at least, in alphabetic order."""
    counts: dict[str, int] = {}
    for word in re.findall(r"\b[a-z]{3,7}\b", reference_text()):
        counts[word] = counts.get(word, 0) + 1
    return tuple(sorted(word for word, count in counts.items() if count > 1 and set(word) & set("aeiouy")))


def made_up_word(rng: random.Random, low: int = 3, high: int = 7) -> str:
    """Consonants and vowels in turn; the end is often one that a rule of spelling looks at."""
    length = rng.randint(low, high)
    start = rng.randint(0, 1)
    letters = [rng.choice(VOWELS if (i + start) % 2 else "bcdfghjklmnprstvwz") for i in range(length)]
    if rng.random() < 0.5:
        end = rng.choice(["y", "x", "s", "ch", "sh", "fe", "ay", "o"])
        letters[-len(end) :] = end
    return "".join(letters)


def any_word(rng: random.Random) -> str:
    """A word of the language, or made up."""
    return rng.choice(words()) if rng.random() < 0.5 else made_up_word(rng)


def plural(word: str) -> str:
    """By the rules of spelling."""
    if word.endswith(("s", "x", "z", "ch", "sh", "o")):
        return word + "es"
    if word.endswith("y") and word[-2] not in VOWELS:
        return word[:-1] + "ies"
    if word.endswith("fe"):
        return word[:-2] + "ves"
    return word + "s"


def past(word: str) -> str:
    """By the rules of spelling."""
    if word.endswith("e"):
        return word + "d"
    if word.endswith("y") and word[-2] not in VOWELS:
        return word[:-1] + "ied"
    return word + "ed"


_BELOW_TWENTY = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """0 to 99 in English words."""
    if number < 20:
        return _BELOW_TWENTY[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f" {_BELOW_TWENTY[ones]}" if ones else "")


def _letters(rng: random.Random, low: int, high: int, alphabet: str) -> str:
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(low, high)))


def _sort(rng: random.Random) -> Pair:
    text = _letters(rng, 3, 6, LETTERS)
    return f"sort: {text}", "".join(sorted(text))


def _reverse(rng: random.Random) -> Pair:
    word = any_word(rng)
    return f"reverse: {word}", word[::-1]


def _plural(rng: random.Random) -> Pair:
    word = any_word(rng)
    return f"plural: {word}", plural(word)


def _sum(rng: random.Random) -> Pair:
    small = rng.choice([*range(1, 10), *range(10, 90, 10)])
    if rng.random() < 0.5:
        large = rng.randint(1, 99 - small)
        return f"sum: {in_words(large)} plus {in_words(small)}", in_words(large + small)
    large = rng.randint(small, 99)
    return f"sum: {in_words(large)} minus {in_words(small)}", in_words(large - small)


def _german(rng: random.Random) -> Pair:
    german, english = rng.choice(phrases(rng.choice(list(ADJECTIVES)), rng.choice(NOUNS)))
    return f"german: {german.lower()}", english


def _vowels(rng: random.Random) -> Pair:
    word = any_word(rng)
    return f"strip: {word}", "".join(c for c in word if c not in VOWELS)


TASKS = {
    task.name: task
    for task in (
        TextTask("sort", _sort),
        TextTask("reverse", _reverse),
        TextTask("plural", _plural),
        TextTask("sum", _sum),
        TextTask("german", _german),
        TextTask("strip", _vowels),
    )
}


def _gaps(rng: random.Random) -> Pair:
    text = reference_text()
    start = text.index(" ", rng.randrange(len(text) - 100)) + 1
    tokens = text[start : start + 26].split()[:-1] or ["the"]
    chosen = sorted(rng.sample(range(len(tokens)), max(1, len(tokens) // 3)))
    answer = "".join(f"{SENTINELS[i]} {tokens[place]} " for i, place in enumerate(chosen))
    for i, place in enumerate(chosen):
        tokens[place] = SENTINELS[i]
    return f"fill: {' '.join(tokens)}", answer.strip()


def _digits(rng: random.Random) -> str:
    return _letters(rng, 2, 6, "0123456789")


def _number(rng: random.Random) -> Pair:
    number = rng.randrange(100)
    return rng.choice(
        [
            (f"number: {in_words(number)}", str(number)),
            (f"words: {number}", in_words(number)),
            (f"next: {in_words(number)}", in_words((number + 1) % 100)),
        ]
    )


def _word_by_word(rng: random.Random) -> Pair:
    noun = rng.choice(NOUNS)
    adjective = rng.choice(list(ADJECTIVES))
    number = rng.choice(list(NUMBERS))
    possessive = rng.choice(list(POSSESSIVES))
    german, english = rng.choice(
        [
            (noun.singular, noun.english),
            (noun.plural, noun.english_plural),
            (f"{noun.article} {noun.singular}", f"the {noun.english}"),
            (f"{noun.plural}", f"{noun.english_plural}"),
            (adjective + rng.choice(["e", "er", "es"]), ADJECTIVES[adjective]),
            (number, NUMBERS[number]),
            (possessive, POSSESSIVES[possessive]),
        ]
    )
    return f"word: {german.lower()}", english


def _of_digits(rng: random.Random) -> Pair:
    digits = _digits(rng)
    return rng.choice([(f"order: {digits}", "".join(sorted(digits))), (f"mirror: {digits}", digits[::-1])])


def _of_words(rng: random.Random) -> Pair:
    word = any_word(rng)
    return rng.choice(
        [
            (f"past: {word}", past(word)),
            (f"copy: {word}", word),
            (f"last: {word}", word[-3:][::-1]),
            (f"vowels: {word}", "".join(c for c in word if c in VOWELS)),
        ]
    )


#: What the base is pre-trained on, each entry as often as the others.
PRETRAINING: tuple[Callable[[random.Random], Pair], ...] = (
    *(_gaps, _of_digits, _of_digits, _of_words, _of_words, _of_words, _number, _word_by_word),
)


def draw(task: TextTask, sizes: dict[str, int], seed: object) -> dict[str, list[Pair]]:
    """Pairs per split; no prompt is in two splits, or twice in one that is not for training.

    A task with too few different prompts has smaller validation and test splits: a third of its prompts at most is
    held out.
    """
    rng = random.Random(f"{task.name}/{seed}")
    drawn: dict[str, str] = {}
    wanted = sum(sizes.values())
    for _ in range(3 * wanted):
        prompt, answer = task.make(rng)
        drawn.setdefault(prompt, answer)
    pairs = list(drawn.items())
    held_out = [split for split in sizes if split != "train"]
    share = min(1.0, len(pairs) / 3 / sum(sizes[split] for split in held_out))
    found: dict[str, list[Pair]] = {}
    for split in held_out:
        count = int(sizes[split] * share)
        found[split], pairs = pairs[:count], pairs[count:]
    found["train"] = pairs[: sizes["train"]]
    return found
