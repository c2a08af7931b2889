"""A folder with a file of every format that a model, an adapter, a profile or a merge is read from, and its readers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from click.testing import CliRunner, Result

from neuron_methods.cli import main
from tests.support import routed, tiny
from tests.support.mutations import changed

_HALF = {"parameters": {"weight": 0.5}}
_YAMLS: dict[str, dict[str, Any]] = {
    "merge.yml": {
        "merge_method": "neuro_merging",
        "base_model": "base",
        "models": [{"model": "expert-a"}, {"model": "expert-b"}],
    },
    "shards.yml": {"merge_method": "linear", "models": [{"model": "sharded", **_HALF}, {"model": "base", **_HALF}]},
    "tokens.yml": {
        "merge_method": "linear",
        "models": [{"model": "base", **_HALF}, {"model": "expert-a", **_HALF}],
        "tokenizer": {"source": "union"},
    },
    "adapters.yml": {
        "merge_method": "ties",
        "base_model": "base",
        "parameters": {"weight": 0.5, "density": 0.5},
        "models": [{"model": "base+adapter"}, {"model": "base+head"}],
    },
    "alone.yml": {"merge_method": "linear", **_HALF, "models": [{"model": "adapter"}, {"model": "head"}]},
    "groups.yml": {
        "merge_method": "neuron_merge",
        "base_model": "base",
        "parameters": {"groups": "g.json"},
        "models": [
            {"model": "expert-a", "parameters": {"group": "t"}},
            {"model": "expert-b", "parameters": {"group": "u"}},
        ],
    },
    "importance.yml": {
        "merge_method": "min_merging",
        "base_model": "base",
        "parameters": {"importance": "activation", "profile": "p.safetensors", "data": "t"},
        "models": [{"model": "expert-a"}, {"model": "expert-b"}],
    },
    "trim.yml": {
        "merge_method": "neuro_merging",
        "base_model": "base",
        "parameters": {"profile": "trim.json"},
        "models": [{"model": "expert-a"}, {"model": "expert-b"}],
    },
    "pickle.yml": {"merge_method": "linear", "models": [{"model": "base", **_HALF}, {"model": "pickle", **_HALF}]},
    "vit.yml": {"merge_method": "linear", "models": [{"model": "vit", **_HALF}, {"model": "other", **_HALF}]},
}
_TASKS = {
    "tasks": [
        {
            "name": "t",
            "kind": "perplexity",
            "data": {"source": "texts.jsonl", "split": "train"},
            "columns": {"text": "text"},
        }
    ]
}
_BASE = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def _in(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


_SHARDED = _in("sharded", "config.json", "model.safetensors.index.json", "model-00001-of-00006.safetensors")
_MEASURED = ("p.safetensors", "p.exemplars.jsonl")

#: (arguments, the files that they read).
READERS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("merge", "merge.yml", "out"), ("merge.yml", *_in("base", *_BASE), *_in("expert-a", *_BASE[:3]))),
    (("merge", "tokens.yml", "out"), ("tokens.yml", *_in("base", *_BASE), *_in("expert-a", *_BASE))),
    (("merge", "shards.yml", "out"), _SHARDED),
    (("merge", "adapters.yml", "out"), (*_in("adapter", *_ADAPTER), *_in("head", *_ADAPTER), "base/config.json")),
    (("merge", "adapters.yml", "out", "--as-adapter"), (*_in("adapter", *_ADAPTER), *_in("head", *_ADAPTER))),
    (("merge", "alone.yml", "out", "--dry-run"), (*_in("adapter", *_ADAPTER), *_in("head", *_ADAPTER))),
    (("merge", "groups.yml", "out"), ("g.json",)),
    (("merge", "importance.yml", "out"), ("p.safetensors",)),
    (("merge", "trim.yml", "out"), ("trim.json",)),
    (("merge", "pickle.yml", "out", "--lazy-unpickle"), ("pickle/pytorch_model.bin",)),
    (("merge", "vit.yml", "out"), _in("vit", "config.json", "preprocessor_config.json")),
    (("verify", "base"), _in("base", *_BASE)),
    (("verify", "sharded"), _SHARDED),
    (("verify", "head"), (*_in("head", *_ADAPTER), "base/config.json")),
    (("verify", "vit"), _in("vit", "config.json", "preprocessor_config.json")),
    (("evaluate", "base+head", "--task", "tasks.yml"), (*_in("head", *_ADAPTER), *_in("base", *_BASE))),
    (("evaluate", "adapter", "--task", "tasks.yml"), _in("adapter", *_ADAPTER)),
    (("evaluate", "sharded", "--task", "tasks.yml"), _SHARDED),
    (
        ("profile", "base+adapter", "--data", "t=texts.jsonl:text", "-o", "q.safetensors"),
        (*_in("adapter", *_ADAPTER), *_in("base", *_BASE)),
    ),
    (("groups", "p.safetensors", "-o", "h.json"), _MEASURED[:1]),
    (("profile", "show", "p.safetensors", "--layer", "0", "--neuron", "1"), _MEASURED),
)


def build(folder: Path) -> None:
    """Make the files in a directory, which is the current one."""
    tiny.save_experts(folder)
    transformers.GenerationConfig(eos_token_id=2).save_pretrained(folder / "base")
    tiny.build_model("llama").save_pretrained(folder / "sharded", max_shard_size="4KB")
    tiny.build_tokenizer().save_pretrained(folder / "sharded")
    tiny.save_model("vit", folder / "vit")
    shutil.copytree(folder / "vit", folder / "other")
    (folder / "pickle").mkdir()
    shutil.copy(folder / "base/config.json", folder / "pickle")
    torch.save(tiny.build_model("llama").state_dict(), folder / "pickle/pytorch_model.bin")
    routed.save_adapter(Path("base"), "llama", folder / "adapter", 0)
    routed.save_adapter(Path("base"), "llama", folder / "second", 2)
    patterns: dict[str, Any] = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    routed.save_adapter(Path("base"), "llama", folder / "head", 1, modules_to_save=["lm_head"], **patterns)
    tiny.write_texts(folder / "texts.jsonl", 6)
    tiny.write_texts(folder / "others.jsonl", 6, 5)
    for name, content in {**_YAMLS, "tasks.yml": _TASKS}.items():
        (folder / name).write_text(yaml.safe_dump(content))
    data = ("--data", "t=texts.jsonl:text", "--data", "u=others.jsonl:text")
    for arguments in (
        ("profile", "base", *data, "-o", "p.safetensors"),
        ("groups", "p.safetensors", "-o", "g.json"),
        ("merge", "merge.yml", "measured", "--profile-out", "trim.json"),
    ):
        assert run(*arguments).exit_code == 0
    shutil.rmtree("measured")


def said(file: str, *keys: Any, value: Any) -> bytes:
    """A JSON file that says something else at a place."""
    return json.dumps(changed(json.loads(Path(file).read_bytes()), keys, value)).encode()


def run(*arguments: str) -> Result:
    """Run the command in this process, in the current directory; what it writes is removed."""
    result = CliRunner().invoke(main, list(arguments))
    for name in ("out", "q.safetensors", "q.exemplars.jsonl", "h.json"):
        if os.path.isdir(name):
            shutil.rmtree(name)
        elif os.path.lexists(name):
            os.remove(name)
    return result


def refusal(*arguments: str) -> str:
    """The one line that a command ends with, which is no accident of ours."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.rstrip().splitlines()[-1] == errors[0]
    assert "run again with --debug" not in errors[0]
    assert isinstance(result.exception, SystemExit)
    return errors[0]


@contextmanager
def instead(file: str, data: bytes | None) -> Iterator[Path]:
    """Within the block a file has other bytes; None: it is not there, for something else to take its place."""
    path = Path(file)
    before = path.read_bytes()
    try:
        if data is None:
            path.unlink()
        else:
            path.write_bytes(data)
        yield path
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif os.path.lexists(path):
            path.unlink()
        path.write_bytes(before)
