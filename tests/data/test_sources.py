"""`NAME=SOURCE`, and reading samples through `datasets`."""

from __future__ import annotations

import gzip
import json

import pytest

from neuron_methods.data.sources import SHUFFLE_BUFFER, SourceReader, parse_source
from neuron_methods.support.errors import UserError
from tests.support import tiny


def read(text: str, *defaults: str, limit: int = 0, seed: int = 0) -> list[tuple[int, tuple]]:
    reader = SourceReader(parse_source(text), defaults or ("text",))
    return [(sample.row, sample.values) for sample in reader.samples(limit, seed)]


@pytest.fixture
def words(tmp_path):
    return tiny.write_jsonl(tmp_path / "words.jsonl", [{"text": f"t{i}", "other": f"o{i}"} for i in range(6)])


def test_hub_data_sets():
    source = parse_source("math=openai/gsm8k@main:train:question,answer")
    assert (source.name, source.location, source.local, source.config) == ("math", "openai/gsm8k", False, "main")
    assert (source.split, source.columns) == ("train", ("question", "answer"))
    assert parse_source("a=squad:validation").columns == ()
    assert source.shown == "openai/gsm8k@main:train:question,answer"


def test_local_files_with_split_and_columns(words):
    assert parse_source(f"a={words}").columns == ()
    assert parse_source(f"a={words}:other").columns == ("other",)
    source = parse_source(f"a={words}:train:text,other")
    assert (source.split, source.columns) == ("train", ("text", "other"))
    assert source.shown == "words.jsonl:train:text,other"


def test_a_path_may_contain_a_colon(tmp_path):
    path = tiny.write_jsonl(tmp_path / "a:b.jsonl", [{"text": "x"}])
    assert read(f"a={path}") == [(0, ("x",))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data.jsonl", "expected NAME="),
        ("a=", "expected NAME="),
        ("a/b=data.jsonl", "NAME is of letters"),
        ("a=none.jsonl", "there is no file or folder 'none.jsonl'"),
        ("a=/none/words", "there is no file or folder"),
        ("a=org/data", "a data set of the hub needs a split: a=org/data:train"),
        ("a=org/data:train:x,y,z", "one column or two"),
        ("a=org/data:train:x:y", "expected NAME="),
    ],
)
def test_mistakes_in_the_argument(text, message):
    with pytest.raises(UserError, match=message):
        parse_source(text)


def test_every_local_format(tmp_path):
    rows = [{"text": "one"}, {"text": "two"}]
    files = {
        name: tmp_path / name for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.parquet", "a.txt.gz")
    }
    tiny.write_jsonl(files["a.jsonl"], rows)
    files["a.json"].write_text(json.dumps(rows))
    files["a.csv"].write_text("text,n\none,1\ntwo,2\n")
    files["a.tsv"].write_text("text\tn\none\t1\ntwo\t2\n")
    files["a.txt"].write_text("one\n\ntwo\n")
    with gzip.open(files["a.txt.gz"], "wt") as file:
        file.write("one\n\ntwo\n")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), files["a.parquet"])
    for name, path in files.items():
        assert sorted(values for _, (values,) in read(f"a={path}")) == ["one", "two"], name


def test_a_folder_with_files_of_a_data_set(tmp_path):
    tiny.write_jsonl(tmp_path / "train.jsonl", [{"text": "x"}])
    tiny.write_jsonl(tmp_path / "test.jsonl", [{"text": "y"}])
    assert read(f"a={tmp_path}") == [(0, ("x",))]
    assert read(f"a={tmp_path}:test:text") == [(0, ("y",))]


def test_an_image_folder_has_its_sub_folders_as_labels(tmp_path):
    images = tiny.write_images(tmp_path / "images", 2)
    reader = SourceReader(parse_source(f"a={images}"), ("image", "label"))
    assert reader.columns == ("image", "label")
    assert reader.labels == ["cat", "dog", "tree"]
    samples = list(reader.samples(0, 0))
    assert sorted(sample.values[1] for sample in samples) == [0, 0, 1, 1, 2, 2]
    assert {"/".join(sample.values[0]["path"].split("/")[-2:]) for sample in samples} == {
        f"{label}/{i}.png" for label in ("cat", "dog", "tree") for i in (0, 1)
    }


def test_order_depends_on_the_seed_alone_and_rows_name_the_rows(words):
    first, again, other = read(f"a={words}", seed=1), read(f"a={words}", seed=1), read(f"a={words}", seed=2)
    assert first == again != other
    assert sorted(first) == sorted(other) == [(i, (f"t{i}",)) for i in range(6)]
    assert read(f"a={words}", seed=1, limit=2) == first[:2]


def test_a_long_source_is_shuffled_as_it_comes_in(tmp_path):
    count = 3 * SHUFFLE_BUFFER
    path = tiny.write_jsonl(tmp_path / "long.jsonl", [{"text": str(i)} for i in range(count)])
    rows = [row for row, _ in read(f"a={path}")]
    assert sorted(rows) == list(range(count))
    assert rows != list(range(count))
    assert max(rows[:10]) < SHUFFLE_BUFFER + 10  # no more is held back than the buffer


def test_empty_values_are_left_out(tmp_path):
    rows = [{"text": "x", "label": None}, {"text": " ", "label": "a"}, {"text": None, "label": "a"}]
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [*rows, {"text": "y", "label": "a"}])
    assert read(f"a={path}:text,label") == [(3, ("y", "a"))]


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n', ":question", "data source 'a' .*no column 'question' .there are: text"),
        ("a.jsonl", '{"text": "x"}\n', ":test:text", "cannot open it.*test"),
        ("a.jsonl", '{"body": "x"}\n', "", "no column 'text'"),
        ("a.jsonl", "", "", "it is empty"),
        ("a.txt", "", "", "it is empty"),
        ("a.csv", "", ":text", "data source 'a'"),
        ("a.jsonl", '{"text": tru\n', "", "data source 'a' .*cannot"),
        ("a.parquet", "nonsense", "", "data source 'a' .*cannot"),
        ("a.xyz", "text", "", "the kind of this file is unknown"),
    ],
)
def test_bad_files(name, content, fields, message, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read(f"a={path}{fields}")


def test_a_data_set_of_the_hub_that_cannot_be_reached(monkeypatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data source 'a' \(nobody/nothing:train\): cannot open it: ConnectionError"):
        read("a=nobody/nothing:train")


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="cannot open it"):
        read(f"a={tmp_path}")


def test_what_cannot_be_read_on(tmp_path):
    good = "".join(json.dumps({"text": "x" * 50}) + "\n" for _ in range(1000))
    path = tmp_path / "a.jsonl"
    path.write_text(good + '{"text": tru\n')
    with pytest.raises(UserError, match=r"cannot (read on at row|open it)"):
        read(f"a={path}")


def test_a_source_is_shown_without_its_directories(words):
    reader = SourceReader(parse_source(f"a={words}"), ("text",))
    assert str(words.parent) not in reader.label
    assert parse_source(f"a={words}").fingerprint == parse_source(f"b={words}").fingerprint
    assert parse_source(f"a={words}").fingerprint != parse_source(f"a={words}:text").fingerprint
