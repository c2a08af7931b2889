"""Exact match: a model that knows the answers scores 100 %, one that does not 0 %."""

import pytest
import torch

from neuron_methods.demo.expert_training import answer_loss, make_batch
from neuron_methods.demo.scoring import accuracy, answer_prompts, score_task
from neuron_methods.demo.tasks import Example, Task

EXAMPLES = (
    Example("a:", "xy"),
    Example("a longer prompt, to be padded against:", "no"),
    Example("b\nc:", "yes it is"),
)
TASK = Task("tiny", "three things to know", train=(), held_out=EXAMPLES, max_new_tokens=12, steps=1)


@pytest.fixture(scope="module")
def oracle(tokenizer, make_tiny_model):
    """The tiny model, taught the three answers by heart."""
    model = make_tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = make_batch(tokenizer, EXAMPLES)
    for _ in range(150):
        optimizer.zero_grad()
        loss = answer_loss(model, batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01
    return model


def test_an_oracle_scores_everything_and_an_untaught_model_nothing(oracle, tiny_model, tokenizer) -> None:
    score = score_task(oracle, tokenizer, TASK, description="tiny", progress=False)
    assert score.answers == [example.answer for example in EXAMPLES]
    assert score.accuracy == 1.0
    assert score_task(tiny_model, tokenizer, TASK, description="tiny", progress=False).accuracy == 0.0


def test_an_answer_does_not_depend_on_the_batch(oracle, tokenizer) -> None:
    together = answer_prompts(oracle, tokenizer, [example.prompt for example in EXAMPLES], 12)
    alone = [answer_prompts(oracle, tokenizer, [example.prompt], 12)[0] for example in EXAMPLES]
    assert together == alone


def test_answers_are_cut_at_the_bound(oracle, tokenizer) -> None:
    assert answer_prompts(oracle, tokenizer, ["b\nc:"], 4) == ["yes"]


def test_accuracy_counts_exact_answers_only() -> None:
    assert accuracy(EXAMPLES, ["xy", "No", "yes it is."]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError):
        accuracy(EXAMPLES, ["xy"])
