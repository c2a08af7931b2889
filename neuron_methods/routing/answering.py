"""What `mergekit-neuron generate` does: a batch of prompts or images in, answers with their routing out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neuron_methods.models.kinds import text_limit
from neuron_methods.models.loading import device_map, load_processor
from neuron_methods.models.reference import Place
from neuron_methods.routing.base import routable_kind
from neuron_methods.routing.model import NeuronRoutedModel
from neuron_methods.routing.routed_files import routed_directory
from neuron_methods.routing.routes import Routing
from neuron_methods.support.errors import UserError


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        given: the prompt, or the image's path.
        answer: text generated, or the label.
        routing: of the whole batch.
        sample: which one of it this is.
    """

    given: str
    answer: str
    routing: Routing
    sample: int

    def as_text(self) -> str:
        """Show it in three lines."""
        return f"{self.given}\n  answer:  {self.answer}\n  routing: {self.routing.describe(self.sample)}"

    def as_json(self) -> str:
        """Show it in one line."""
        routing, i = self.routing, self.sample
        weights = {name: round(float(routing.weights[i, routing.names.index(name)]), 6) for name in routing.experts[i]}
        content = {
            "input": self.given,
            "answer": self.answer,
            "experts": weights,
            "in_domain": bool(routing.in_domain[i]),
            "score": round(float(routing.scores[i]), 6),
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
) -> list[Answer]:
    """Answer prompts or classify images in one batch; see `cli.generate` for the arguments.

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
        return _classify(model, processor, images)
    if images:
        raise UserError(f"{routed}: reads text; give --prompt TEXT instead of --image")
    return _generate(model, processor, prompts, max_new_tokens, sample, seed)


def _generate(
    model: NeuronRoutedModel, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, sample: bool, seed: int
) -> list[Answer]:
    limit = text_limit(model.config)
    for prompt in prompts:
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
    output, routing = model.generate(
        **inputs,
        return_routing=True,
        max_new_tokens=max_new_tokens,
        do_sample=sample,
        pad_token_id=tokenizer.pad_token_id,
    )
    if model.kind == "causal":
        output = output[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [Answer(p, text.strip(), routing, i) for i, (p, text) in enumerate(zip(prompts, texts, strict=True))]


def _classify(model: NeuronRoutedModel, processor: Any, images: Sequence[Path]) -> list[Answer]:
    from PIL import Image, UnidentifiedImageError

    opened = []
    for path in images:
        try:
            opened.append(Image.open(path).convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"--image {path}: cannot be read as an image ({error})") from None
    pixels = processor(opened, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    with torch.no_grad():
        output, routing = model(pixel_values=pixels, return_routing=True)
    labels = model.config.id2label
    return [
        Answer(str(path), str(labels.get(int(c), int(c))), routing, i)
        for i, (path, c) in enumerate(zip(images, output.logits.argmax(1), strict=True))
    ]
