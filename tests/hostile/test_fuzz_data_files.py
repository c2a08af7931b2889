"""Every reader of data, tasks, routes, searches and scores on files that were changed at random: read, or one line.

`MERGEKIT_NEURON_HOSTILE=2000` tries so many changes of each format.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from neuron_methods.data.files import label_names, rows_of
from neuron_methods.data.folders import open_table
from neuron_methods.data.images import read_image
from neuron_methods.data.sources import parse_source
from neuron_methods.evaluation.task_file import load_tasks
from neuron_methods.evaluation.tuning.search import make_strategy, parse_search
from neuron_methods.evaluation.tuning.trace import Trace
from neuron_methods.neurons.profile_file import NeuronProfile, ProfileInfo
from neuron_methods.profiling.batch_files import read_answers
from neuron_methods.profiling.grouping import import_labels
from neuron_methods.profiling.journal import Journal
from neuron_methods.routing.route_yaml import read_config
from neuron_methods.routing.routed_files import RoutedConfig, RouterShape
from neuron_methods.routing.router import Router
from neuron_methods.sharing.card import parsed_card, read_evaluation
from neuron_methods.sharing.licences import metadata_of
from neuron_methods.support.errors import UserError
from tests.support import mutations

EXAMPLES = int(os.environ.get("MERGEKIT_NEURON_HOSTILE", "12"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES < 100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SHAPE = {"layers": [0, 1], "pooling": "mean", "width": 8, "hidden": 4, "axes": 2, "top_k": 1, "temperature": 1.0}
SHAPE |= {"ood_score": "combined", "ood_threshold": -1.0}
ROUTED = {"format": "mergekit-neuron-routed", "format_version": 1, "base_model": "../base", "router": SHAPE}
ROUTED |= {"experts": [{"name": n, "redundant_layers": ["model.layers.1"]} for n in "ab"], "seed": 0, "report": {}}
TASKS = {
    "tasks": [
        {
            "name": "sums",
            "kind": "generation",
            "data": {"source": "sums.jsonl", "split": "[:2]", "validation_split": "[2:]"},
            "columns": {"input": "prompt", "target": "answer"},
            "metric": "exact_match",
            "max_new_tokens": 8,
            "stop": ".",
            "limit": 3,
            "batch_size": 2,
        },
        {"name": "own", "kind": "lm-eval", "task": "x", "num_fewshot": 1, "metric": "acc"},
        {"name": "cats", "kind": "image-classification", "data": "sums.jsonl", "labels": ["cat", "dog"]},
    ]
}
ROUTE = {
    "base_model": "base",
    "experts": [{"name": n, "adapter": n, "data": {"source": "sums.jsonl", "columns": {"text": "t"}}} for n in "ab"],
    "router": {"layer": [0, 1], "temperature": 1.0, "samples": 10, "seed": 1, "learning_rate": 0.01},
    "enhancement": {"tolerance": 0.1, "enabled": True},
    "batch_size": 2,
    "text": {"max_length": 8, "separator": " "},
}
SCORES = {"format": "mergekit-neuron-evaluation", "version": 1, "model": "m", "mean": 0.5}
SCORES |= {"tasks": [{"name": "a", "kind": "generation", "metric": "exact_match", "score": 0.5, "low": 0.4, "high": 1}]}
IDENTITY = {"set of parameters": ["x"], "set of tasks": [{"name": "a"}]}
TUNE = {"format": "mergekit-neuron-tune", "version": 1, "search": IDENTITY, "best": {"point": {"x": 1}}}
TRIAL = {"point": {"x": 1.5}, "scores": {"a": 0.5}, "weights": "merged", "seconds": 1.0}
CARD = {"license": "mit", "base_model": ["a/b"], "tags": ["x"], "model-index": [{"name": "m", "results": []}]}
LABELS = {"layers.0": ["math", "code"], "1": {"0": "math"}}
FOLDER = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "train.jsonl"}]}]}

PROFILE = NeuronProfile(ProfileInfo("m", "f", "llama", {"layers.0": 4, "layers.1": 4}, [], {}), {})


def card_of(content: Any) -> bytes:
    return b"---\n" + yaml.safe_dump(content).encode() + b"---\n# A card\n"


def as_json(content: Any) -> bytes:
    return json.dumps(content).encode()


def as_yaml(content: Any) -> bytes:
    return yaml.safe_dump(content).encode()


def as_lines(content: Any) -> bytes:
    return b"".join(as_json(row) + b"\n" for row in (content if isinstance(content, list) else [content]))


def as_csv(content: Any) -> bytes:
    rows = [row if isinstance(row, list) else [row] for row in (content if isinstance(content, list) else [content])]
    return "".join(",".join(map(str, row)) + "\n" for row in rows).encode()


def picture(kind: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (1, 2, 3)).save(buffer, kind)
    return buffer.getvalue()


def table() -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    content = pyarrow.table({"text": ["one", "two"], "label": [0, 1]})
    pyarrow.parquet.write_table(content.replace_schema_metadata({"huggingface": json.dumps(names)}), buffer)
    return buffer.getvalue()


def trained_router() -> bytes:
    state = Router(RouterShape(**SHAPE), 2).state_dict()
    return save({key: value.contiguous() for key, value in state.items()}, metadata={"format": "pt"})


def read_rows(path: Path) -> None:
    label_names(path)
    list(rows_of(path))


def resumed(path: Path) -> None:
    if path.name != "tune.json":
        (path.parent / "tune.json").write_bytes(as_json(TUNE))
    Trace(path.parent, IDENTITY, False)


def read_card(path: Path) -> None:
    metadata_of(path)  # says nothing of what is wrong
    parsed_card(path.read_bytes().decode(errors="replace"), str(path))


def read_folder(path: Path) -> None:
    (path.parent / "train.jsonl").write_bytes(as_lines(ROWS))
    list(open_table(path.parent, None).rows())


LABEL = {"layer": "layers.0", "neuron": 1, "group": "math", "confidence": 0.5, "description": "sums"}
DESCRIBED = {"format": "mergekit-neuron labels", "version": 1, "model": "base", "model_type": "llama", "weights": "x"}
DESCRIBED |= {"groups": ["general", "math"], "made_from": {"prior": "even"}}
DESCRIBED |= {"labels": [LABEL, {**LABEL, "neuron": 2, "confidence": None, "likelihoods": [-1.0, -0.5]}]}
ASKED = {f"{'0' * 16}-0-{neuron}": ("layers.0", neuron) for neuron in (1, 2)}
SAID = [{"message": {"role": "assistant", "content": '{"description": "sums", "group": "math"}'}}]
ANSWERS = [
    {"custom_id": name, "response": {"status_code": 200, "body": {"model": "m", "choices": SAID}}, "error": None}
    for name in ASKED
]
KEPT = [{"belongs_to": "x"}, {"layer": "layers.0", "neuron": 1, "description": "sums", "likelihoods": [-1.0, -0.5]}]
ROWS = [{"text": "one", "n": 1, "more": ["x"]}, {"text": "two", "n": None}]
CELLS = [["text", "n"], ["one", 1], ['"two, three"', ""]]
#: Name of the file -> what it says, how that is written, who reads it.
FORMATS: dict[str, tuple[Any, Callable[[Any], bytes], Callable[[Path], Any]]] = {
    "rows.jsonl": (ROWS, as_lines, read_rows),
    "rows.jsonl.gz": (ROWS, lambda content: gzip.compress(as_lines(content)), read_rows),
    "rows.json": (ROWS, as_json, read_rows),
    "rows.csv": (CELLS, as_csv, read_rows),
    "rows.tsv": (CELLS, lambda content: as_csv(content).replace(b",", b"\t"), read_rows),
    "rows.txt": (None, lambda _: b"one\ntwo\n", read_rows),
    "rows.parquet": (None, lambda _: table(), read_rows),
    "a.png": (None, lambda _: picture("PNG"), lambda path: read_image(path, str(path))),
    "a.jpg": (None, lambda _: picture("JPEG"), lambda path: read_image(path, str(path))),
    "a.webp": (None, lambda _: picture("WEBP"), lambda path: read_image(path, str(path))),
    "a.gif": (None, lambda _: picture("GIF"), lambda path: read_image(path, str(path))),
    "a.bmp": (None, lambda _: picture("BMP"), lambda path: read_image(path, str(path))),
    "a.tiff": (None, lambda _: picture("TIFF"), lambda path: read_image(path, str(path))),
    "tasks.yml": (TASKS, as_yaml, load_tasks),
    "route.yml": (ROUTE, as_yaml, read_config),
    "routed_config.json": (ROUTED, as_json, lambda path: RoutedConfig.read(path.parent)),
    "router.safetensors": (None, lambda _: trained_router(), lambda path: Router.load(path, RouterShape(**SHAPE), 2)),
    "scores.json": (SCORES, as_json, read_evaluation),
    "tune.json": (TUNE, as_json, resumed),
    "trace.jsonl": ([TRIAL, {**TRIAL, "point": {"x": 2}}], as_lines, resumed),
    "experts.json": ({"a": {"e": 0.5}}, as_json, resumed),
    "labels.json": (LABELS, as_json, lambda path: import_labels(PROFILE, path)),
    "labels.jsonl": (
        [{"layer": "layers.0", "neuron": 1, "group": "math"}, {"layer": 1, "neuron": "2", "group": "code"}],
        as_lines,
        lambda path: import_labels(PROFILE, path),
    ),
    "labels.csv": (
        [["layer", "neuron", "group"], ["layers.0", 1, "math"], [1, 2, "code"]],
        as_csv,
        lambda path: import_labels(PROFILE, path),
    ),
    "described.json": (DESCRIBED, as_json, lambda path: import_labels(PROFILE, path)),
    "answers.jsonl": (ANSWERS, as_lines, lambda path: read_answers(path, ASKED, PROFILE, ("general", "math"))),
    "l.json.unfinished-0-of-1": (KEPT, as_lines, lambda path: Journal(path.parent / "l.json", "x", 2).open({})),
    "card.md": (CARD, card_of, read_card),
    "README.md": (FOLDER, card_of, read_folder),
}

ODD = st.sampled_from(
    [
        *mutations.ODD,
        -float("inf"),
        " ",
        "\u202e",
        "é" * 3000,
        "[0:99999999999999999999]",
        "~nobody/x",
        "{}",
        [[]],
        {"x": mutations.NESTED},
        "hf://a/b.jsonl",
        "http://a",
        "[*",
        "a::b",
    ]
)


@st.composite
def changed(draw: Any, content: Any) -> Any:
    """The same with a value replaced, left out, wrapped, or with a key more; once or twice."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.sampled_from([1, 1, 2]))):
        place = draw(st.sampled_from(list(mutations.places(content))))
        if not place:
            content = draw(st.sampled_from([content] * 5 + [[content], {"x": content}, None, 3, "x"]))
            continue
        holder = content
        for key in place[:-1]:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "wrap", "more"]))
        if how == "drop":
            del holder[place[-1]]
        elif how == "more" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["x", "", "format", "name", "é\n", "\x1b[2J"]))] = copy.deepcopy(draw(ODD))
        else:
            holder[place[-1]] = [holder[place[-1]]] if how == "wrap" else copy.deepcopy(draw(ODD))
    return content


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """The same bytes, cut short, flipped, repeated or with others among them."""
    how = draw(st.sampled_from(["cut", "flip", "flip", "repeat", "insert"]))
    at = draw(st.integers(0, len(data)))
    if how == "cut":
        return data[:at]
    if how == "repeat":
        return data + data[at:]
    if how == "insert":
        odd = [b"\0", b"\xff", b"\xef\xbb\xbf", b"&a [*a]", b"!!python/object:os.system x", b"\\ud800", b'"', b"\r\n"]
        return data[:at] + draw(st.sampled_from(odd)) + data[at:]
    found = bytearray(data)
    for _ in range(draw(st.sampled_from([1, 2, 20]))):
        found[draw(st.integers(0, len(found) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(found)


def reads_or_says(read: Callable[[], Any], name: str) -> None:
    try:
        read()
    except UserError as error:
        assert len(str(error).splitlines()) == 1, str(error)
        assert "\x1b" not in str(error)
        assert name in str(error)


@pytest.mark.parametrize("name", FORMATS)
@fuzzed
@given(data=st.data())
def test_a_file_is_read_or_one_line_names_it(name: str, tmp_path: Path, data: Any) -> None:
    content, write, read = FORMATS[name]
    written = write(content if content is None else data.draw(changed(content)))
    if content is None or data.draw(st.sampled_from([True, False, False])):
        written = data.draw(damaged(written or b"x"))
    (tmp_path / "sums.jsonl").write_text('{"t": "x"}\n')
    (tmp_path / name).write_bytes(written)
    # Of a search that is resumed and of a folder with data, the directory is what the user named.
    reads_or_says(lambda: read(tmp_path / name), {"tune.json": str(tmp_path), "README.md": ""}.get(name, name))


@pytest.mark.parametrize("name", FORMATS)
def test_the_file_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    content, write, read = FORMATS[name]
    (tmp_path / "sums.jsonl").write_text('{"t": "x"}\n')
    (tmp_path / name).write_bytes(write(content))
    read(tmp_path / name)


WORDS = ["1e-8", "nan", "inf", "1e400", "&x", "*x", "!!", "..", "text", "train", ".jsonl", "hf://", "http://", "::"]
PIECES = st.sampled_from([*"a=:,10-[]{~\n\0@/.*?#é '\"", *WORDS, "x" * 300])


@fuzzed
@given(texts=st.lists(st.lists(PIECES, max_size=8).map("".join), min_size=1, max_size=3), budget=st.integers(1, 9))
def test_a_search_is_made_or_one_line_says_why_not(texts: list[str], budget: int) -> None:
    def search() -> None:
        for name in ("grid", "random", "cma"):
            for _ in zip(range(3), make_strategy(name, parse_search(texts), budget, 0).batches(), strict=False):
                pass

    reads_or_says(search, "--search")


@fuzzed
@given(text=st.lists(PIECES, max_size=10).map("".join))
def test_a_source_is_understood_or_one_line_says_why_not(text: str) -> None:
    reads_or_says(lambda: parse_source(f"a={text}"), "--data")


@fuzzed
@given(data=st.data())
def test_a_state_is_taken_up_or_passed_over(tmp_path: Path, data: Any) -> None:
    from neuron_methods.profiling.checkpoint import Checkpoint

    class Record:
        values = torch.zeros(3)

        def state(self) -> dict[str, torch.Tensor]:
            return {"values": self.values}

        def fits(self, state: dict[str, torch.Tensor]) -> bool:
            return state["values"].shape == (3,)

        def load_state(self, state: dict[str, torch.Tensor]) -> None:
            assert state["values"].shape == (3,)

    class Recorder:
        records = {"layer": Record()}  # noqa: RUF012

    checkpoint = Checkpoint(tmp_path / "p.safetensors", {"a": 1}, 0)
    metadata = data.draw(changed({"belongs_to": json.dumps({"a": 1}), "batches": "3"}))
    metadata = {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}
    shape = data.draw(st.sampled_from([(3,), (3,), (4,), ()]))
    try:
        save_file({data.draw(st.sampled_from(["layer/values", "x"])): torch.ones(shape)}, checkpoint.path, metadata)
    except Exception:
        return  # a text that no safetensors file holds
    if data.draw(st.booleans()):
        checkpoint.path.write_bytes(data.draw(damaged(checkpoint.path.read_bytes())))
    assert checkpoint.load(Recorder()) >= 0
