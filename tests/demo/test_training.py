"""Fine-tuning: what counts in the loss, how batches are made, and what an expert leaves on disk."""

import itertools

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from neuron_methods.demo.base_model import load_model
from neuron_methods.demo.expert_training import (
    IGNORED,
    TrainingSettings,
    answer_loss,
    batches,
    encode,
    learning_rate_factor,
    make_batch,
    train_expert,
)
from neuron_methods.demo.questions import Example

EXAMPLES = [
    Example("one more than 3 is", "4"),
    Example("two more than 17 is", "19"),
    Example("the opposite of up is", "down"),
    Example("grass is", "green"),
]


def test_a_batch_holds_prompt_and_answer_at_its_right_edge(tokenizer) -> None:
    batch = make_batch(tokenizer, EXAMPLES)
    for row, example in enumerate(EXAMPLES):
        tokens = batch.input_ids[row][batch.attention_mask[row].bool()]
        text = f"{example.prompt} {example.answer}<end>"
        assert tokenizer.decode(tokens) == text
        assert batch.attention_mask[row, -len(tokens) :].all()
        counted = batch.labels[row][batch.labels[row] != IGNORED]
        assert tokenizer.decode(counted) == f" {example.answer}<end>"


def test_the_loss_is_the_mean_over_answer_tokens_whatever_the_padding(tokenizer, tiny_model) -> None:
    total, count = 0.0, 0
    for example in EXAMPLES:  # one by one, unpadded, over all logits
        prompt, answer = encode(tokenizer, example)
        log_probabilities = tiny_model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        for place, token in enumerate(answer):
            total -= log_probabilities[len(prompt) + place - 1, token].item()
        count += len(answer)
    assert answer_loss(tiny_model, make_batch(tokenizer, EXAMPLES)).item() == pytest.approx(total / count, rel=1e-5)


def test_batches_go_through_every_example_before_any_comes_again(tokenizer) -> None:
    examples = [Example("x" * length, str(length)) for length in range(1, 25)]
    settings = TrainingSettings(steps=10, batch_size=4, seed=3)

    def shown(batch):
        return [tokenizer.decode(row[row != 0]) for row in batch.input_ids]

    first, again = (list(map(shown, batches(tokenizer, examples, settings))) for _ in range(2))
    assert first == again
    assert len(first) == 10 and all(len(batch) == 4 for batch in first)
    assert len(set(itertools.chain.from_iterable(first[:6]))) == 24
    other = TrainingSettings(steps=10, batch_size=4, seed=4)
    assert list(map(shown, batches(tokenizer, examples, other))) != first
    # Batches are of like length: 24 lengths in six batches of neighbours.
    assert all(max(map(len, batch)) - min(map(len, batch)) <= 4 for batch in first[:6])


@pytest.mark.parametrize("steps", [1, 2, 45])
def test_the_learning_rate_rises_and_falls(steps) -> None:
    factors = [learning_rate_factor(step, steps) for step in range(steps)]
    assert max(factors) == 1.0 and min(factors) > 0
    peak = factors.index(1.0)
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


@pytest.fixture(scope="module")
def expert(tiny_base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("expert")
    settings = TrainingSettings(steps=60, batch_size=4, learning_rate=2e-2)
    losses = train_expert(tiny_base, EXAMPLES, settings, directory, description="tiny", progress=False)
    return directory, losses


def test_training_lowers_the_loss(expert) -> None:
    _, losses = expert
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_full_expert_is_the_adapter_merged_into_the_base(expert, tiny_base) -> None:
    directory, _ = expert
    full = load_file(directory / "full" / "model.safetensors")
    base = load_file(tiny_base / "model.safetensors")
    assert {tensor.dtype for tensor in full.values()} == {torch.bfloat16}
    assert full.keys() == base.keys()
    merged = PeftModel.from_pretrained(load_model(tiny_base), directory / "adapter").merge_and_unload()
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in merged.state_dict().items()}
    assert all(torch.equal(full[name], expected[name]) for name in full)
    changed = {name for name in full if not torch.equal(full[name], base[name])}
    assert changed == {name for name in full if "_proj" in name}


def test_training_again_gives_the_same_bytes(expert, tiny_base, tmp_path) -> None:
    directory, losses = expert
    settings = TrainingSettings(steps=60, batch_size=4, learning_rate=2e-2)
    again = train_expert(tiny_base, EXAMPLES, settings, tmp_path, description="tiny", progress=False)
    assert again == losses
    for name in ("adapter/adapter_model.safetensors", "full/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()
