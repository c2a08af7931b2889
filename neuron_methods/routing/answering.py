"""What `mergekit-neuron generate` does: a batch of prompts or images in, answers with their routing out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from neuron_methods.data.images import read_image
from neuron_methods.models.kinds import text_limit
from neuron_methods.models.loading import device_map, load_processor
from neuron_methods.models.reference import Place
from neuron_methods.routing.base import routable_kind
from neuron_methods.routing.model import NeuronRoutedModel
from neuron_methods.routing.routed_files import routed_directory
from neuron_methods.routing.routes import Routing
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import first_line


def _told(given: str, answered: str, routing: Routing, sample: int, as_json: bool) -> str:
    """An answer to a prompt or an image, and the routing of that sample of the batch."""
    if not as_json:
        return f"{given}\n  answer:  {answered}\n  routing: {routing.describe(sample)}"
    weights = dict(zip(routing.names, routing.weights[sample].tolist(), strict=True))
    content = {
        "input": given,
        "answer": answered,
        "experts": {name: round(weights[name], 6) for name in routing.experts[sample]},
        "in_domain": bool(routing.in_domain[sample]),
        "score": round(float(routing.scores[sample]), 6),
        "threshold": round(routing.threshold, 6),
    }
    return json.dumps(content, ensure_ascii=False)


def answer(
    routed: str,
    *,
    prompts: Sequence[str] = (),
    images: Sequence[Path] = (),
    max_new_tokens: int = 32,
    sample: bool = False,
    seed: int = 0,
    base_model: str | None = None,
    device: str | None = None,
    as_json: bool = False,
) -> list[str]:
    """Answer prompts or classify images in one batch; see `cli.generate` for the arguments.

    Returns:
        Each answer with its routing: three lines, or one of JSON.

    Raises:
        UserError: the model cannot be loaded or is of the other kind, an image cannot be read, or a prompt does not
            fit into the context.
    """
    model = NeuronRoutedModel.from_pretrained(routed, base_model=base_model, device_map=device_map(device))
    directory = routed_directory(routed)
    own = any((directory / name).is_file() for name in ("tokenizer_config.json", "preprocessor_config.json"))
    place = Place(str(directory)) if own else Place.parse(model.base_reference)
    processor = load_processor(routable_kind(model.base).processor, place, routed)
    if model.kind == "image-classification":
        if prompts:
            raise UserError(f"{routed}: classifies images; give --image FILE instead of --prompt")
        given: Sequence[Any] = images
        answers, routing = _classify(model, processor, images)
    else:
        if images:
            raise UserError(f"{routed}: reads text; give --prompt TEXT instead of --image")
        given = prompts
        answers, routing = _generate(model, processor, prompts, max_new_tokens, sample, seed)
    return [_told(str(given[i]), text, routing, i, as_json) for i, text in enumerate(answers)]


def _generate(
    model: NeuronRoutedModel, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, sample: bool, seed: int
) -> tuple[list[str], Routing]:
    limit = text_limit(model.config)
    for prompt in prompts:
        if not prompt.isascii() and prompt.encode(errors="ignore").decode() != prompt:
            raise UserError(f"--prompt {prompt!r}: holds what is no character; give it as UTF-8")
        tokens = len(tokenizer(prompt).input_ids)
        if not tokens:
            raise UserError(f"--prompt {prompt!r}: no token in it; give a text")
        if limit is not None and tokens + max_new_tokens > limit:
            raise UserError(
                f"--prompt {prompt[:30]!r}...: {tokens} tokens and --max-new-tokens {max_new_tokens} are more than the "
                f"context of {limit}; shorten one of them"
            )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    inputs = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    torch.manual_seed(seed)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": sample, "pad_token_id": tokenizer.pad_token_id}
    try:
        output, routing = model.generate(**inputs, **settings, return_routing=True)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # of settings that the base brings along
        problem = f"the base's generation_config.json cannot be followed: {first_line(error)}"
        raise UserError(f"{model.base_reference}: {problem}") from error
    if model.kind == "causal":
        output = output[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [text.strip() for text in texts], routing


def _classify(model: NeuronRoutedModel, processor: Any, images: Sequence[Path]) -> tuple[list[str], Routing]:
    opened = [read_image(path, f"--image {path}") for path in images]
    pixels = processor(opened, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    with torch.no_grad():
        output, routing = model(pixel_values=pixels, return_routing=True)
    labels = model.config.id2label
    return [str(labels.get(number, number)) for number in output.logits.argmax(1).tolist()], routing
