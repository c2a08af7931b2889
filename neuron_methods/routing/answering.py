"""What `mergekit-neuron generate` does: a batch of prompts or images in, answers with their routing out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

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


@dataclass(frozen=True)
class _Answer:
    """What a sample was answered, how it was routed (a routing of it alone), and whose head it is, if any is."""

    text: str
    routing: Routing
    head: str | None = None

    def told(self, given: str, as_json: bool) -> str:
        """Tell it, behind what was given."""
        routing = self.routing
        if not as_json:
            head = "" if self.head is None else f" (head: {self.head})"
            return f"{given}\n  answer:  {self.text}{head}\n  routing: {routing.describe(0)}"
        weights = dict(zip(routing.names, routing.weights[0].tolist(), strict=True))
        content = {
            "input": given,
            "answer": self.text,
            **({} if self.head is None else {"head": self.head}),
            "experts": {name: round(weights[name], 6) for name in routing.experts[0]},
            "in_domain": bool(routing.in_domain[0]),
            "score": round(float(routing.scores[0]), 6),
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
    given: Sequence[Any] = images or prompts
    if model.kind == "image-classification":
        if prompts:
            raise UserError(f"{routed}: classifies images; give --image FILE instead of --prompt")
        opened = [read_image(path, f"--image {path}") for path in images]
        pixels = processor(opened, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
        answers = _classify(model, [{"pixel_values": pixels}])
    elif images:
        raise UserError(f"{routed}: reads text; give --prompt TEXT instead of --image")
    elif model.kind == "text-classification":
        # One by one: a decoder that knows no padding cannot tell where a padded text ends.
        encoded = [encoded_prompt(processor, model.config, prompt) for prompt in prompts]
        there = [{k: torch.tensor([v], device=model.device) for k, v in text.items()} for text in encoded]
        answers = _classify(model, there)
    else:
        answers = _generate(model, processor, prompts, max_new_tokens, sample, seed)
    return [answer.told(str(what), as_json) for what, answer in zip(given, answers, strict=True)]


def _generate(
    model: NeuronRoutedModel, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, sample: bool, seed: int
) -> list[_Answer]:
    for prompt in prompts:
        encoded_prompt(tokenizer, model.config, prompt, max_new_tokens)
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
    return [_Answer(text.strip(), routing[[i]]) for i, text in enumerate(texts)]


def encoded_prompt(tokenizer: Any, config: PretrainedConfig, prompt: str, room: int = 0) -> dict[str, list[int]]:
    """Tokenize a prompt, and make sure that it says something and leaves room in the context.

    Args:
        tokenizer: of transformers.
        config: of the model that is asked.
        prompt: the text.
        room: tokens that are to follow.

    Raises:
        UserError: it holds no text, none in tokens, or is too long.
    """
    if not prompt.isascii() and prompt.encode(errors="ignore").decode() != prompt:
        raise UserError(f"--prompt {prompt!r}: holds what is no character; give it as UTF-8")
    encoded, limit = tokenizer(prompt), text_limit(config)
    tokens = len(encoded["input_ids"])
    if not tokens:
        raise UserError(f"--prompt {prompt!r}: no token in it; give a text")
    if limit is not None and tokens + room > limit:
        wanted = f" and --max-new-tokens {room}" if room else ""
        problem = f"{tokens} tokens{wanted} are more than the context of {limit}"
        raise UserError(f"--prompt {prompt[:30]!r}...: {problem}; shorten {'one of them' if room else 'it'}")
    return {key: encoded[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in encoded}


def _classify(model: NeuronRoutedModel, batches: Sequence[dict[str, Any]]) -> list[_Answer]:
    """Name each sample's class, and its head where there are several."""
    labels, answers = model.config.id2label, []
    for batch in batches:
        with torch.no_grad():
            output, routing = model(**batch, return_routing=True)
        found = output.logits.argmax(1).tolist()
        heads = getattr(output, "heads", [None] * len(found))
        answers += [
            _Answer(str(labels.get(number, number)), routing[[i]], head)
            for i, (number, head) in enumerate(zip(found, heads, strict=True))
        ]
    return answers
