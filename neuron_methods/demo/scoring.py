"""Exact match by greedy generation, in batches of like length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neuron_methods.demo.tasks import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Prompts per batch. Larger ones gain little on a CPU and pad more.
BATCH_SIZE = 40


@dataclass(frozen=True)
class Score:
    """How a model did on one task.

    Attributes:
        accuracy: share of held-out examples answered exactly, 0 to 1.
        answers: what the model answered, in the order of the examples.
    """

    accuracy: float
    answers: list[str]


def score_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    description: str,
    progress: bool = True,
) -> Score:
    """Answer a task's held-out examples and count the exact ones."""
    from tqdm.auto import tqdm

    answers = [""] * len(task.held_out)
    by_length = sorted(range(len(task.held_out)), key=lambda i: len(task.held_out[i].prompt))
    with tqdm(total=len(answers), desc=description, unit="answer", disable=not progress, leave=False) as bar:
        for start in range(0, len(by_length), BATCH_SIZE):
            chosen = by_length[start : start + BATCH_SIZE]
            prompts = [task.held_out[i].prompt for i in chosen]
            for i, answer in zip(chosen, answer_prompts(model, tokenizer, prompts, task.max_new_tokens), strict=True):
                answers[i] = answer
            bar.update(len(chosen))
    return Score(accuracy(task.held_out, answers), answers)


def accuracy(examples: Sequence[Example], answers: Sequence[str]) -> float:
    """Share of `answers` that equal the examples' answers."""
    right = sum(answer == example.answer for example, answer in zip(examples, answers, strict=True))
    return right / len(examples)


def answer_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Greedy answers: the first line of what follows each prompt, without blanks around it."""
    import torch
    from transformers import GenerationConfig

    encoded = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    length = max(map(len, encoded))
    input_ids = torch.full((len(encoded), length), tokenizer.eos_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, tokens in enumerate(encoded):
        input_ids[row, length - len(tokens) :] = torch.tensor(tokens)
        attention_mask[row, length - len(tokens) :] = 1
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=[tokenizer.eos_token_id, newline[-1]],
        pad_token_id=tokenizer.eos_token_id,
    )
    with torch.inference_mode():
        output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=settings)
    texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
    return [text.split("\n")[0].strip() for text in texts]
