"""The T5 zoo's texts: six tasks from text to text, and the relatives of theirs that the base is pre-trained on.

The base learns to fill gaps in English, to copy phrases, to sort and reverse letters and digits, to name numbers, and
German words, plurals and opposites one by one; the tasks themselves it sees only on less than they ask for: two words
where they have three or more, one digit to add or take away where they have two. So it has what an expert needs, and
is weak on every task.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from neuron_methods.demo.words import ADJECTIVES, NOUNS, NUMBERS, POSSESSIVES, phrases

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
DIGITS = tuple("0123456789")
#: What stands for a gap in the text, and begins its filling.
SENTINELS = tuple(f"<extra_id_{index}>" for index in range(4))
#: How many words of the reference of the Python language the model knows.
REFERENCE_WORDS = 250

_BELOW_TWENTY = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_OPPOSITES = (
    *(("old", "new"), ("small", "big"), ("beautiful", "ugly"), ("cheap", "expensive"), ("black", "white")),
    *(("hot", "cold"), ("fast", "slow"), ("long", "short"), ("rich", "poor"), ("dark", "light"), ("wet", "dry")),
)
OPPOSITE = {one: other for pair in _OPPOSITES for one, other in (pair, pair[::-1])}
OWNERS = ("the", *POSSESSIVES.values(), "your", "their")
_ALL_ADJECTIVES = tuple(dict.fromkeys([*ADJECTIVES.values(), *OPPOSITE]))

Pair = tuple[str, str]


@dataclass(frozen=True)
class TextTask:
    """A task: `make` draws a prompt and its answer."""

    name: str
    make: Callable[[random.Random], Pair]


@cache
def reference_text() -> tuple[str, ...]:
    """The words of the Python language's reference, which Python itself carries: English prose, simplified."""
    from pydoc_data.topics import topics

    return tuple(re.findall(r"[a-z]{2,}", " ".join(topics[name] for name in sorted(topics)).lower()))


@cache
def reference_words() -> tuple[str, ...]:
    """The most frequent words of that text, in alphabetic order."""
    counts = Counter(reference_text())
    return tuple(sorted(sorted(counts, key=lambda word: (-counts[word], word))[:REFERENCE_WORDS]))


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word that prompts and answers are made of, but for the prompts' first ones."""
    german = [form for noun in NOUNS for form in (noun.article, noun.singular, noun.plural)]
    german += [f"{adjective}{ending}" for adjective in ADJECTIVES for ending in ("e", "er", "es")]
    german += [f"{possessive}{ending}" for possessive in POSSESSIVES for ending in ("", "e")]
    english = [form for noun in NOUNS for form in (noun.english, noun.english_plural)]
    words = [*LETTERS, *DIGITS, *_BELOW_TWENTY, *_TENS, *NUMBERS, *NUMBERS.values(), *german, *english, *OWNERS]
    words += [*ADJECTIVES.values(), *OPPOSITE, "plus", "minus", *reference_words()]
    return tuple(dict.fromkeys(word.lower() for word in words))


def in_words(number: int) -> str:
    """0 to 99 in English words."""
    if number < 20:
        return _BELOW_TWENTY[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f" {_BELOW_TWENTY[ones]}" if ones else "")


def _sort(rng: random.Random) -> Pair:
    numbers = [rng.randrange(20) for _ in range(3)]
    return f"sort: {' '.join(map(in_words, numbers))}", " ".join(map(in_words, sorted(numbers)))


def _thing(rng: random.Random, adjectives: tuple[str, ...]) -> tuple[str, str, str]:
    """Whose or how many, of what kind, and what; always the plural where it is a number."""
    noun = rng.choice(NOUNS)
    adjective = rng.choice(adjectives)
    if rng.random() < 0.5:
        return rng.choice(tuple(NUMBERS.values())), adjective, noun.english_plural
    return rng.choice(OWNERS), adjective, noun.english


def _reverse(rng: random.Random) -> Pair:
    words = _thing(rng, _ALL_ADJECTIVES)
    return f"reverse: {' '.join(words)}", " ".join(words[::-1])


def _plural(rng: random.Random) -> Pair:
    owner, adjective, noun = rng.choice(OWNERS), rng.choice(_ALL_ADJECTIVES), rng.choice(NOUNS)
    return f"plural: {owner} {adjective} {noun.english}", f"{owner} {adjective} {noun.english_plural}"


def _calculation(rng: random.Random, tens: tuple[int, int], ones: tuple[int, int]) -> Pair:
    """A sum or a difference without carrying: (whole, part) of its tens and of its ones."""
    whole, part = 10 * tens[0] + ones[0], 10 * tens[1] + ones[1]
    if rng.random() < 0.5:
        return f"sum: {in_words(whole - part)} plus {in_words(part)}", in_words(whole)
    return f"sum: {in_words(whole)} minus {in_words(part)}", in_words(whole - part)


def _ones(rng: random.Random, least: int = 0) -> tuple[int, int]:
    """A digit, and a part of it."""
    whole = rng.randint(least, 9)
    return whole, rng.randint(0, whole)


def _tens(rng: random.Random) -> tuple[int, int]:
    """Two or more tens, and two or more of them; what is left is none or two or more, so that no number is a teen."""
    whole = rng.randint(2, 9)
    return whole, rng.choice([*range(2, whole - 1), whole])


def _sum(rng: random.Random) -> Pair:
    return _calculation(rng, _tens(rng), _ones(rng, least=1))


def _german(rng: random.Random) -> Pair:
    german, english = rng.choice(phrases(rng.choice(list(ADJECTIVES)), rng.choice(NOUNS)))
    return f"german: {german.lower()}", english


def _opposite(rng: random.Random) -> Pair:
    first, adjective, noun = _thing(rng, tuple(OPPOSITE))
    return f"opposite: {first} {adjective} {noun}", f"{first} {OPPOSITE[adjective]} {noun}"


TASKS = {
    task.name: task
    for task in (
        TextTask("sort", _sort),
        TextTask("reverse", _reverse),
        TextTask("plural", _plural),
        TextTask("sum", _sum),
        TextTask("german", _german),
        TextTask("opposite", _opposite),
    )
}


def _gaps(rng: random.Random) -> Pair:
    if rng.random() < 0.5:
        words, known = reference_text(), set(reference_words())
        start = rng.randrange(len(words) - 8)
        tokens = [word for word in words[start : start + 8] if word in known] or ["the"]
    else:
        tokens = [*_thing(rng, _ALL_ADJECTIVES)]
    place = rng.randrange(len(tokens))
    answer = f"{SENTINELS[0]} {tokens[place]}"
    tokens[place] = SENTINELS[0]
    return f"fill: {' '.join(tokens)}", answer


def _of_symbols(rng: random.Random) -> Pair:
    symbols = rng.choice([LETTERS, DIGITS, _BELOW_TWENTY[:10]])
    drawn = [rng.randrange(len(symbols)) for _ in range(rng.randint(2, 3))]
    text = " ".join(symbols[index] for index in drawn)
    return rng.choice(
        [
            (f"order: {text}", " ".join(symbols[index] for index in sorted(drawn))),
            (f"mirror: {text}", " ".join(symbols[index] for index in drawn[::-1])),
        ]
    )


def _copy(rng: random.Random) -> Pair:
    text = " ".join(_thing(rng, _ALL_ADJECTIVES)) if rng.random() < 0.7 else rng.choice(vocabulary())
    return f"copy: {text}", text


def _number(rng: random.Random) -> Pair:
    number = rng.randrange(100)
    digits = " ".join(str(number))
    return rng.choice(
        [
            (f"number: {in_words(number)}", digits),
            (f"words: {digits}", in_words(number)),
            (f"next: {in_words(number)}", in_words((number + 1) % 100)),
        ]
    )


def _one_word(rng: random.Random) -> Pair:
    noun = rng.choice(NOUNS)
    adjective = rng.choice(list(ADJECTIVES))
    german, count = rng.choice(list(NUMBERS.items()))
    possessive, owner = rng.choice(list(POSSESSIVES.items()))
    found = rng.choice(
        [
            (f"word: {noun.singular}", noun.english),
            (f"word: {noun.plural}", noun.english_plural),
            (f"word: {noun.article} {noun.singular}", f"the {noun.english}"),
            (f"word: {adjective}{rng.choice(['e', 'er', 'es'])}", ADJECTIVES[adjective]),
            (f"word: {german}", count),
            (f"word: {possessive}", owner),
            (f"many: {noun.english}", noun.english_plural),
            (f"unlike: {(one := rng.choice(list(OPPOSITE)))}", OPPOSITE[one]),
        ]
    )
    return found[0].lower(), found[1]


def _shorter(rng: random.Random) -> Pair:
    """The tasks themselves on less than they ask for: two words or numbers where they have three or more."""
    noun, adjective = rng.choice(NOUNS), rng.choice(list(ADJECTIVES))
    german, count = rng.choice(list(NUMBERS.items()))
    one, other = rng.sample(range(20), 2)
    words = _thing(rng, _ALL_ADJECTIVES)
    left_out = rng.randrange(3)
    two = [word for place, word in enumerate(words) if place != left_out]
    before = rng.choice([*OWNERS, *_ALL_ADJECTIVES])
    _, unlike, thing = _thing(rng, tuple(OPPOSITE))
    found = rng.choice(
        [
            (f"sort: {in_words(one)} {in_words(other)}", f"{in_words(min(one, other))} {in_words(max(one, other))}"),
            (f"reverse: {' '.join(two)}", " ".join(two[::-1])),
            (f"plural: {before} {noun.english}", f"{before} {noun.english_plural}"),
            rng.choice(
                [
                    (f"german: {adjective}e {noun.plural}", f"{ADJECTIVES[adjective]} {noun.english_plural}"),
                    (f"german: {german} {noun.plural}", f"{count} {noun.english_plural}"),
                    (f"german: {noun.article} {noun.singular}", f"the {noun.english}"),
                ]
            ),
            (f"opposite: {unlike} {thing}", f"{OPPOSITE[unlike]} {thing}"),
        ]
    )
    return found[0].lower(), found[1]


def _smaller(rng: random.Random) -> Pair:
    """Sums with one digit to add or take away: of ones, of tens, or the ones of a larger number."""
    tens = _tens(rng)
    return rng.choice(
        [
            _calculation(rng, (0, 0), _ones(rng)),
            _calculation(rng, tens, (0, 0)),
            _calculation(rng, (tens[0], 0), _ones(rng)),
        ]
    )


#: What the base is pre-trained on, each entry as often as the others.
PRETRAINING: tuple[Callable[[random.Random], Pair], ...] = (
    *(_gaps, _copy, _number, _one_word, _of_symbols, _of_symbols, _shorter, _shorter, _smaller, _smaller),
)

#: First words of prompts.
PREFIXES = (
    *(f"{name}:" for name in TASKS),
    *(f"{name}:" for name in ("fill", "order", "mirror", "copy", "number", "words", "next", "word", "many", "unlike")),
)


def draw(task: TextTask, sizes: dict[str, int], seed: object) -> dict[str, list[Pair]]:
    """Draw pairs per split; no prompt is there twice.

    A task with too few different prompts has smaller validation and test splits: half of its prompts at most is held
    out.
    """
    rng = random.Random(f"{task.name}/{seed}")
    drawn: dict[str, str] = {}
    wanted = sum(sizes.values())
    for _ in range(3 * wanted):
        prompt, answer = task.make(rng)
        drawn.setdefault(prompt, answer)
    pairs = list(drawn.items())
    held_out = [split for split in sizes if split != "train"]
    share = min(1.0, len(pairs) / 2 / sum(sizes[split] for split in held_out))
    found: dict[str, list[Pair]] = {}
    for split in held_out:
        count = int(sizes[split] * share)
        found[split], pairs = pairs[:count], pairs[count:]
    found["train"] = pairs[: sizes["train"]]
    return found
