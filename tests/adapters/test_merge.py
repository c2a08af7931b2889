"""Whole merges of adapters, by mergekit's methods and ours, against the same merges of what peft has merged."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from torch import Tensor

from neuron_methods.adapters.updates import TensorUpdate
from neuron_methods.plugin.checkpoints import CheckpointLoader
from neuron_methods.plugin.merging import merge_to_directory
from tests.adapters import cases
from tests.adapters.cases import lora, save_base, tensors, train

WEIGHTS = (0.7, 0.5, 0.9)


def configuration(
    method: str, models: Sequence[object], base: object = None, *, density: float | None = None, **top: Any
) -> dict[str, Any]:
    options = [
        {"model": str(model), "parameters": {"weight": weight, **({"density": density} if density else {})}}
        for model, weight in zip(models, WEIGHTS, strict=False)
    ]
    return {"merge_method": method, **({"base_model": str(base)} if base else {}), "models": options, **top}


def stock(content: dict[str, Any], out: Path) -> dict[str, Tensor]:
    LoaderCache.loaders.clear()
    options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False)
    run_merge(MergeConfiguration.model_validate(content), str(out), options)
    return tensors(out)


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], rounding: float = 2e-6, trimmed: bool = False
) -> None:
    """The same tensors to rounding; trimmed by a threshold, rounding may decide about single entries."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        close = torch.isclose(found[name], tensor, rtol=rounding, atol=rounding)
        assert float((~close).float().mean()) <= (0.01 if trimmed else 0), (name, (found[name] - tensor).abs().max())


METHODS = {"linear": None, "task_arithmetic": None, "ties": 0.6, "neuro_merging": 0.6, "min_merging": 0.6}
SAMPLE = [
    "llama-patterns",
    "llama-dora",
    "llama-tied-embedding",
    "llama-tied-head-saved",
    "llama-tied-embedding-saved",
    "llama-bias-all",
    "t5",
    "t5-gated",
    "vit",
    "clip",
    "clip-vision",
    "ia3",
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SAMPLE)
def test_one_adapter(name: str, method: str, tmp_path: Path, made) -> None:
    saved, density = made(name), METHODS[method]
    base = None if method == "linear" else saved.base
    found = stock(configuration(method, [saved], base, density=density), tmp_path / "lazy")
    expected = stock(configuration(method, [saved.merged], base, density=density), tmp_path / "full")
    assert_same(found, expected, trimmed=density is not None)
    tied = [
        json.loads((tmp_path / out / "config.json").read_text()).get("tie_word_embeddings") for out in ("lazy", "full")
    ]
    if name.startswith("llama-tied"):
        assert tied[0] is False  # otherwise the head that was written would be ignored
        reloaded = cases.load(tmp_path / "lazy")
        assert not torch.equal(reloaded.lm_head.weight, reloaded.model.embed_tokens.weight)
    elif method != "linear":
        assert tied[0] == tied[1]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A bfloat16 base, three adapters that touch different modules, and the experts in float32."""
    root = tmp_path_factory.mktemp("three")
    base = save_base(cases.llama(tie_word_embeddings=True), root / "base", torch.bfloat16)
    targets = (["q_proj", "down_proj"], ["q_proj"], ["up_proj"])
    adapters = [
        train(base, lora(target_modules=t)(), root / f"adapter{i}", seed=i, scale=0.02) for i, t in enumerate(targets)
    ]
    in_float32 = cases.load(base).float()
    in_float32.save_pretrained(root / "base32")
    merged = [cases.merge(root / "base32", a, root / f"merged{i}") for i, a in enumerate(adapters)]
    return {"base": base, "base32": root / "base32", "adapters": adapters, "merged": merged}


@pytest.mark.parametrize("method", METHODS)
def test_several_adapters_in_the_base_s_dtype(method: str, three, tmp_path: Path) -> None:
    density = METHODS[method]
    base, base32 = (None, None) if method == "linear" else (three["base"], three["base32"])
    adapters = [f"{three['base']}+{adapter}" for adapter in three["adapters"]]
    found = stock(configuration(method, adapters, base, density=density), tmp_path / "lazy")
    expected = stock(configuration(method, three["merged"], base32, density=density), tmp_path / "full")
    assert_same(found, {name: tensor.bfloat16() for name, tensor in expected.items()}, rounding=2**-8, trimmed=True)
    stored = tensors(three["base"])
    touched = {name for name in stored if any(f".{m}." in name for m in ("q_proj", "up_proj", "down_proj"))}
    assert touched == {name for name in stored if not torch.equal(found[name], stored[name])}


@pytest.mark.parametrize(("method", "weights"), [("linear", [1.0, 1.0, 1.0]), ("linear", [0.2, 0.3, 0.5])])
def test_a_method_that_scales_equal_inputs_still_does(method: str, weights: list[float], three, tmp_path: Path) -> None:
    content = configuration(method, three["merged"], parameters={"normalize": False}, out_dtype="float32")
    for model, weight in zip(content["models"], weights, strict=True):
        model["parameters"]["weight"] = weight
    expected = stock(content, tmp_path / "full")
    for model, adapter in zip(content["models"], three["adapters"], strict=True):
        model["model"] = f"{three['base32']}+{adapter}"
    assert_same(stock(content, tmp_path / "lazy"), expected, rounding=1e-5)


def test_dtype_of_the_yaml_is_obeyed(three, tmp_path: Path) -> None:
    for index, key in enumerate(("dtype", "out_dtype")):
        content = configuration("task_arithmetic", three["adapters"], three["base"], **{key: "float16"})
        found = stock(content, tmp_path / str(index))
        assert {tensor.dtype for tensor in found.values()} == {torch.float16}


def test_an_adapter_by_itself_is_the_base_and_the_adapter(three, tmp_path: Path) -> None:
    alone = stock(configuration("task_arithmetic", three["adapters"], three["base"]), tmp_path / "alone")
    both = [f"{three['base']}+{adapter}" for adapter in three["adapters"]]
    assert_same(alone, stock(configuration("task_arithmetic", both, three["base"]), tmp_path / "both"), rounding=0)
    no_base = stock(configuration("linear", three["adapters"]), tmp_path / "linear")
    assert_same(no_base, stock(configuration("linear", both), tmp_path / "linear-both"), rounding=0)


def test_thresholds_are_those_of_the_full_experts(three, tmp_path: Path) -> None:
    def profile(models: Sequence[object], base: Path, name: str, **options: Any) -> list[dict[str, Any]]:
        content = configuration("neuro_merging", models, base, density=0.3, **options)
        out = tmp_path / f"{name}.json"
        merge_to_directory(yaml.safe_dump(content), tmp_path / name, progress=False, profile_out=str(out))
        return json.loads(out.read_text())["experts"]

    for trim in ("model", "tensor"):
        options = {"parameters": {"trim": trim}}
        lazy = profile(three["adapters"], three["base"], f"lazy-{trim}", **options)
        full = profile(three["merged"], three["base32"], f"full-{trim}", **options)
        for one, other in zip(lazy, full, strict=True):
            assert one["entries"] == other["entries"]
            assert one["sigma"] == pytest.approx(other["sigma"], rel=1e-4)
            if trim == "model":
                assert one["threshold"] == pytest.approx(other["threshold"], rel=1e-4)


def test_our_method_never_forms_the_experts_weights(three, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError("weights of an expert were formed")

    monkeypatch.setattr(TensorUpdate, "weights", refuse)
    stock(configuration("neuro_merging", three["adapters"], three["base"], density=0.3), tmp_path / "out")
    with pytest.raises(AssertionError, match="weights of an expert"):
        stock(configuration("ties", three["adapters"], three["base"], density=0.3), tmp_path / "ties")


def test_full_experts_and_adapters_mix(three, tmp_path: Path) -> None:
    full = [three["merged"][0], three["merged"][1]]
    for method in ("task_arithmetic", "neuro_merging"):
        density = METHODS[method]
        mixed = [three["merged"][0], f"{three['base32']}+{three['adapters'][1]}"]
        found = stock(configuration(method, mixed, three["base32"], density=density), tmp_path / f"mixed-{method}")
        expected = stock(configuration(method, full, three["base32"], density=density), tmp_path / f"full-{method}")
        assert_same(found, expected, trimmed=True)


def test_an_adapter_on_another_base_is_measured_from_the_merge_s_base(three, tmp_path: Path) -> None:
    """Its task vector is not B·A then."""
    torch.manual_seed(9)
    other = save_base(cases.load(three["base32"]), tmp_path / "other")
    merged = cases.merge(other, three["adapters"][0], tmp_path / "merged")
    for method in ("task_arithmetic", "neuro_merging"):
        found = stock(
            configuration(method, [f"{other}+{three['adapters'][0]}"], three["base32"], density=METHODS[method]),
            tmp_path / f"lazy-{method}",
        )
        expected = stock(
            configuration(method, [merged], three["base32"], density=METHODS[method]), tmp_path / f"full-{method}"
        )
        assert_same(found, expected, trimmed=True)


def test_untouched_tensors_are_read_from_the_base_alone(three, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = CheckpointLoader.get_tensor

    def get_tensor(self: CheckpointLoader, key: str, *arguments: Any, **options: Any) -> Any:
        read.append(key)
        return original(self, key, *arguments, **options)

    monkeypatch.setattr(CheckpointLoader, "get_tensor", get_tensor)
    stock(configuration("ties", three["adapters"], three["base"], density=0.5), tmp_path / "ties")
    assert read.count("model.layers.0.self_attn.k_proj.weight") == 1
    read.clear()
    stock(configuration("neuro_merging", three["adapters"], three["base"], density=0.5), tmp_path / "neuro")
    assert read.count("model.layers.0.self_attn.k_proj.weight") == 1


def test_nothing_is_written_but_the_output(three, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch, cache = tmp_path / "scratch", tmp_path / "cache"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.chdir(scratch)
    before = {path: path.stat().st_mtime_ns for path in three["base"].parent.rglob("*")}
    LoaderCache.loaders.clear()
    options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False, lora_merge_cache=str(cache))
    content = configuration("ties", three["adapters"], three["base"], density=0.5)
    run_merge(MergeConfiguration.model_validate(content), str(tmp_path / "out"), options)
    assert not cache.exists()
    assert os.listdir(scratch) == []
    assert sorted(os.listdir(tmp_path)) == ["out", "scratch"]
    assert before == {path: path.stat().st_mtime_ns for path in three["base"].parent.rglob("*")}


def test_our_command_merges_adapters(three, tmp_path: Path) -> None:
    content = configuration("neuro_merging", three["adapters"], three["base"], density=0.3)
    merge_to_directory(yaml.safe_dump(content), tmp_path / "ours", progress=False)
    expected = stock(configuration("neuro_merging", three["adapters"], three["base"], density=0.3), tmp_path / "stock")
    assert_same(tensors(tmp_path / "ours"), expected, rounding=0)
    assert cases.load(tmp_path / "ours").config.architectures == ["LlamaForCausalLM"]


def test_tokenizer_comes_from_the_base_where_no_base_model_is_named(three, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    tokenizer.save_pretrained(three["base"])
    LoaderCache.loaders.clear()
    content = MergeConfiguration.model_validate(configuration("linear", three["adapters"]))
    run_merge(content, str(tmp_path / "out"), MergeOptions(quiet=True, write_model_card=False))
    assert (tmp_path / "out" / "tokenizer.json").exists()
