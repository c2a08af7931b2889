"""Models asked the same, one after the other: what each goes on with, answers, or takes an image for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from neuron_methods.data.images import read_image
from neuron_methods.evaluation.models import ModelSpec, OpenedModel, open_model
from neuron_methods.models.greedy import greedy_answers
from neuron_methods.models.kinds import model_kind
from neuron_methods.routing.answering import encoded_prompt
from neuron_methods.support.errors import UserError


def answers_of(
    models: Sequence[str], prompts: Sequence[str], images: Sequence[Path], max_new_tokens: int
) -> Iterator[tuple[str, str, str]]:
    """Ask each model each prompt, or show it each image; one model is in memory at a time.

    Args:
        models: MODEL each, as for `open_model`.
        prompts: texts.
        images: files; there are either of them.
        max_new_tokens: of an answer.

    Yields:
        (model, what was asked, its answer); greedy.

    Raises:
        UserError: there is no such model, it does not read what it is given, or a prompt does not fit.
    """
    for spec in [ModelSpec.parse(model) for model in models]:
        kind = model_kind(spec.architecture, spec.config)
        reads = "images" if kind == "image-classification" else "texts"
        if kind not in ("causal", "text-to-text", "text-classification", "image-classification"):
            raise UserError(
                f"model {spec.shown}: {spec.architecture} neither writes nor classifies; it cannot be asked"
            )
        if reads == "images" and prompts:
            raise UserError(f"model {spec.shown}: classifies images; give --image FILE instead of --prompt")
        if reads == "texts" and images:
            raise UserError(f"model {spec.shown}: reads text; give --prompt TEXT instead of --image")
        with open_model(spec) as opened, torch.no_grad():
            for image in images:
                pixels = opened.processor.image_processor(read_image(image, f"--image {image}"), return_tensors="pt")
                yield spec.shown, str(image), _class(opened, pixels)
            for prompt in prompts:
                room = 0 if kind == "text-classification" else max_new_tokens
                fitting = room if kind == "causal" else 0
                tokens = encoded_prompt(opened.processor.tokenizer, opened.model.config, prompt, fitting)
                encoded = {key: torch.tensor([value]) for key, value in tokens.items()}
                answer = _said(opened, encoded, room, goes_on=kind == "causal") if room else _class(opened, encoded)
                yield spec.shown, prompt, answer


def _said(opened: OpenedModel, encoded: dict[str, Any], new_tokens: int, *, goes_on: bool) -> str:
    tokenizer = opened.processor.tokenizer
    inputs = {key: encoded[key].to(opened.device) for key in ("input_ids", "attention_mask")}
    settings = greedy_answers(opened.model, tokenizer, new_tokens)
    output = opened.model.generate(**inputs, generation_config=settings)
    said = output[0, inputs["input_ids"].shape[1] :] if goes_on else output[0]
    return tokenizer.decode(said, skip_special_tokens=True).strip()


def _class(opened: OpenedModel, inputs: Any) -> str:
    dtype = opened.model.dtype
    placed = {k: v.to(opened.device, dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
    logits = opened.model(**placed).logits[0].float()
    found = int(logits.argmax())
    share = float(logits.softmax(0)[found])
    return f"{opened.model.config.id2label.get(found, found)} ({share:.0%})"
