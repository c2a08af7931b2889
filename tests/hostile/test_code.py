"""Without --trust-remote-code nothing of a model's code is run, by no command, and nobody is asked on stdin."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import dynamic_module_utils

import neuron_methods
from neuron_methods.cli import main
from tests.support import routed, tiny

_CODE = """
import pathlib
pathlib.Path({executed!r}).touch()
from transformers import *
from transformers.image_processing_utils import BaseImageProcessor
class Own{base}({base}):
    {body}
def generate(model, **_):
    return None
"""
_BASES = {
    "OwnLlamaConfig": "model_type = 'own'",
    "OwnLlamaForCausalLM": "pass",
    "OwnPreTrainedTokenizerFast": "pass",
    "OwnBaseImageProcessor": "pass",
    "OwnProcessorMixin": "pass",
}

#: What may name code: {file: keys}, and the classes' home.
CODE: dict[str, dict[str, dict[str, Any]]] = {
    "config": {"config.json": {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnLlamaConfig"}}},
    "config and class": {
        "config.json": {
            "model_type": "own",
            "architectures": ["OwnLlamaForCausalLM"],
            "auto_map": {"AutoConfig": "own.OwnLlamaConfig", "AutoModelForCausalLM": "own.OwnLlamaForCausalLM"},
        }
    },
    "class": {
        "config.json": {
            "architectures": ["OwnLlamaForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "own.OwnLlamaForCausalLM"},
        }
    },
    "class of an own name": {
        "config.json": {"auto_map": {"AutoModelForCausalLM": "own.OwnLlamaForCausalLM", "AutoModel": "own.OwnX"}}
    },
    "class in another repository": {
        "config.json": {"model_type": "own", "auto_map": {"AutoConfig": "org/code--own.OwnLlamaConfig"}}
    },
    "tokenizer": {
        "tokenizer_config.json": {
            "tokenizer_class": "OwnPreTrainedTokenizerFast",
            "auto_map": {"AutoTokenizer": [None, "own.OwnPreTrainedTokenizerFast"]},
        }
    },
    "tokenizer by the config": {
        "config.json": {"auto_map": {"AutoTokenizer": [None, "own.OwnPreTrainedTokenizerFast"]}},
        "tokenizer_config.json": {"tokenizer_class": "OwnPreTrainedTokenizerFast"},
    },
    "processors": {
        "preprocessor_config.json": {
            "image_processor_type": "OwnBaseImageProcessor",
            "auto_map": {"AutoImageProcessor": "own.OwnBaseImageProcessor"},
        },
        "processor_config.json": {
            "processor_class": "OwnProcessorMixin",
            "auto_map": {"AutoProcessor": "own.OwnProcessorMixin"},
        },
    },
    "a class within a class": {
        "config.json": {
            "model_type": "encoder-decoder",
            "architectures": ["EncoderDecoderModel"],
            "encoder": {"model_type": "bert", "num_hidden_layers": 1},
            "decoder": {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "own.OwnLlamaForCausalLM"}},
        }
    },
    "generation": {"generation_config.json": {"num_beam_groups": 2, "num_beams": 2, "diversity_penalty": 0.5}},
}

#: Commands over a folder with base, expert-a, expert-b, adapters and data.
COMMANDS: dict[str, list[str]] = {
    "evaluate": ["evaluate", "base", "--task", "tasks.yml", "-q", "-o", "scores.json"],
    "evaluate an adapter": ["evaluate", "base+adapters/numbers", "--task", "tasks.yml", "-q", "-o", "scores.json"],
    "profile": ["profile", "base", "--data", "n=data/numbers.jsonl:input", "-o", "p.safetensors", "--samples", "4"],
    "route": ["route", "route.yml", "routed"],
    "generate": ["generate", "made", "--prompt", "one", "--base-model", "base", "--max-new-tokens", "2"],
    "verify": ["verify", "base"],
    "verify an adapter": ["verify", "adapters/numbers"],
    "push": ["push", "base", "alice/model"],
    "merge": ["merge", "merge.yml", "out", "--quiet"],
    "merge adapters": ["merge", "adapters.yml", "out", "--quiet"],
    "plan": ["merge", "merge.yml", "out", "--dry-run"],
    "linearity": ["linearity", "merge.yml", "--samples", "2", "--tokens", "8"],
    "tune": ["tune", "merge.yml", "--task", "tasks.yml", "--search", "weight=0.5,1", "-o", "tuned", "-q"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        routed.make_workspace("llama", folder)
        tiny.save_experts(folder / "experts")
        for name in ("expert-a", "expert-b"):
            shutil.move(folder / "experts" / name, folder / name)
        settings = routed.settings("llama", router={"epochs": 2}, enhancement={"enabled": False}, check_base=False)
        (folder / "route.yml").write_text(yaml.safe_dump(settings))
        parts = [{"model": name} for name in ("expert-a", "expert-b")]
        merge = {"merge_method": "task_arithmetic", "base_model": "base", "models": parts}
        (folder / "merge.yml").write_text(yaml.safe_dump({**merge, "parameters": {"weight": 1.0}}))
        merge["models"] = [{"model": f"base+adapters/{name}"} for name in ("numbers", "colours")]
        (folder / "adapters.yml").write_text(yaml.safe_dump({**merge, "parameters": {"weight": 1.0}}))
        task = {"name": "t", "kind": "generation", "metric": "exact_match", "limit": 2, "max_new_tokens": 2}
        data = {"source": "data/numbers.jsonl", "split": "[:20]", "validation_split": "[20:]"}
        (folder / "tasks.yml").write_text(yaml.safe_dump({"tasks": [{**task, "data": data}]}))
        done = CliRunner().invoke(main, ["route", "route.yml", "made"])
        assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
    monkeypatch.syspath_prepend(str(folder / "modules"))
    return folder


def bring_code(place: Path, files: dict[str, dict[str, Any]], executed: Path) -> None:
    """Let a model name code, which lies beside it and leaves a trace where it is run."""
    for file, keys in files.items():
        content = json.loads((place / file).read_text()) if (place / file).exists() else {}
        (place / file).write_text(json.dumps({**content, **keys}))
    classes = [_CODE.format(executed=str(executed), base=n.removeprefix("Own"), body=b) for n, b in _BASES.items()]
    (place / "own.py").write_text("".join(classes))
    (place / "custom_generate").mkdir(exist_ok=True)
    (place / "custom_generate" / "generate.py").write_text(classes[0])


def with_yes(*command: str) -> Any:
    """`yes | mergekit-neuron ...`"""
    return CliRunner().invoke(main, command, input="y\n" * 100)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "push"])
def test_the_commands_work_where_nothing_is_hostile(folder, command):
    done = with_yes(*COMMANDS[command])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("what", CODE)
@pytest.mark.parametrize("command", COMMANDS)
def test_yes_on_stdin_runs_no_code(folder, command, what):
    for name in ("base", "expert-a", "expert-b"):
        bring_code(folder / name, CODE[what], folder / "executed")
    done = with_yes(*COMMANDS[command])
    assert not (folder / "executed").exists(), done.output
    assert "[y/N]" not in done.output
    assert "unexpected" not in done.output
    if done.exit_code:
        assert done.stderr.splitlines()[-1].startswith("error: "), done.output


class _Trace:
    """What leaves a trace where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


#: Pickles that a model or adapter may bring: beside its weights, and in their place.
PICKLES = {
    "beside": ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "vocab.pkl"),
    "model": ("pytorch_model.bin",),
    "adapter": ("adapter_model.bin",),
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_pickle_is_opened(folder, command, kind):
    models, adapters = [folder / n for n in ("base", "expert-a", "expert-b")], [*(folder / "adapters").iterdir()]
    for place in {"beside": [*models, *adapters], "model": models, "adapter": adapters}[kind]:
        for file in place.glob("*.safetensors") if kind != "beside" else ():
            file.unlink()
        for name in PICKLES[kind]:
            torch.save({"x": _Trace(folder / "executed")}, place / name)
    done = with_yes(*COMMANDS[command])
    assert not (folder / "executed").exists(), done.output
    assert "unexpected" not in done.output, done.output
    reads = {"adapter": "adapter" in command or command == "route", "model": command != "report"}
    if reads.get(kind) and command not in ("verify an adapter", "push"):
        assert done.exit_code == 1, done.output


def test_every_call_says_whether_code_is_trusted_and_unpickles_weights_alone():
    unsaid = []
    for file in Path(neuron_methods.__file__).parent.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            if not isinstance(call.func, ast.Attribute):
                continue
            said = {keyword.arg for keyword in call.keywords}
            owner = ast.unparse(call.func.value)
            needed = {"from_pretrained": "trust_remote_code", "load": "weights_only"}.get(call.func.attr)
            if owner in ("PeftModel", "PeftConfig", "NeuronRoutedModel") or (needed == "weights_only") != (
                owner == "torch"
            ):
                continue  # which run no code
            if needed and not said & {needed, None}:
                unsaid.append(f"{file.name}:{call.lineno}")
    assert unsaid == []
