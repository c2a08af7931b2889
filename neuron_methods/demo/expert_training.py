"""Fine-tuning one expert: LoRA on all linear modules, loss on the answers only, in a minute on two cores."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from neuron_methods.demo.base_model import load_model, load_tokenizer
from neuron_methods.demo.questions import Example
from neuron_methods.support.progress import progress_bar
from neuron_methods.support.quiet import quiet_transformers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Label of a position that does not count in the loss (the default of `torch.nn.functional.cross_entropy`).
IGNORED = -100


@dataclass(frozen=True)
class TrainingSettings:
    """How an expert is trained. Part of the key under which it is cached.

    Attributes:
        steps: optimiser steps.
        batch_size: examples per step.
        learning_rate: peak of AdamW's learning rate, after a tenth of the steps; it then falls to zero linearly.
        rank: LoRA's rank; its alpha is twice that.
        seed: of LoRA's initial weights and the order of examples.
    """

    steps: int
    batch_size: int = 12
    learning_rate: float = 1e-3
    rank: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Examples padded on the left, so that all answers end together.

    Attributes:
        input_ids: (examples, length) int64.
        attention_mask: (examples, length) int64, 0 on padding.
        labels: (examples, answer length) int64: the last positions' tokens, `IGNORED` where they are prompt.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[int]]:
    """Turn an example into token ids: of the prompt, and of a blank, the answer and the end-of-sequence token."""
    prompt = tokenizer(example.prompt, add_special_tokens=False).input_ids
    answer = tokenizer(" " + example.answer, add_special_tokens=False).input_ids
    return prompt, [*answer, tokenizer.eos_token_id]


def make_batch(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Batch:
    """Encode and pad examples; see `Batch`."""
    from neuron_methods.data.batching import pad

    encoded = [encode(tokenizer, example) for example in examples]
    input_ids, mask = pad([prompt + answer for prompt, answer in encoded], tokenizer.eos_token_id, left=True)
    labels, _ = pad([answer for _, answer in encoded], IGNORED, left=True)
    return Batch(input_ids, mask.long(), labels)


def batches(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], settings: TrainingSettings
) -> Iterator[Batch]:
    """Make `settings.steps` batches: passes through the shuffled examples, those of like length together.

    Several batches' worth of examples are sorted by length and cut into batches, which come in random order: little
    padding, and yet mixed lengths over a few steps.
    """
    rng = random.Random(settings.seed)
    pool_size = 6 * settings.batch_size
    queue: list[Example] = []
    ready: list[list[Example]] = []
    for _ in range(settings.steps):
        if not ready:
            while len(queue) < pool_size:
                queue += rng.sample(list(examples), len(examples))
            pool = sorted(queue[:pool_size], key=lambda example: len(example.prompt) + len(example.answer))
            del queue[:pool_size]
            ready = [pool[start : start + settings.batch_size] for start in range(0, pool_size, settings.batch_size)]
            rng.shuffle(ready)
        yield make_batch(tokenizer, ready.pop())


def answer_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Compute the mean cross-entropy (nats per token) over the tokens of the answers, a scalar in float32.

    Logits are formed at the answers' tokens alone, as one matrix: the vocabulary's 49,152 columns would cost as much as
    a third of the layers, and a quarter of a step where they are formed for padding, too.
    """
    import torch

    counted = batch.labels != IGNORED
    states = model.get_decoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    before = states[:, -batch.labels.shape[1] - 1 : -1]  # the token at a position is predicted one position before it
    logits = model.get_output_embeddings()(before[counted]).float()
    return torch.nn.functional.cross_entropy(logits, batch.labels[counted])


def learning_rate_factor(step: int, steps: int) -> float:
    """Compute the share of the peak learning rate at `step`: up over the first tenth, then down to (almost) zero."""
    warm_up = max(1, steps // 10)
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def train_expert(
    base: Path,
    examples: Sequence[Example],
    settings: TrainingSettings,
    directory: Path,
    *,
    description: str,
    progress: bool = True,
) -> list[float]:
    """Fine-tune the model in `base` and write ``adapter`` (peft) and ``full`` (merged, bf16) into `directory`.

    Returns:
        The loss at every step.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    directory.mkdir(exist_ok=True)
    model, tokenizer = load_model(base), load_tokenizer(base)
    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with quiet_transformers():
        model = get_peft_model(model, config)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings.steps))
    losses: list[float] = []
    with progress_bar(total=settings.steps, what=description, unit="step", shown=progress) as bar:
        for batch in batches(tokenizer, examples, settings):
            loss = answer_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            bar.update()
    with quiet_transformers():
        # "auto" would ask the Hub for the base's config, to learn whether the vocabulary was resized. It was not.
        model.save_pretrained(directory / "adapter", save_embedding_layers=False)
        merged = model.merge_and_unload().to(torch.bfloat16)
        merged.config.dtype = torch.bfloat16
        merged.save_pretrained(directory / "full")
        tokenizer.save_pretrained(directory / "full")
    return losses
