"""Adapters on embeddings that are one with the head: a merge holds what `PeftModel` computes, as its logits tell.

`merge_and_unload` is no reference: what it adds to one module it adds to the tensor that both share, or twice.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from neuron_methods.adapters.kept import Precision
from neuron_methods.plugin.adapter_output import AdapterOutput
from neuron_methods.plugin.merging import MergeSummary, merge_to_directory
from neuron_methods.support.errors import UserError
from tests.adapters import cases
from tests.adapters.cases import load, lora, save_base, t5, tied, train

TOKENS = torch.tensor([[1, 5, 3, 2, 7, 9, 4]])
EMBEDDING, HEAD = ["embed_tokens"], ["lm_head"]
BOTH = EMBEDDING + HEAD
KEPT = {"ensure_weight_tying": True}


def saved(*modules: str, **options: Any) -> dict[str, Any]:
    return {"target_modules": ["q_proj"], "modules_to_save": list(modules), **options}


def rows(indices: Any, **options: Any) -> dict[str, Any]:
    return {"target_modules": ["q_proj"], "trainable_token_indices": indices, **options}


# What is trained -> whether embedding and head are one tensor afterwards.
LLAMA: dict[str, tuple[dict[str, Any], bool]] = {
    "embedding": ({"target_modules": EMBEDDING}, False),
    "head": ({"target_modules": HEAD}, False),
    "both": ({"target_modules": BOTH}, False),
    "embedding-kept": ({"target_modules": EMBEDDING, **KEPT}, True),
    "head-kept": ({"target_modules": HEAD, **KEPT}, True),
    "both-kept": ({"target_modules": BOTH, **KEPT}, True),
    "embedding-dora": ({"target_modules": EMBEDDING, "use_dora": True}, False),
    "both-dora-kept": ({"target_modules": BOTH, "use_dora": True, **KEPT}, False),
    "embedding-saved": (saved("embed_tokens"), False),
    "head-saved": (saved("lm_head"), False),
    "both-saved": (saved("embed_tokens", "lm_head"), False),
    "head-saved-kept": (saved("lm_head", **KEPT), True),
    "both-saved-kept": (saved("embed_tokens", "lm_head", **KEPT), True),
    "embedding-and-head-saved": ({"target_modules": EMBEDDING, "modules_to_save": HEAD}, False),
    "head-and-embedding-saved": ({"target_modules": HEAD, "modules_to_save": EMBEDDING}, False),
    "tokens": (rows([1, 5]), True),
    "tokens-of-the-head": (rows({"lm_head": [1, 5]}), False),
    "tokens-of-each": (rows({"embed_tokens": [1, 5], "lm_head": [2, 5]}), False),
    "tokens-of-both": (rows({"embed_tokens": [1, 5], "lm_head": [1, 5]}), True),
    "tokens-and-head": (rows({"embed_tokens": [1, 5]}, target_modules=HEAD), False),
}
OTHERS: dict[str, tuple[Any, Any, bool]] = {
    "t5-head": (t5, lora(target_modules=["lm_head", "q"]), False),
    "t5-tokens": (t5, lora(target_modules=["q"], trainable_token_indices=[1, 5]), True),
    "gpt2-embedding": (cases.gpt2, lora(target_modules=["wte", "c_attn"]), False),
    "gpt2-head": (cases.gpt2, lora(target_modules=["lm_head"]), False),
    "loha-head": (tied, lambda: peft.LoHaConfig(r=4, target_modules=["lm_head", "q_proj"]), False),
    "ia3": (tied, lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), True),
}


def logits(model: Any) -> torch.Tensor:
    inputs = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, **inputs).logits


def trained(base: Path, adapter: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(peft.PeftModel.from_pretrained(load(base), adapter))


def merge(base: Path, adapter: Path, out: Path, method: str) -> MergeSummary:
    content = {"merge_method": method, "models": [{"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}}]}
    if method != "linear":
        content["base_model"] = str(base)
    return merge_to_directory(yaml.safe_dump(content), out, progress=False)


def check(base: Path, adapter: Path, folder: Path, tied: bool, method: str = "task_arithmetic") -> None:
    expected = trained(base, adapter)
    assert not torch.allclose(expected, logits(load(base)), atol=1e-2)
    summary = merge(base, adapter, folder / method, method)
    merged = load(folder / method)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)
    one, other = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert torch.equal(one, other) == tied
    assert json.loads((folder / method / "config.json").read_text())["tie_word_embeddings"] == tied
    assert any("untied: " in note for note in summary.notes) != tied


@pytest.mark.parametrize("name", LLAMA)
def test_a_llama_computes_what_was_trained(name: str, tmp_path: Path) -> None:
    options, still_tied = LLAMA[name]
    torch.manual_seed(0)
    base = save_base(tied(), tmp_path / "base")
    adapter = train(base, lora(**options)(), tmp_path / "adapter", seed=1)
    for method in ("task_arithmetic", "linear"):
        check(base, adapter, tmp_path, still_tied, method)


@pytest.mark.parametrize("name", OTHERS)
def test_others_compute_what_was_trained(name: str, tmp_path: Path) -> None:
    model, config, still_tied = OTHERS[name]
    torch.manual_seed(0)
    base = save_base(model(), tmp_path / "base")
    check(base, train(base, config(), tmp_path / "adapter", seed=1), tmp_path, still_tied)


@pytest.mark.parametrize("name", ["head", "both", "both-kept", "embedding-saved", "tokens"])
def test_a_base_that_stores_a_copy_of_its_embedding(name: str, tmp_path: Path) -> None:
    options, still_tied = LLAMA[name]
    torch.manual_seed(0)
    base = save_base(tied(), tmp_path / "base")
    stored = load_file(base / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    adapter = train(base, lora(**options)(), tmp_path / "adapter", seed=1)
    summary = merge(base, adapter, tmp_path / "out", "task_arithmetic")
    torch.testing.assert_close(logits(load(tmp_path / "out")), trained(base, adapter), atol=1e-4, rtol=0)
    assert any("not tied" in note for note in summary.notes) != still_tied


def test_embeddings_of_t5_that_would_have_to_be_three_are_refused(tmp_path: Path) -> None:
    """T5 reads its encoder's embedding apart from `shared`, and a checkpoint of it holds one of them."""
    torch.manual_seed(0)
    base = save_base(t5(), tmp_path / "base")
    adapter = train(base, lora(target_modules=["encoder.embed_tokens"])(), tmp_path / "adapter", seed=1)
    with pytest.raises(UserError, match=r"changes encoder.embed_tokens.weight and what the base ties to it"):
        merge(base, adapter, tmp_path / "out", "task_arithmetic")
    assert not (tmp_path / "out").exists()


def as_adapter(content: dict[str, Any], out: Path) -> MergeSummary:
    output = AdapterOutput(Precision(rank=None, energy=1.0))
    return merge_to_directory(yaml.safe_dump(content), out, output=output, progress=False)


@pytest.mark.parametrize("name", LLAMA)
def test_as_an_adapter_again_it_computes_the_same(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = save_base(tied(), tmp_path / "base")
    adapter = train(base, lora(**LLAMA[name][0])(), tmp_path / "adapter", seed=1)
    models = [{"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}}]
    as_adapter({"merge_method": "task_arithmetic", "base_model": str(base), "models": models}, tmp_path / "out")
    torch.testing.assert_close(trained(base, tmp_path / "out"), trained(base, adapter), atol=1e-4, rtol=0)


@pytest.mark.parametrize("model", [tied, t5, cases.gpt2])
def test_a_whole_model_as_an_adapter_computes_what_it_did(model: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = save_base(model(), tmp_path / "base")
    expert = save_base(load(base), tmp_path / "expert")
    models = [{"model": str(expert), "parameters": {"weight": 1.0}}]
    content = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}
    summary = as_adapter(content, tmp_path / "out")
    torch.testing.assert_close(trained(base, tmp_path / "out"), logits(load(expert)), atol=1e-3, rtol=0)
    assert any("tied in the base" in note for note in summary.adapter.notes)
    # Merged again it is the expert, whose embedding and head are one.
    merge(base, tmp_path / "out", tmp_path / "again", "task_arithmetic")
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(load(expert)), atol=1e-3, rtol=0)
