"""A YAML as its author wrote it: lines, keys that appear twice, and the first problem in words."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from neuron_methods.support.errors import UserError
from neuron_methods.support.yaml_source import YamlPart, YamlSource

TEXT = """\
# experts
experts:
  - name: a
    data: {source: x,
           split: test}
  - name: b
    rate: 2
seed: 0
"""


class Expert(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    data: dict[str, str] = {}
    rate: float = Field(1.0, le=1.0)

    @field_validator("name")
    @classmethod
    def _no_blank(cls, name: str) -> str:
        if " " in name:
            raise ValueError("a name holds no blanks")
        return name


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid")
    experts: list[Expert]
    seed: int | None = None


def parse(text: str) -> YamlSource:
    return YamlSource.parse(text, "file.yml", "the key experts")


def test_content_and_lines():
    source = parse(TEXT)
    assert source.content["experts"][0]["data"] == {"source": "x", "split": "test"}
    lines = {
        (): 2,
        ("experts",): 2,
        ("experts", 0): 3,
        ("experts", 0, "data", "split"): 5,
        ("experts", 1, "rate"): 7,
        ("experts", 1, "missing", "deeper"): 6,
        ("experts", 7): 2,
        ("seed",): 8,
    }
    assert {location: source.line_of(location) for location in lines} == lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "file.yml, line 3, column 1: key 'a' appears twice"),
        ("- {x: 1, x: 2}\n", "file.yml, line 1, column 10: key 'x' appears twice"),
        ("a: [1\nb: 2\n", "file.yml, line 2, column 2: not readable as YAML: "),
        ("", "file.yml: expected the key experts; it is empty"),
        ("- a\n", "file.yml: expected the key experts; found a list"),
        ("word", "file.yml: expected the key experts; found a str"),
        ("a: !!python/object:os.system {}\n", "not readable as YAML: could not determine a constructor"),
    ],
)
def test_what_is_no_document(text, message):
    with pytest.raises(UserError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_merged_keys_may_repeat_and_win():
    source = parse("base: &base {x: 1, y: 2}\nmore: &more {z: 3}\nchild: {<<: *base, x: 5}\n")
    assert source.content["child"] == {"x": 5, "y": 2}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rate: 2", "rate: 0.5", None),
        ("", "", "file.yml, line 7: experts[1].rate: Input should be less than or equal to 1, found 2"),
        ("rate:", "rte:", "file.yml, line 7: experts[1].rte: unknown key; did you mean 'rate'?"),
        ("seed:", "zzz:", "file.yml, line 8: zzz: unknown key (known: experts, seed)"),
        ("- name: b\n    ", "- ", "file.yml, line 6: experts[1].name: missing"),
        ("name: a", "name: a b", "file.yml, line 3: experts[0].name: a name holds no blanks, found 'a b'"),
    ],
)
def test_the_first_problem_of_a_document(old, new, message):
    source = parse(TEXT.replace(old, new))
    if message is None:
        assert source.validated(Document).experts[1].rate == 0.5
        return
    with pytest.raises(UserError) as caught:
        source.validated(Document)
    assert str(caught.value) == message


def test_a_misspelt_key_comes_before_the_one_that_is_missing_by_its_fault():
    with pytest.raises(UserError, match="nmae: unknown key; did you mean 'name'"):
        parse(TEXT.replace("- name: a", "- nmae: a")).validated(Document)


def test_errors_about_a_place():
    expert = YamlPart(parse(TEXT)).at("experts", 0, shown="expert 'a': ")
    data = expert.at("data", shown="data: ")
    assert str(expert.error("no such name", "name")) == "file.yml, line 3: expert 'a': no such name"
    assert str(data.error("wrong")) == "file.yml, line 4: expert 'a': data: wrong"
    data.check_keys({"source": 1}, ("source", "split"))
    with pytest.raises(UserError, match="line 5: expert 'a': data: unknown key 'split'; did you mean 'splits'"):
        data.check_keys({"split": 1}, ("source", "splits"))


def test_reading_a_file(tmp_path):
    (tmp_path / "good.yml").write_text(TEXT, encoding="utf-8")
    source = YamlSource.read(tmp_path / "good.yml", "experts")
    assert (source.name, source.text) == (str(tmp_path / "good.yml"), TEXT)
