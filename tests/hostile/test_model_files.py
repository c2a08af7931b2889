"""Files of models, adapters, profiles and merges that say what nobody means: one line that names the file."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from safetensors.torch import load_file, save_file

from neuron_methods.adapters.config import AdapterConfig
from neuron_methods.models.headers import header_entries, stored_headers
from neuron_methods.models.reference import same_model
from neuron_methods.neurons import neuron_map
from neuron_methods.plugin.checkpoints import CheckpointLoader
from neuron_methods.support.errors import UserError
from tests.support.formats import READERS, instead, refusal, run, said
from tests.support.mutations import NESTED

pytestmark = pytest.mark.usefixtures("among_formats")

MERGE, VERIFY = ("merge", "merge.yml", "out"), ("verify", "base")
SCORE = ("evaluate", "base+adapter", "--task", "tasks.yml")
ALL = (MERGE, VERIFY, SCORE)
ADAPTED = (("merge", "adapters.yml", "out"), SCORE, ("verify", "adapter"))
CONFIG, LORA = "base/config.json", "adapter/adapter_config.json"
INDEX = "sharded/model.safetensors.index.json"
SHARDED = (("merge", "shards.yml", "out"), ("verify", "sharded"), ("evaluate", "sharded", "--task", "tasks.yml"))
TOKENIZER = "base/tokenizer.json"

#: (file, place in it, value that stands there, what is said, by which commands).
SAYS: tuple[tuple[str, tuple[Any, ...], Any, str, tuple[tuple[str, ...], ...]], ...] = (
    (CONFIG, (), [], "expected a JSON object, found a list", ALL),
    (CONFIG, (), NESTED, "nested", ALL),
    (CONFIG, ("model_type",), 7, "model_type: .*string.*found 7", ALL),
    (CONFIG, ("architectures",), "LlamaForCausalLM", "architectures: .*list.*found 'Llama", ALL),
    (CONFIG, ("architectures",), [None], r"architectures\[0\]: .*string.*found None", ALL),
    (CONFIG, ("auto_map",), 5, "auto_map: .*found 5", ALL),
    (CONFIG, ("quantization_config",), "fp8", "quantization_config: .*found 'fp8'", ALL),
    (CONFIG, ("tie_word_embeddings",), "yes", "tie_word_embeddings: .*found 'yes'", ALL),
    (CONFIG, ("hidden_size",), {"x": 1}, "", ALL),
    (CONFIG, ("hidden_size",), -16, "", ALL),
    (CONFIG, ("num_attention_heads",), 0, "", ALL),
    (CONFIG, ("rope_parameters",), 3, "", ALL),
    (CONFIG, ("hidden_act",), "warp", "", ALL),
    (CONFIG, ("dtype",), "float99", "", ALL),
    (CONFIG, ("num_hidden_layers",), 10**9, "num_hidden_layers: found 1000000000, expected at most 1000", ALL),
    (CONFIG, ("vocab_size",), 10**12, "vocab_size: found 1000000000000, expected at most", ALL),
    (CONFIG, ("vocab_size",), 10**9, "", ALL),
    (CONFIG, ("max_position_embeddings",), 10**10, "max_position_embeddings: found 10000000000", ALL),
    (CONFIG, ("num_labels",), 10**8, "num_labels: found 100000000", ALL),
    (CONFIG, ("hidden_size",), float("nan"), "hidden_size: found nan", ALL),
    ("base/generation_config.json", (), [1], "generation_config.json: expected a JSON object", ALL),
    ("base/tokenizer_config.json", ("auto_map",), 3, "tokenizer_config.json: auto_map", ALL),
    (TOKENIZER, ("model",), 3, "tokenizer.json: model: .*found 3", (MERGE, VERIFY)),
    (TOKENIZER, ("model", "vocab", "one"), -4, "tokenizer.json: model", (MERGE, VERIFY)),
    (
        TOKENIZER,
        ("model", "vocab", "one"),
        10**9,
        "tokenizer.json: model",
        (MERGE, VERIFY, ("merge", "tokens.yml", "out")),
    ),
    (TOKENIZER, ("added_tokens",), [{"id": "x"}], r"tokenizer.json: added_tokens\[0\]", (MERGE, VERIFY)),
    (LORA, ("peft_type",), ["LORA"], "peft_type: .*string.*found a list", ADAPTED),
    (LORA, ("r",), "4", "r: .*integer.*found '4'", ADAPTED),
    (LORA, ("r",), 0, "r: found 0, expected 1 or more", ADAPTED),
    (LORA, ("r",), -4, "r: .*greater than or equal to 0, found -4", ADAPTED),
    (LORA, ("r",), 10**9, "r: .*found 1000000000", ADAPTED),
    (LORA, ("r",), 10**6, "1000000", ADAPTED),
    (LORA, ("lora_alpha",), float("nan"), "lora_alpha: .*finite.*found nan", ADAPTED),
    (LORA, ("lora_alpha",), None, "lora_alpha: .*found None", ADAPTED),
    (LORA, ("rank_pattern",), {"q_proj": 0}, "q_proj: found 0", ADAPTED),
    (LORA, ("rank_pattern",), {"q_proj": "x"}, "rank_pattern.q_proj: .*found 'x'", ADAPTED),
    (LORA, ("lora_dropout",), "x", "lora_dropout: .*found 'x'", ADAPTED),
    (CONFIG, ("use_cache",), "yes", "use_cache.* expected bool, got str", (MERGE, SCORE)),
    (LORA, ("alpha_pattern",), [1], "alpha_pattern: .*found a list", ADAPTED),
    (LORA, ("target_modules",), {"x": 1}, "target_modules", ADAPTED),
    (LORA, ("modules_to_save",), "lm_head", "modules_to_save: .*list.*found 'lm_head'", ADAPTED),
    (LORA, ("layers_to_transform",), ["1"], "layers_to_transform", ADAPTED),
    (LORA, ("base_model_name_or_path",), 5, "base_model_name_or_path: .*found 5", ADAPTED),
    (LORA, ("base_model_name_or_path",), "a\x1b[31mb", "base_model_name_or_path: ", ADAPTED),
    (INDEX, ("weight_map",), [], "weight_map: .*found a list", SHARDED),
    (INDEX, ("weight_map",), {}, "weight_map: ", SHARDED),
    (INDEX, ("weight_map", "lm_head.weight"), 7, "weight_map.*found 7", SHARDED),
    (INDEX, ("weight_map", "lm_head.weight"), "../base/model.safetensors", "no name of a file beside it", SHARDED),
    (INDEX, ("weight_map", "lm_head.weight"), "/dev/zero", "'/dev/zero' is no name of a file beside it", SHARDED),
    (INDEX, ("weight_map", "lm_head.weight"), "x.safetensors", "x.safetensors: no such file, but .* names it", SHARDED),
    ("vit/preprocessor_config.json", (), "x", "expected a JSON object, found a str", (("merge", "vit.yml", "out"),)),
    (
        "g.json",
        ("labels", "layers.0"),
        [99] * 24,
        r"labels.layers.0: 99 is no group",
        (("merge", "groups.yml", "out"),),
    ),
    ("g.json", ("labels", "layers.0", 3), -1, r"labels.layers.0\[3\]: .*found -1", (("merge", "groups.yml", "out"),)),
    ("g.json", ("extra",), 1, "extra: unknown key", (("merge", "groups.yml", "out"),)),
    ("trim.json", ("experts", 0, "entries"), -1, r"experts\[0\].entries: .*found -1", (("merge", "trim.yml", "out"),)),
    ("trim.json", ("experts", 0, "sigma"), "x", r"experts\[0\].sigma: .*found 'x'", (("merge", "trim.yml", "out"),)),
)


@pytest.mark.parametrize(
    ("file", "keys", "value", "told"),
    [pytest.param(*case[:4], id=f"{case[0]}-{'.'.join(map(str, case[1]))}-{str(case[2])[:12]}") for case in SAYS],
)
def test_what_a_file_says_is_checked(file: str, keys: tuple[Any, ...], value: Any, told: str) -> None:
    commands = next(case[4] for case in SAYS if case[:2] == (file, keys) and case[2] is value)
    with instead(file, said(file, *keys, value=value)):
        for command in commands:
            message = refusal(*command)
            assert Path(file).name in message or str(Path(file).parent) in message
            assert re.search(told, message), message


@pytest.mark.parametrize("file", [CONFIG, INDEX, LORA, "g.json", "trim.json", TOKENIZER])
def test_a_key_that_appears_twice(file: str) -> None:
    text = Path(file).read_bytes().rstrip()
    with instead(file, text[:-1] + b', "x": 1, "x": 2}'):
        readers = [command for command, files in READERS if file in files]
        assert "key 'x' appears twice" in refusal(*readers[0])


OPTIONAL = ("generation_config.json", "tokenizer_config.json", "tokenizer.json", "preprocessor_config.json")


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "nothing"])
@pytest.mark.parametrize(
    "file", list(dict.fromkeys(file for _, files in READERS for file in files if not file.endswith(".yml")))
)
def test_what_is_no_file(file: str, kind: str) -> None:
    """Only a pipe that nobody writes to tells an opening that would wait: the suite would stand still here."""
    commands = [command for command, files in READERS if file in files]
    with instead(file, None) as path:
        match kind:
            case "pipe":
                os.mkfifo(path)
            case "directory":
                path.mkdir()
            case "device":
                path.symlink_to("/dev/zero")
        if kind == "nothing" and path.name in OPTIONAL:
            return  # these need not be there
        message = refusal(*commands[-1])
        assert path.name in message or str(path.parent) in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("command", ALL)
def test_links_out_of_a_directory_are_not_followed(name: str, command: tuple[str, ...], tmp_path: Path) -> None:
    secret = tmp_path / name
    shutil.copy(f"base/{name}", secret)
    with instead(f"base/{name}", None) as path:
        path.symlink_to(secret)
        assert f"base/{name}: a link that leads out of base; put the file itself there" in refusal(*command)


def test_links_within_the_cache_of_the_hub_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--org--m" / "blobs", tmp_path / "models--org--m" / "snapshots" / "0"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(Path("base").iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert run("verify", str(snapshot)).exit_code == 0


# ------------------------------------------------------------------------------------- adapters that do not fit


def rewritten(change: Any) -> bytes:
    from safetensors.torch import save

    stored = change(load_file("adapter/adapter_model.safetensors"))
    return save({key: tensor.contiguous() for key, tensor in stored.items()})


MISFITS = {
    "another architecture": lambda stored: {k.replace("model.layers", "encoder.block"): v for k, v in stored.items()},
    "a key of nothing": lambda stored: {**stored, "base_model.model.nowhere.lora_A.weight": torch.ones(4, 16)},
    "half the layers": lambda stored: {k: v for k, v in stored.items() if "layers.1" not in k},
    "no lora_A": lambda stored: {k: v for k, v in stored.items() if "lora_A" not in k},
    "one lora_B less": lambda stored: dict(sorted(stored.items())[:-1]),
    "another rank": lambda stored: {k: v[:2] if "lora_A" in k else v[:, :2] for k, v in stored.items()},
    "integers": lambda stored: {k: v.to(torch.int64) for k, v in stored.items()},
    "nothing": lambda stored: {"x": torch.zeros(1)},
}


@pytest.mark.parametrize("how", MISFITS)
@pytest.mark.parametrize(
    "command",
    [
        ("merge", "adapters.yml", "out"),
        SCORE,
        ("profile", "base+adapter", "--data", "t=texts.jsonl:text", "-o", "q.safetensors"),
        ("verify", "adapter"),
        ("route", "routed.yml", "out"),
    ],
    ids=lambda command: command[0],
)
def test_an_adapter_that_does_not_fit_is_refused_everywhere(how: str, command: tuple[str, ...]) -> None:
    if command[0] == "route":
        data = {"source": "texts.jsonl", "columns": {"text": "text"}}
        experts = [{"name": n, "adapter": m, "data": data} for n, m in (("a", "adapter"), ("b", "second"))]
        Path("routed.yml").write_text(yaml.safe_dump({"base_model": "base", "experts": experts}))
    with instead("adapter/adapter_model.safetensors", rewritten(MISFITS[how])):
        assert "adapter" in refusal(*command)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", "(((.*)*)*)*x"),
        ("exclude_modules", "(.*)*(.*)*(.*)*x"),
        ("rank_pattern", {"(([a-z.0-9_]+)+)+X": 2}),
        ("alpha_pattern", {"(([a-z.0-9_]+)+)+X": 2}),
        ("target_modules", "(a"),
        ("layers_pattern", "("),
    ],
)
def test_expressions_that_match_for_ever_or_are_none(key: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuron_methods.adapters.patterns._SECONDS", 0.7)
    with instead(LORA, said(LORA, key, value=value)):
        for command in ADAPTED:
            assert re.search(rf"adapter_config.json: {key}: .*(matches no name within|no regular)", refusal(*command))


# ------------------------------------------------------------------------------------------------ values of 0


def test_an_alpha_of_0_is_an_update_of_0() -> None:
    """As peft has it: α/r is 0."""
    with instead(LORA, said(LORA, "lora_alpha", value=0)):
        assert AdapterConfig.read("adapter").alpha == 0
        assert AdapterConfig.read("adapter").scaling_of("model.layers.0.mlp.up_proj") == 0
        name = "model.layers.0.mlp.up_proj.weight"
        loader = LoaderCache().get(ModelReference.parse("base+adapter"))
        assert torch.equal(loader.get_tensor(name), load_file("base/model.safetensors")[name])
        LoaderCache.loaders.clear()
        base = transformers.AutoModelForCausalLM.from_pretrained("base")
        merged = peft.PeftModel.from_pretrained(base, "adapter").merge_and_unload()
        assert torch.equal(merged.state_dict()[name], load_file("base/model.safetensors")[name])
    with instead(LORA, said(LORA, "alpha_pattern", value={"up_proj": 0})):
        config = AdapterConfig.read("adapter")
        assert (config.scaling_of("x.up_proj"), config.scaling_of("x.q_proj")) == (0, 2)


def test_a_width_of_0_is_a_width() -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, n_inner=0)
    assert neuron_map(config, "GPT2LMHeadModel").neurons == {"h.0": 0}
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2)
    assert neuron_map(config, "GPT2LMHeadModel").neurons == {"h.0": 32}


# ------------------------------------------------------------------------------ what transformers would read


@pytest.mark.parametrize("how", ["in two shards", "whole beside the index", "in a shard that the index does not name"])
def test_what_is_read_is_what_transformers_would_read(how: str, tmp_path: Path) -> None:
    model = shutil.copytree("sharded", tmp_path / "model")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    name = next(tensor for tensor, shard in index["weight_map"].items() if shard == shards[0])
    other = {key: tensor + 1 for key, tensor in load_file(model / shards[0]).items()}
    if how == "in two shards":
        save_file({**load_file(model / shards[-1]), **other}, model / shards[-1], metadata={"format": "pt"})
    elif how == "whole beside the index":
        whole = {key: tensor + 1 for shard in shards for key, tensor in load_file(model / shard).items()}
        save_file(whole, model / "model.safetensors", metadata={"format": "pt"})
    else:
        index["weight_map"][name] = shards[1]
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()[name]
    assert torch.equal(CheckpointLoader.open(str(model)).get_tensor(name), expected)


def test_a_header_is_no_longer_than_its_file(tmp_path: Path) -> None:
    for name in ("one", "other"):
        shutil.copytree("base", tmp_path / name)
    assert same_model(str(tmp_path / "one"), str(tmp_path / "other")) is True
    file = tmp_path / "other" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes((2**62).to_bytes(8, "little") + data[8:])
    assert same_model(str(tmp_path / "one"), str(tmp_path / "other")) is False
    with pytest.raises(UserError, match=f"{file}: not a complete safetensors file"):
        header_entries(file)
    with pytest.raises(UserError, match=f"{file}: not a complete safetensors file"):
        stored_headers(file.parent)


# --------------------------------------------------------------------------------------- tokenizers, and YAML


@pytest.mark.parametrize(
    "how", ["truncated", "of another kind", "without its class"], ids=lambda how: how.replace(" ", "-")
)
def test_a_tokenizer_that_cannot_be_loaded_is_found_before_the_merge(how: str) -> None:
    text = Path(TOKENIZER).read_bytes()
    content = json.loads(text)
    data = {
        "truncated": text[:-20],
        "of another kind": json.dumps({**content, "model": {**content["model"], "type": "Telepathy"}}).encode(),
        "without its class": json.dumps({**content, "pre_tokenizer": {"type": "None"}}).encode(),
    }[how]
    with instead(TOKENIZER, data):
        message = refusal(*MERGE)
        assert "tokenizer" in message
        assert "--no-copy-tokenizer merges without" in message
        assert run(*MERGE, "--no-copy-tokenizer").exit_code == 0
        assert "tokenizer" in refusal("verify", "base")


@pytest.mark.parametrize("value", [0, -8, 10**8, 10**30, "many", [8]])
def test_a_padding_that_would_fill_memory(value: Any) -> None:
    content = yaml.safe_load(Path("tokens.yml").read_text())
    content["tokenizer"]["pad_to_multiple_of"] = value
    with instead("tokens.yml", yaml.safe_dump(content).encode()):
        assert "pad_to_multiple_of" in refusal("merge", "tokens.yml", "out")
