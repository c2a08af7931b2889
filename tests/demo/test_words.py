"""The German is right: spot checks of every ending, and rules that hold for all of it."""

import itertools

from neuron_methods.demo.words import ADJECTIVES, NOUNS, NUMBERS, POSSESSIVES, phrases

BY_NAME = {noun.singular: noun for noun in NOUNS}


def test_endings_follow_gender_and_number() -> None:
    for noun, adjective, expected in [
        (
            "Hund",
            "alt",
            {"der alte Hund": "the old dog", "mein alter Hund": "my old dog", "drei alte Hunde": "three old dogs"},
        ),
        (
            "Stadt",
            "groß",
            {
                "die große Stadt": "the big city",
                "unsere große Stadt": "our big city",
                "elf große Städte": "eleven big cities",
            },
        ),
        (
            "Haus",
            "rot",
            {
                "das rote Haus": "the red house",
                "sein rotes Haus": "his red house",
                "zwei rote Häuser": "two red houses",
            },
        ),
    ]:
        found = dict(phrases(adjective, BY_NAME[noun]))
        assert len(found) == 1 + len(POSSESSIVES) + len(NUMBERS)
        assert expected.items() <= found.items()


def test_articles_fit_the_words() -> None:
    assert {noun.article for noun in NOUNS} == {"der", "die", "das"}
    assert all(noun.singular[0].isupper() and noun.plural[0].isupper() for noun in NOUNS)
    assert all(noun.english_plural != noun.english for noun in NOUNS)
    # Feminine nouns on -e take -n in the plural, without exception.
    assert all(n.plural == n.singular + "n" for n in NOUNS if n.article == "die" and n.singular.endswith("e"))


def test_no_german_phrase_has_two_translations_and_no_word_two_meanings() -> None:
    every = [pair for adjective, noun in itertools.product(ADJECTIVES, NOUNS) for pair in phrases(adjective, noun)]
    assert len(dict(every)) == len(every)
    for words in (ADJECTIVES, NUMBERS, POSSESSIVES):
        assert len(set(words.values())) == len(words)
    assert len({noun.english for noun in NOUNS}) == len(NOUNS)
