"""A tokenizer that knows more tokens than the model has embeddings: one line in every command that reads texts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
import yaml
from click.testing import CliRunner

from neuron_methods.cli import main
from tests.support.routed import EXPERTS, make_workspace, settings
from tests.support.tiny import VOCABULARY, save_model, write_jsonl

SAID = f"its tokenizer makes token {len(VOCABULARY)} of a text, and its embeddings hold {len(VOCABULARY)} tokens; "
TASKS = {
    "perplexity": {},
    "multiple-choice": {"columns": {"input": "text", "label": "answer", "choices": "choices"}},
    "generation": {"columns": {"input": "text", "target": "answer"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models whose tokenizers have one word more, texts with it, and what is routed over such a base."""
    from neuron_methods.routing.build import build_routed_model

    place, before = tmp_path_factory.mktemp("tokens"), Path.cwd()
    make_workspace("llama", place)
    os.chdir(place)
    quick = settings("llama", enhancement={"enabled": False}, router={"samples": 8, "epochs": 2})
    Path("routed.yml").write_text(yaml.safe_dump(quick))
    build_routed_model(Path("routed.yml"), Path("routed"))
    save_model("t5", place / "t5")
    for name in ("base", "t5", "routed"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        tokenizer.add_tokens(["zebra"])
        tokenizer.save_pretrained(name)
    row = {"text": "one zebra two", "input": "zebra", "target": "one", "answer": "one", "choices": ["one", "zebra"]}
    for name in (*(f"data/{expert}" for expert in EXPERTS), "rows"):
        write_jsonl(Path(f"{name}.jsonl"), [row] * 8)
    for kind, columns in TASKS.items():
        task = {"name": "x", "kind": kind, "data": "rows.jsonl", **columns}
        Path(f"{kind}.yml").write_text(yaml.safe_dump({"tasks": [task]}))
    merge = {"merge_method": "neuro_merging", "base_model": "base", "models": [{"model": "base+adapters/numbers"}]}
    Path("merge.yml").write_text(yaml.safe_dump(merge))
    yield place
    os.chdir(before)


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("profile base --data a=rows.jsonl:text -o p.safetensors", "model base"),
        ("profile base+adapters/numbers --data a=rows.jsonl:text -o p.safetensors", "model base+numbers"),
        ("profile base --data a=rows.jsonl:text --inputs -o p.safetensors", "model base"),
        ("profile base --data a=rows.jsonl:text --inputs --generate 2 -o p.safetensors", "model base"),
        ("profile t5 --data a=rows.jsonl:input,target -o p.safetensors", "model t5"),
        ("linearity merge.yml --data a=rows.jsonl:text", "model base"),
        *((f"evaluate base --task {kind}.yml", "model base") for kind in TASKS),
        ("evaluate routed --task perplexity.yml", "routed: base"),
        ("route routed.yml again", "routed.yml: base_model"),
        ("generate routed --prompt zebra", "routed: base"),
    ],
)
def test_more_tokens_than_embeddings_are_one_line(folder: Path, command: str, named: str) -> None:
    before = set(os.listdir())
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 1, result.output
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: {named}") and SAID in line, line
    for left in set(os.listdir()) - before:  # work to go on with may stay
        assert left.endswith(".work")
        shutil.rmtree(left)


def test_what_no_text_asks_for_hinders_nothing(folder: Path, tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "sound.jsonl", [{"text": "one two"}] * 4)
    result = CliRunner().invoke(
        main, ["profile", "base", "--data", f"a={texts}", "-o", str(tmp_path / "p.safetensors")]
    )
    assert result.exit_code == 0, result.output
