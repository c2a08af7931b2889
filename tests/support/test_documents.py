"""The door: whatever lies where a document should, one line names the file, what was found and what to do."""

from __future__ import annotations

import json
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from neuron_methods.support import documents
from neuron_methods.support.documents import (
    Foreign,
    Given,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_lines,
    read_object,
    read_text,
    validated,
)
from neuron_methods.support.errors import UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "groups {}: cannot be read (No such file or directory); check the path"),
        ('{"format": ', "groups {}: truncated, or not valid JSON; write it anew"),
        ("[1]", "groups {}: expected a JSON object, found a list; write it anew"),
        ("{}", "groups {}: not a file of the format 'f'; write it anew"),
        ('{"format": "f"}', "groups {}: version None, but this release reads version 2; write it anew"),
        ('{"format": "f", "version": 3}', "groups {}: version 3, but this release reads version 2; write it anew"),
    ],
)
def test_json_that_is_another(tmp_path, text, message):
    path = tmp_path / "file.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_json(path, "groups", format="f", version=2, again="write it anew")
    assert str(caught.value) == message.format(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe: no regular file"):
        read_bytes(tmp_path / "pipe")


def test_neither_devices_nor_sockets_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        with pytest.raises(UserError, match="socket: "):
            read_bytes("socket")
    with pytest.raises(UserError, match=r"/dev/zero: no regular file"):
        read_bytes("/dev/zero")


def test_a_link_stands_for_its_target(tmp_path):
    (tmp_path / "file").write_text("{}")
    (tmp_path / "link").symlink_to("file")
    assert read_object(tmp_path / "link") == {}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("none", "No such file or directory"),
        (".", "Is a directory"),
        ("a\0b", "embedded null byte"),
        ("loop", "Too many"),
    ],
)
def test_what_is_no_file(tmp_path, name, why):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=rf"groups .*: cannot be read \({why}.*\); check the path"):
        read_bytes(f"{tmp_path}/{name}", "groups")


def test_a_file_that_is_too_long_is_not_read(tmp_path):
    with (tmp_path / "long").open("wb") as file:
        file.truncate(documents.MOST_JSON + 1)
    with pytest.raises(UserError, match=r"long: 268.4 MB long, but no such file has more than 268.4 MB"):
        read_object(tmp_path / "long")


def test_text_is_utf_8_with_or_without_its_mark(tmp_path):
    (tmp_path / "bad").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bad: cannot be read \(not UTF-8\)"):
        read_text(tmp_path / "bad")
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbfa")
    assert read_text(tmp_path / "marked") == "a"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' appears twice in one object"),
        ("[" * 200 + "]" * 200, "nested more than 100 deep"),
        ("[" * 200_000, "nested more than 100 deep"),
        ("1" * 5000, "truncated, or not valid JSON"),
        (b"\xff{}", "truncated, or not valid JSON"),
        ("", "truncated, or not valid JSON"),
    ],
)
def test_json_that_nobody_means(text, problem):
    with pytest.raises(UserError) as caught:
        parse_json(text, "x.json", "save it again")
    assert str(caught.value) == f"x.json: {problem}; save it again"


@given(JSON)
def test_what_json_writes_is_read(content):
    assert json.dumps(parse_json(json.dumps(content), "x")) == json.dumps(content)


@given(st.text() | st.binary())
def test_any_text_is_json_or_one_line(text):
    try:
        parse_json(text, "x.json")
    except UserError as error:
        assert str(error).startswith("x.json: ")


def test_lines_are_named(tmp_path):
    (tmp_path / "f").write_text('{"a": 1}\n\n[2]\n{"a"')
    lines = read_lines(tmp_path / "f", "labels")
    assert [next(lines), next(lines)] == [
        (f"labels {tmp_path}/f, line 1", {"a": 1}),
        (f"labels {tmp_path}/f, line 3", [2]),
    ]
    with pytest.raises(UserError, match=r"f, line 4: truncated"):
        next(lines)


class Inner(Given):
    size: int
    ratio: float = 0.0


class Ours(Given):
    name: str
    parts: list[Inner] = Field(default_factory=list)


class Theirs(Foreign):
    alpha: int | None = None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({}, "name: missing"),
        ([], "Input should be a valid dictionary or instance of Ours, found a list"),
        ({"name": "a", "other": 1}, "other: unknown key"),
        ({"name": 3}, "name: Input should be a valid string, found 3"),
        ({"name": "a", "parts": [{"size": "3"}]}, "parts[0].size: Input should be a valid integer, found '3'"),
        (
            {"name": "a", "parts": [{"size": 1, "ratio": float("nan")}]},
            "parts[0].ratio: Input should be a finite",
        ),
        ({"name": "a", "parts": [{"size": True}]}, "parts[0].size: Input should be a valid integer, found True"),
        ({"name": 1.5, "\x1b[2J": 1}, "\\x1b[2J: unknown key"),
    ],
)
def test_what_does_not_fit_its_schema(content, problem):
    with pytest.raises(UserError) as caught:
        validated(content, Ours, "p.json")
    assert str(caught.value).startswith(f"p.json: {problem}")
    assert str(caught.value).endswith("; make it again")


def test_a_foreign_format_may_hold_more():
    assert validated({"alpha": 0, "rest": [1]}, Theirs, "c.json").alpha == 0
    with pytest.raises(UserError, match=r"c.json: alpha: Input should be a valid integer, found 'x{78}…; make"):
        validated({"alpha": "x" * 500}, Theirs, "c.json")


def bomb(levels: int, merged: bool = False) -> str:
    lines = ["a0: &a0 {k: v}" if merged else "a0: &a0 [x, x]"]
    for level in range(1, levels):
        alias = f"*a{level - 1}"
        value = f"{{<<: [{alias}, {alias}]}}" if merged else f"[{alias}, {alias}]"
        lines.append(f"a{level}: &a{level} {value}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (bomb(40), "x.yml, line 16: stands for more than 100000 values"),
        (bomb(40, merged=True), "x.yml, line 16: stands for more than 100000 values"),
        ("a: &a [*a]", "x.yml, line 1: an alias refers to what it stands in"),
        ("a: " + "[" * 150 + "]" * 150, "x.yml, line 1: nested more than 100 deep"),
        ("[" * 50_000, "x.yml: nested more than 100 deep"),
        ("a: 2020-13-45", "x.yml: not readable as YAML: month must be in 1..12; put it in quotes"),
        ("? [a]\n: b", "x.yml, line 1, column 3: not readable as YAML: found unhashable key"),
        (
            "a: !!python/object/apply:os.system [ls]",
            "x.yml, line 1, column 4: not readable as YAML: could not",
        ),
        ("a: \x00", "x.yml: not readable as YAML: "),
        ("x" * (2 << 20), "x.yml: 2.1 MB of YAML; no more than 1.0 MB is read"),
        ("a: 0x" + "f" * 5000, "x.yml, line 1, column 4: not readable as YAML: a whole number of 20000 bits"),
        ("a: 0b" + "1" * 9000, "x.yml, line 1, column 4: not readable as YAML: a whole number of 9000 bits"),
        ("a: 1\na: 2", "x.yml, line 2, column 1: key 'a' appears twice"),
    ],
)
def test_yaml_that_nobody_means(text, problem):
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "x.yml")
    assert str(caught.value).startswith(problem)
    assert "\n" not in str(caught.value)


def test_aliases_are_followed():
    assert parse_yaml("a: &a {b: 1}\nc: {<<: *a, d: *a}", "x") == {"a": {"b": 1}, "c": {"b": 1, "d": {"b": 1}}}


@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!<>|?#'\"\n \t0123456789.,~_%@\x00\u2028é"), max_size=60))
def test_any_text_is_yaml_or_one_line(text):
    try:
        parse_yaml(text, "x.yml")
    except UserError as error:
        assert str(error).startswith("x.yml")
        assert "\n" not in str(error)
