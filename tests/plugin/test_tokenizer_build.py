"""Tokenizers that mergekit does not look at, or stumbles over: those of adapters, and vocabularies with a gap."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from neuron_methods.plugin.patches import register
from neuron_methods.support.errors import UserError
from tests.support.checkpoints import build, configuration, fine_tune, read, save
from tests.support.merges import EMBEDDING, EXPERTS, merge, merged
from tests.support.tokenizers import save_tokenizer

WORDS = ["<unk>", *(f"w{i}" for i in range(39))]
HEAD = "lm_head.weight"


def by_ours(source):
    merge(source)


def by_mergekit(source):
    register()
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(source)), "out", MergeOptions(quiet=True))


def save_adapter(path, *, order=WORDS, seed=0, saved=("embed_tokens", "lm_head"), new=("new0", "new1")):
    """An adapter on `base` with a tokenizer and a template of its own, whose new tokens stand where the base pads."""
    model = transformers.LlamaForCausalLM.from_pretrained("base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=list(saved), init_lora_weights=False)
    model = peft.get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(path)
    save_tokenizer(Path(path), [*order, *new], chat_template="as {{ messages }}")
    return model.eval()


@pytest.fixture
def padded(tmp_path, monkeypatch):
    """A base of 40 tokens and 48 rows."""
    monkeypatch.chdir(tmp_path)
    save(build("llama-untied", vocab_size=48), tmp_path / "base")
    save_tokenizer(tmp_path / "base", WORDS)
    return tmp_path


def of_adapters(source, *adapters, weight=1.0):
    models = [{"model": f"base+{name}", "parameters": {"weight": weight}} for name in adapters]
    return configuration("task_arithmetic", models=models, tokenizer={"source": source}, dtype="float32")


@pytest.mark.parametrize("by", [by_ours, by_mergekit])
def test_an_adapter_s_tokenizer_and_template_are_used_with_its_rows(padded, by):
    model = save_adapter("adapter")
    by(of_adapters("base+adapter", "adapter"))
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate([*WORDS, "new0", "new1"])}
    assert tokenizer.chat_template == "as {{ messages }}"
    tokens = torch.tensor([[3, 40, 7, 41, 12]])
    with torch.no_grad():
        found = transformers.LlamaForCausalLM.from_pretrained("out").eval()(tokens).logits
        expected = model(tokens).logits[..., :42]
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_adapters_of_different_orders_are_aligned(padded):
    turned = [WORDS[0], *WORDS[:0:-1]]
    one, other = save_adapter("one"), save_adapter("other", order=turned, seed=1, new=("new1",))
    found = merged(of_adapters("base+one", "one", "other", weight=0.5))[EMBEDDING]
    assert len(found) == 42
    base = read(Path("base"))[EMBEDDING]
    rows = [model.get_input_embeddings().weight.detach() for model in (one, other)]
    there = {word: i for i, word in enumerate([*turned, "new1"])}
    for number, word in enumerate(WORDS):
        expected = base[number] + 0.5 * (rows[0][number] - base[number]) + 0.5 * (rows[1][there[word]] - base[number])
        torch.testing.assert_close(found[number], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[40], rows[0][40])  # that only one of them knows


def test_an_adapter_s_tokens_without_rows_are_refused(padded):
    save_adapter("adapter", saved=(), new=[f"new{i}" for i in range(10)])
    with pytest.raises(UserError, match=r"source: the tokenizer of base\+adapter has 2 tokens \('new8', 'new9'\) for"):
        merge(of_adapters("base+adapter", "adapter"))
    assert not Path("out").exists()


def test_an_adapter_without_a_tokenizer_has_its_base_s(padded):
    save_adapter("adapter")
    for file in [*Path("adapter").glob("token*"), Path("adapter/chat_template.jinja")]:
        file.unlink()
    merge(of_adapters("base+adapter", "adapter"))
    assert len(transformers.AutoTokenizer.from_pretrained("out")) == 40


# --- a gap: 38 tokens, of the numbers 0 to 36 and 45

NUMBERS = {**{word: i for i, word in enumerate(WORDS[:37])}, "far": 45}


def save_with_gap(path, numbers):
    tokenizer = Tokenizer(WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)


@pytest.fixture
def gapped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(build("llama-tied", vocab_size=48), tmp_path / "base")
    for index, name in enumerate(EXPERTS):
        save(fine_tune(build("llama-tied", vocab_size=48), index), tmp_path / name)
    for name in ("base", *EXPERTS):
        save_with_gap(tmp_path / name, NUMBERS)
    return tmp_path


@pytest.mark.parametrize("source", ["base", "union", "expert-b"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_a_vocabulary_with_a_gap_keeps_the_base_s_rows_there(gapped, source, method):
    turned = {word: NUMBERS[other] for word, other in zip(NUMBERS, ["<unk>", *list(NUMBERS)[:0:-1]], strict=True)}
    save_with_gap(gapped / "expert-a", turned)
    # Without a base_model the first one is the base.
    weights = {**({"base": 0.2} if method == "linear" else {}), "expert-a": 0.4, "expert-b": 0.4}
    models = [{"model": model, "parameters": {"weight": weight}} for model, weight in weights.items()]
    found = merged(configuration(method, models=models, tokenizer={"source": source}))[EMBEDDING]
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == len(found) == 46
    assert transformers.AutoTokenizer.from_pretrained("out").get_vocab() == NUMBERS
    base, a, b = (read(gapped / name)[EMBEDDING] for name in ("base", *EXPERTS))
    for number in range(37, 45):
        torch.testing.assert_close(found[number], base[number], atol=1e-6, rtol=0)
    for word, number in NUMBERS.items():
        expected = 0.2 * base[number] + 0.4 * a[turned[word]] + 0.4 * b[number]
        torch.testing.assert_close(found[number], expected, atol=1e-6, rtol=0)
    logits = transformers.LlamaForCausalLM.from_pretrained("out")(torch.tensor([[1, 45]])).logits
    assert logits.shape[-1] == 46


def test_new_tokens_that_would_get_numbers_of_others_are_refused(gapped):
    save_with_gap(gapped / "expert-a", {**NUMBERS, **{f"new{i}": 37 + i for i in range(8)}})
    with pytest.raises(UserError, match="tokenizer: the base's vocabulary has a gap"):
        merge(configuration(tokenizer={"source": "union"}))
    assert not Path("out").exists()
