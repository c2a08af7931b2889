"""Data that nobody means: pipes for files, patterns for paths, lines and pictures that fill the memory, names that
a terminal would obey. One line each, and no network."""

from __future__ import annotations

import gzip
import json
import os
import socket
from pathlib import Path

import pytest

from neuron_methods.data.folders import open_table
from neuron_methods.data.images import MOST_PIXELS, read_image
from neuron_methods.data.sources import MOST_TEXT, SourceReader, parse_source
from neuron_methods.evaluation.examples import read_examples
from neuron_methods.evaluation.task_file import load_tasks
from neuron_methods.evaluation.tuning.trace import Trace
from neuron_methods.support.errors import UserError

ROW = json.dumps({"text": "one"}) + "\n"
NAMES = [
    "a[1]",
    "a*",
    "?",
    "a::b",
    "hf:x",
    "a,b{c,d}",
    "a b",
    "it's",
    'a"b',
    "a#b",
    "-x",
    "ünï",
    "$HOME",
    "%s",
    "~",
    "a\nb",
]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """In a directory of its own, with no network to reach."""

    def refused(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


def read(source: str, *columns: str) -> list[tuple]:
    return [s.values for s in SourceReader(parse_source(source), columns or ("text",)).samples(0, 0)]


def line_of(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        read(*arguments)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_taken_letter_by_letter(name):
    os.makedirs(f"{name}.d")
    for place in (Path(f"{name}.jsonl"), Path(f"{name}.d", "train.jsonl")):
        place.write_text(ROW)
    for tail in ("", ":text", ":train:text"):
        assert read(f"a={name}.jsonl{tail}") == read(f"a={name}.d{tail}") == [("one",)]
    task = {"name": "t", "kind": "perplexity", "data": f"{name}.jsonl"}
    Path("tasks.yml").write_text(json.dumps({"tasks": [task]}))
    assert [s.values for s in read_examples(load_tasks("tasks.yml")[0]).samples] == [("one",)]


@pytest.mark.parametrize("name", NAMES)
def test_images_may_lie_anywhere(name):
    from PIL import Image

    for label in ("cat", "dog"):
        Path(name, label).mkdir(parents=True)
        Image.new("RGB", (2, 3)).save(Path(name, label, f"{name}.png"))
    rows = list(open_table(Path(name), None).rows())
    assert [row["label"] for row in rows] == [0, 1]
    assert read_image(rows[1]["image"]["path"], "").size == (2, 3)


@pytest.mark.parametrize(
    "source",
    [
        *("*.jsonl", "[a]*", "{a,b}.jsonl", "hf://datasets/a/b.jsonl", "http://a.b/c.jsonl", "a.jsonl::http://a.b/c"),
        *("./no/data:train", "~nobody/x:train", "/no/where:train", "../no.csv", "json:train", "a\0b", "x" * 5000),
    ],
)
def test_what_is_not_there_is_no_pattern_and_no_address(source):
    assert line_of(f"a={source}").isprintable()


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "txt", "parquet", "jsonl.gz"])
def test_what_is_no_regular_file_is_not_waited_for(ending):
    os.mkfifo(f"pipe.{ending}")
    os.symlink("/dev/zero", f"device.{ending}")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"socket.{ending}")
        for name in ("pipe", "device", "socket"):
            assert f"{name}.{ending}: " in line_of(f"a={name}.{ending}")
    os.mkdir("folder")
    os.mkfifo("folder/train.jsonl")
    assert "train.jsonl: no regular file" in line_of("a=folder")


@pytest.mark.parametrize(
    ("name", "before", "filling", "message"),
    [
        ("a.jsonl.gz", b'{"text": "', b"x", "line 1: longer than 67.1 MB"),
        ("a.txt.gz", b"", b"x", "line 1: longer than 67.1 MB"),
        ("a.csv.gz", b'text\n"', b"x" * 1023 + b"\n", "field larger than field limit"),
        ("a.json.gz", b"[", b" ", "longer than|larger than 268.4 MB"),
        ("a.parquet.gz", b"PAR1", b"\0", "unpacks to more than 268.4 MB"),
    ],
)
def test_what_unpacks_without_end_is_left_before_it_fills_the_memory(name, before, filling, message):
    import re
    import resource

    with gzip.open(name, "wb", 1) as file:
        file.write(before)
        for _ in range(260 if "MB" in message and "268" in message else 70):
            file.write(filling * ((1 << 20) // len(filling)))
    assert re.search(message, line_of(f"a={name}"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # kB


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x", "text": "y"}\n', "line 1: key 'text' appears twice"),
        ("a.jsonl", ROW + "[1]\n", "line 2: expected an object of columns, found"),
        ("a.jsonl", '{"text": ' + "[" * 500 + "]" * 500 + "}", "nested more than"),
        ("a.jsonl", '{"text": "\\ud800"}', "half of a surrogate pair"),
        ("a.jsonl", json.dumps({"text": "x" * (MOST_TEXT + 1)}), "cut it into several samples"),
        ("a.json", "{", "truncated, or not valid JSON"),
        ("a.csv", "text,text\na,b\n", "two columns are called 'text'"),
        ("a.csv", "text\na,b\n", "line 2: 2 cells, but 1 columns"),
        ("a.csv", 'text\n"a\n', "unexpected end of data"),
        ("a.csv", "text\n" + "1\n" * 10_000 + "x\n", "the rows before hold no text, found 'x'"),
        ("a.txt", b"\xff\xfe", "line 1: not UTF-8"),
        ("a.txt.gz", b"nothing", "Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "ended before"),
        ("a.parquet", b"PAR1" + b"\xff" * 50 + b"PAR1", "cannot be read as parquet"),
    ],
)
def test_damaged_files_are_named(name, content, message):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    line = line_of(f"a={name}")
    assert message in line and name in line and len(line) < 400


def test_numbers_of_a_csv_are_numbers_where_all_of_a_column_are():
    Path("a.csv").write_text('text,n,x,b,nan\n007,1,.5,true,nan\n"a, b",,1e3,False,1\n')
    assert sorted(read("a=a.csv", "text", "n")) == [("007", 1)]
    assert sorted(read("a=a.csv:x,b")) == [(0.5, True), (1000.0, False)]
    assert sorted(read("a=a.csv:nan")) == [("1",), ("nan",)]


def test_nothing_in_a_folder_is_run_and_its_readme_leads_nowhere():
    Path("folder").mkdir()
    Path("folder/folder.py").write_text("open('ran', 'w')")
    assert "no files in it that are read" in line_of("a=folder")
    Path("folder/train.jsonl").write_text(ROW)
    assert read("a=folder") == [("one",)]
    for place in ("hf://datasets/a/b", "../*", "/etc/*", "https://a.b/c"):
        Path("folder/README.md").write_text(f"---\nconfigs:\n- data_files: '{place}'\n---\n")
        assert "name nothing in the folder" in line_of("a=folder")
    assert not Path("ran").exists()


def test_a_name_in_metadata_leads_out_of_no_folder():
    from PIL import Image

    Path("secret").mkdir()
    Path("folder").mkdir()
    for place in ("secret/a.png", "folder/b.png"):
        Image.new("RGB", (2, 2)).save(place)
    for name, sound in [("b.png", True), ("../secret/a.png", False), (str(Path("secret/a.png").resolve()), False)]:
        Path("folder/metadata.jsonl").write_text(json.dumps({"file_name": name, "label": 1}) + "\n")
        if sound:
            assert read("a=folder", "image", "label")[0][1] == 1
        else:
            assert "is no image of the folder" in line_of("a=folder", "image")


def test_a_folder_that_holds_itself_ends():
    Path("folder/in").mkdir(parents=True)
    Path("folder/in/a.jsonl").write_text(ROW)
    os.symlink("..", "folder/in/again")
    assert read("a=folder") == [("one",)]


@pytest.mark.parametrize("size", [(MOST_PIXELS, 2), (30_000, 30_000), (40_000, 1)])
def test_large_images_are_refused_by_their_headers(size):
    import struct
    import zlib

    header = struct.pack(">II", *size) + b"\x08\x02\0\0\0"
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    Path("a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4)
    with pytest.raises(UserError, match=r"a\.png: .* pixels"):
        read_image("a.png", "a.png")


def test_images_start_no_programs_and_are_no_pipes():
    Path("a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    os.mkfifo("b.png")
    for name, message in [("a.png", "cannot be read as an image"), ("b.png", "no regular file")]:
        with pytest.raises(UserError, match=message):
            read_image(name, name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"point": {"x": 1}, "scores": {"a": NaN}, "weights": "merged", "seconds": 1}', "line 1: scores.a"),
        ('{"point": {"x": 1}, "scores": {}, "weights": "merged", "seconds": 1}', "line 1: scores: expected a"),
        ('{"point": {"y": 1}, "scores": {"a": 1}, "weights": "merged", "seconds": 1}', "line 1: point: expected x"),
        ('{"point": {"x": 1}, "scores": {"a": "1"}, "weights": "merged", "seconds": 1}', "line 1: scores.a"),
        ("[]", "line 1: "),
    ],
)
def test_a_trace_that_says_something_else(line, message):
    identity = {"set of parameters": ["x"], "set of tasks": [{"name": "a"}]}
    Trace(Path("out"), identity, False)
    Path("out/trace.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="trace.jsonl, " + message):
        Trace(Path("out"), identity, False)
