"""What is said of papers, held to one list of sources; and what is ours, told alike on cards and in the documents.

A sentence that says what a paper, or the code beside it, does or says carries a source in brackets, (NAME, PLACE), both
from neuron_methods/support/sources.py: (Fang et al., section 3). Every number of a paper is one of that list.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from mergekit.merge_methods import registry

import neuron_methods
from neuron_methods.cli.groups import groups
from neuron_methods.routing.own_choices import OURS
from neuron_methods.support import sources
from neuron_methods.support.sources import SOURCES, Source, ours

ROOT = Path(__file__).parents[1]
LIST = ROOT / "neuron_methods/support/sources.py"
DOCUMENTS = [p for kind in ("*.md", "recipes/**/*.*", "examples/*/*.md", "tests/**/*.md") for p in ROOT.glob(kind)]
CODE = [path for room in ("neuron_methods", "tests", "examples") for path in sorted((ROOT / room).rglob("*.py"))]
#: Where users read: what stands here is attributed with a source, or not at all.
SHOWN = (*sorted((ROOT / "neuron_methods").rglob("*.py")), *DOCUMENTS)
#: Words by which something is said of a paper, its code, or who wrote them.
ATTRIBUTES = re.compile(r"\bthe papers?\b|\bpaper's|\bpapers'|\bpublished\b|\bauthors\b|\breviewers?\b", re.I)
NUMBERS = re.compile(r"(?:arXiv:|arxiv\.org/abs/)(\d{4}\.\d{4,5})|\b(\d{4}\.[a-z-]*acl\.\d+)")
#: Sources that modules import by name.
CONSTANTS = {name: value for name, value in vars(sources).items() if isinstance(value, Source)}
_PLACES = {f"{source.name}, {place}" for source in SOURCES for place in source.places}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of what a file says: strings and comments of code, comments of YAML, paragraphs of Markdown.

    Neighbouring lines of comments, and neighbouring strings, are one text.
    """
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        found: list[tuple[int, int, str]] = []
        for token in tokenize.generate_tokens(io.StringIO(content).readline):
            if token.type in (tokenize.STRING, tokenize.COMMENT):
                text = re.sub(r'^[rbuf]*("""|"|\'\'\'|\')|("""|"|\'\'\'|\')$', "", token.string).lstrip("#: ")
                if found and token.start[0] - found[-1][1] <= 1:
                    start, _, before = found.pop()
                    text, line = f"{before}\n{text}" if token.type == tokenize.COMMENT else before + text, start
                else:
                    line = token.start[0]
                found.append((line, token.end[0], text))
        yield from ((line, text) for line, _, text in found)
        return
    if path.suffix == ".yml":
        content = re.sub(r"^(?!.*#).*$|^[^#\n]*#", "", content, flags=re.M)
    for match in re.finditer(r"(?:.+\n?)+", content):
        yield content.count("\n", 0, match.start()) + 1, match[0]


def sentences(text: str) -> list[str]:
    """Its sentences, items of lists and rows of tables, each in one line."""
    parts = re.split(r"\n\s*\n|\n\s*(?=[-|*] |\d\. |\|)", text)
    lines = (" ".join(part.split()) for part in parts)
    return [one for line in lines for one in re.split(r"(?<=[.!?;])(?<!et al\.) +(?![^(]*\))", line) if one]


def cited(sentence: str) -> list[str]:
    """The sources that stand in its brackets, as NAME, PLACE."""
    found = []
    for bracket in re.findall(r"\(([^()]*)\)", sentence):
        for source in bracket.split("; "):
            name = next((s.name for s in SOURCES if source.startswith(f"{s.name}, ")), None)
            if name is not None:
                places = re.split(r", | and ", source.removeprefix(f"{name}, "))
                found += [f"{name}, {place}" for place in places if f"{name}, {place}" in _PLACES]
    return found


def problems(path: Path) -> Iterator[str]:
    for line, text in texts(path):
        for sentence in sentences(text):
            if ATTRIBUTES.search(sentence) and not cited(sentence):
                yield f"{path.relative_to(ROOT)}, from line {line}: {sentence}"


def test_what_is_said_of_a_paper_has_a_source():
    found = [problem for path in SHOWN if path != LIST for problem in problems(path)]
    advice = "name the source in brackets, as (Fang et al., section 3), by support/sources.py, or call it ours"
    assert not found, f"{advice}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The paper does so.", 1),
        ("The published code\ndoes so (Fang et al., merge.sh). It is fast.", 0),
        ("It is fast (Fang et al., merge.sh). The paper does so.", 1),
        ("As the authors do (Fang et al., section 99).", 1),
        ("So they say (Gu et al., abstract; Liang, abstract and reviews), the paper's.", 0),
        ("- the paper's\n- ours (Liang, abstract)", 1),
        ("| a | the paper's |\n| b | ours (Liang, abstract) |", 1),
        ("On plain paper; the papers' own (Liang, abstract).", 0),
    ],
)
def test_a_sentence_is_judged_by_itself(text, found):
    assert len([s for s in sentences(text) if ATTRIBUTES.search(s) and not cited(s)]) == found


def test_strings_comments_and_prose_are_all_read(tmp_path):
    code = '"""One, the paper\'s."""\n\nx = ("two "\n     "three")\n\n\n# four\n# five\ny = 1  # six\n'
    (tmp_path / "a.py").write_text(code)
    assert [text for _, text in texts(tmp_path / "a.py")] == ["One, the paper's.", "two three", "four\nfive\nsix"]
    (tmp_path / "a.yml").write_text("# one\n# two\nkey: 1  # three\nother: 2\n")
    assert " ".join(text for _, text in texts(tmp_path / "a.yml")).split() == ["one", "two", "three"]


def test_every_number_of_a_paper_is_of_the_list_and_every_source_is_used():
    used: set[str] = set()
    for path in (*CODE, *DOCUMENTS):
        if path not in (LIST, Path(__file__)):
            text = path.read_text(encoding="utf-8")
            found = {next(filter(None, groups)) for groups in NUMBERS.findall(text)}
            assert found <= {source.id for source in SOURCES}, path
            used |= found | {s.id for name, s in CONSTANTS.items() if re.search(rf"\b(?:sources\.)?{name}\b", text)}
    assert used == {source.id for source in SOURCES}


def test_every_place_of_a_source_is_named_somewhere():
    said = [sentence for path in SHOWN if path != LIST for _, text in texts(path) for sentence in sentences(text)]
    assert {one for sentence in said for one in cited(sentence)} == _PLACES


def test_own_choices_hold_by_the_values_of_a_merge():
    always, word, number = ours("a"), ours("b", trim="tensor"), ours("c", power=lambda p: p < 1, trim="model")
    assert always.holds({}) and not word.holds({}) and not word.holds({"trim": ["model", None, 0.5]})
    assert word.holds({"trim": ["model", "tensor"]})
    assert number.holds({"power": [1.0, 0.5], "trim": ["model"]})
    assert not number.holds({"power": [1.0, "auto", None], "trim": ["model"]})
    assert not number.holds({"power": [0.5], "trim": ["tensor"]})


def specs():
    neuron_methods.register()
    return [m.spec for m in registry.registered_methods() if type(m).__module__.startswith("neuron_methods")]


def test_every_method_says_what_is_ours_or_has_a_paper():
    for spec in specs():
        assert spec.ours, spec.name
        assert spec.reference_url == (spec.source.url if spec.source else None)
        assert spec.source is not None or spec.kin, f"{spec.name} is ours: which methods of others resemble it?"
        names = {parameter.name for parameter in spec.parameters}
        assert {name for own in spec.ours for name, _ in own.conditions} <= names


def flat(text: str) -> str:
    return " ".join(text.split())


def test_the_documents_tell_what_is_ours_as_the_cards_do():
    recipes = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    for spec in specs():
        section = flat(recipes.split(f"### `{spec.name}`\n")[1].split("\n## ")[0].split("\n### ")[0])
        for own in spec.ours:
            assert f"- {own.text}" in section, own.text
        for kin in spec.kin:
            assert f"- [{kin.source.line}]({kin.source.url}): {kin.shares}" in section, kin.shares
    routing = flat((ROOT / "examples/routing/README.md").read_text(encoding="utf-8"))
    for own in OURS:
        assert f"- {own.text}" in routing, own.text


def test_numbers_among_what_is_ours_are_the_defaults():
    defaults = {s.name: {parameter.name: parameter.default for parameter in s.parameters} for s in specs()}
    (threshold,) = [option.default for option in groups.params if option.name == "threshold"]
    told = {s.name: " ".join(choice.text for choice in s.ours) for s in specs()}
    assert f"a threshold of {threshold} on" in told["neuron_merge"]
    factors = ", ".join(f"{defaults['neuron_merge'][name]:g}" for name in ("in_group", "general"))
    assert f"{factors} and {defaults['neuron_merge']['out_group']:g} unless they are set" in told["neuron_merge"]
    assert f"{100 * defaults['neuro_merging']['density']:g} %, is the default here" in told["neuro_merging"]
