"""Merges that stay in memory are those that are written: weights, ties, dtypes, config, tokenizer, scores."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import yaml

from neuron_methods.evaluation import read_examples
from neuron_methods.evaluation.models import open_held, open_model
from neuron_methods.evaluation.tuning import Bench, Recipe
from neuron_methods.models.verification import verify_model
from neuron_methods.plugin.in_memory import merged_in_memory
from neuron_methods.plugin.merging import merge_to_directory, plan_merge
from neuron_methods.support import memory
from neuron_methods.support.errors import UserError
from tests.evaluation import cases
from tests.support import tiny
from tests.support.kinds import build_kind, save_kind
from tests.support.tokenizers import save_tokenizer


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def source(method: str = "task_arithmetic", **keys: object) -> str:
    models = [{"model": name} for name in ("expert-a", "expert-b")]
    content = {"merge_method": method, "base_model": "base", "models": models, "parameters": {"weight": 0.5}}
    return yaml.safe_dump({**content, **keys})


def ties(state: dict[str, torch.Tensor]) -> list[list[str]]:
    """Which tensors of a model are one."""
    return [[name for name in state if state[name].data_ptr() == tensor.data_ptr()] for tensor in state.values()]


def check_same(written: str, dtype: str = "auto", place: Path = Path("written")) -> dict[str, torch.Tensor]:
    """Hold a merge in memory to the one on disk; gives its tensors as the model has them."""
    merge_to_directory(written, place, progress=False)
    with open_model(str(place), dtype) as opened, merged_in_memory(written) as held:
        files = {path.name: path.read_text() for path in held.place.iterdir()}
        with open_held(held, dtype) as found:
            one, other = opened.model, found.model
            assert type(one) is type(other) and not any(name.startswith("model") for name in files)
            assert one.config.to_diff_dict() == other.config.to_diff_dict()
            assert str(one.generation_config) == str(other.generation_config) if one.can_generate() else True
            expected, tensors = one.state_dict(), other.state_dict()
            assert [*expected] == [*tensors]
            for name, tensor in expected.items():
                assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name]), name
            assert ties(expected) == ties(tensors)
            assert not other.training and not any(p.requires_grad for p in other.parameters())
    for name, text in files.items():
        assert (place / name).read_text() == text, name
    assert not held.place.exists()
    return tensors


@pytest.mark.parametrize("kind", ["gemma3", "qwen3-moe", "bart", "vit-classifier", "resnet"])
def test_kinds_of_model(kind, folder):
    save_kind(folder, kind)
    check_same(source())


@pytest.mark.parametrize(("kind", "dtype"), [("t5", "float16"), ("llama", "bfloat16"), ("llama", "float32")])
def test_dtypes(kind, dtype, folder):
    tiny.save_experts(folder, kind)
    tensors = check_same(source(out_dtype="bfloat16"), dtype)
    kept = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert bool(kept) == (kind == "t5" or dtype == "float32")  # of T5 transformers keeps some as they are


def test_embeddings_that_part_are_told_in_the_config(folder):
    for seed, name in enumerate(("base", "expert-a", "expert-b")):
        build_kind("gpt-neox", seed, tie_word_embeddings=name == "base").save_pretrained(name)
    check_same(source("linear"))
    assert json.loads(Path("written/config.json").read_text())["tie_word_embeddings"] is False


def test_a_tokenizer_of_all(folder):
    words = {"base": ["red", "cat"], "expert-a": ["red", "cat", "new"], "expert-b": ["cat", "odd", "red"]}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    for seed, (name, known) in enumerate(words.items()):
        build_kind("gemma3", seed, vocab_size=1 + len(known), **special).save_pretrained(name)
        save_tokenizer(folder / name, ["<unk>", *known])
    tensors = check_same(source("linear", tokenizer={"source": "union"}))
    assert tensors["model.embed_tokens.weight"].shape[0] == 5
    with merged_in_memory(source("linear", tokenizer={"source": "union"})) as held, open_held(held) as opened:
        assert {"new", "odd"} <= opened.processor.tokenizer.get_vocab().keys()


def test_heads_of_other_labels_and_adapters(folder):
    for seed, (name, labels) in enumerate((("base", 2), ("expert-a", 3), ("expert-b", 5))):
        build_kind("vit-classifier", seed, num_labels=labels).save_pretrained(name)
    tensors = check_same(f"# mergekit-neuron merge --head expert-a\n{source()}")
    assert tensors["classifier.weight"].shape[0] == 3
    model = build_kind("vit-classifier", 0, num_labels=2)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained("adapter")
    two = yaml.safe_load(source())
    two["models"] = [{"model": "base+adapter"}]
    check_same(yaml.safe_dump(two), place=folder / "adapted")


def test_chance_goes_by_the_seed(folder):
    tiny.save_experts(folder)
    dare = source("dare_linear", parameters={"weight": 1.0, "density": 0.5})
    found = []
    for seed in (3, 3, 4):
        with merged_in_memory(dare, seed=seed) as held:
            found.append(held.tensors["model.embed_tokens.weight"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_what_is_incomplete_or_no_number_is_refused(folder):
    tiny.save_experts(folder)
    with merged_in_memory(source()) as held:
        verify_model(held.place, held=held.tensors)
        lost = held.tensors.pop("model.norm.weight")
        with pytest.raises(UserError, match=r"1 parameters of LlamaForCausalLM are missing"):
            verify_model(held.place, held=held.tensors)
        with pytest.raises(UserError, match=r"the merge: its files lack weights of LlamaForCausalLM"), open_held(held):
            pass
        held.tensors["model.norm.weight"] = lost[:-1]
        with pytest.raises(UserError, match=r"model.norm.weight is stored as"):
            verify_model(held.place, held=held.tensors)
    model = tiny.build_model("llama")
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained("expert-a")
    with pytest.raises(UserError, match=r"model.norm.weight: NaN or Inf in expert-a"), merged_in_memory(source()):
        pass


def test_where_memory_has_no_room_merges_are_on_disk_and_that_is_said_once(folder, monkeypatch):
    tiny.save_experts(folder)
    cases.questions(folder)
    (task,) = cases.tasks_of(folder, cases.perplexity_task())
    examples = [(task, read_examples(task, "validation", 0))]
    points = [{"lambda": 0.5}, {"lambda": 2.0}]
    plan = plan_merge(source())
    free = plan.bytes_to_write + plan.memory.peak - 2048
    said, scores = [], []
    for room in (10**12, free):
        (folder / "meminfo").write_text(f"MemTotal: 99999999999 kB\nMemAvailable: {room // 1024} kB\n")
        monkeypatch.setattr(memory, "_MEMINFO", folder / "meminfo")
        monkeypatch.setattr(memory, "_GROUP_OF_PROCESS", folder / "none")
        recipe = Recipe(source(), "merge.yml", [])
        with Bench(recipe, examples, shortcut=False, folder=folder, say=said.append) as bench:
            scores.append([results[0].score for _, results, _ in bench.try_points(points)])
            assert bench.effort.merges == 2
    assert scores[0] == scores[1] and scores[0][0] != scores[0][1]
    (line,) = said
    assert line.startswith("a merge in memory needs ")
    assert line.endswith("are free: merged on disk, and removed when scored")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
