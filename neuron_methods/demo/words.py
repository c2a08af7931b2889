"""The demo's word list: correct German, small enough to learn in a minute, regular enough to combine.

Nouns carry their article (which fixes gender and with it the adjective's ending) and both plurals; adjectives are
those whose inflected forms are simply stem + ending. `phrases` spells out every combination.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
    """One German noun and its English counterpart.

    Attributes:
        article: ``der``, ``die`` or ``das``.
        singular, plural: the German nominative forms.
        english, english_plural: the English forms.
    """

    article: str
    singular: str
    plural: str
    english: str
    english_plural: str


NOUNS = tuple(
    Noun(*line.split())
    for line in """
    der Hund Hunde dog dogs
    der Vogel Vögel bird birds
    der Baum Bäume tree trees
    der Tisch Tische table tables
    der Stuhl Stühle chair chairs
    der Garten Gärten garden gardens
    der Apfel Äpfel apple apples
    der Schuh Schuhe shoe shoes
    der Brief Briefe letter letters
    der Schlüssel Schlüssel key keys
    die Katze Katzen cat cats
    die Kuh Kühe cow cows
    die Blume Blumen flower flowers
    die Lampe Lampen lamp lamps
    die Tür Türen door doors
    die Brücke Brücken bridge bridges
    die Tasse Tassen cup cups
    die Stadt Städte city cities
    das Haus Häuser house houses
    das Buch Bücher book books
    das Auto Autos car cars
    das Boot Boote boat boats
    das Pferd Pferde horse horses
    das Fenster Fenster window windows
    das Bild Bilder picture pictures
    das Hemd Hemden shirt shirts
    """.strip().splitlines()
)

ADJECTIVES = {
    "alt": "old",
    "neu": "new",
    "klein": "small",
    "groß": "big",
    "schön": "beautiful",
    "hässlich": "ugly",
    "billig": "cheap",
    "rot": "red",
    "grün": "green",
    "blau": "blue",
    "gelb": "yellow",
    "braun": "brown",
    "schwarz": "black",
    "weiß": "white",
}

NUMBERS = {
    "zwei": "two",
    "drei": "three",
    "vier": "four",
    "fünf": "five",
    "sechs": "six",
    "sieben": "seven",
    "acht": "eight",
    "neun": "nine",
    "zehn": "ten",
    "elf": "eleven",
    "zwölf": "twelve",
}

POSSESSIVES = {"mein": "my", "sein": "his", "unser": "our"}

#: Nominative endings of an adjective after a possessive, which itself shows no gender but the feminine.
_MIXED_ENDINGS = {"der": "er", "die": "e", "das": "es"}


def phrases(adjective: str, noun: Noun) -> list[tuple[str, str]]:
    """Form all phrases with this adjective and noun, as (German, English), in the nominative.

    Definite article (``der alte Hund``), possessives (``mein alter Hund``) and numbers (``drei alte Hunde``).
    """
    meaning = ADJECTIVES[adjective]
    pairs = [(f"{noun.article} {adjective}e {noun.singular}", f"the {meaning} {noun.english}")]
    for possessive, owner in POSSESSIVES.items():
        german = possessive + ("e" if noun.article == "die" else "")
        pairs.append(
            (
                f"{german} {adjective}{_MIXED_ENDINGS[noun.article]} {noun.singular}",
                f"{owner} {meaning} {noun.english}",
            )
        )
    for number, count in NUMBERS.items():
        pairs.append((f"{number} {adjective}e {noun.plural}", f"{count} {meaning} {noun.english_plural}"))
    return pairs
