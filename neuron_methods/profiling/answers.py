"""A model's own answers to the prompts of a batch, put behind them."""

from __future__ import annotations

from typing import Any

import torch

from neuron_methods.data.batching import pad
from neuron_methods.data.feeders import Batch
from neuron_methods.data.sources import Sample
from neuron_methods.data.texts import TextFeeder
from neuron_methods.models.greedy import greedy_answers


def answered_by(model: Any, feeder: TextFeeder, samples: list[Sample], new_tokens: int, device: torch.device) -> Batch:
    """Let a model that generates answer, greedily, and lay its answers out as if they were the samples' targets.

    Args:
        model: a decoder, or a text-to-text model.
        feeder: of its kind; prompts are cut so that an answer fits into its `max_length`.
        samples: whose first column is the prompt.
        new_tokens: of an answer at most; one that ends earlier keeps its end.
        device: where the model's inputs go.
    """
    goes_on = not model.config.is_encoder_decoder
    prompts = feeder.prompts(samples)
    if goes_on:
        prompts = [prompt[: feeder.max_length - new_tokens] for prompt in prompts]
    settings = greedy_answers(model, feeder.tokenizer, new_tokens)
    ids, mask = pad(prompts, settings.pad_token_id, left=goes_on)
    said = model.generate(input_ids=ids.to(device), attention_mask=mask.long().to(device), generation_config=settings)
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    first = ids.shape[1] if goes_on else 1  # behind the token that a decoder starts with
    answers = [_up_to_end(tokens, ends) for tokens in said[:, first:].tolist()]
    return feeder.answered(prompts, answers, samples)


def _up_to_end(tokens: list[int], ends: list[int]) -> list[int]:
    length = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:length]
