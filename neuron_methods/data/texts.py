"""Feeders for models that read text; see `feeders`.

Text is cut off at `max_length` tokens and padded on the right. Two columns make one sequence for a decoder: input,
separator, target, and the loss is over the target alone. A sample's loss is the mean over its targets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from neuron_methods.data.batching import pad
from neuron_methods.data.feeders import Batch, Feeder, orders_and_rows
from neuron_methods.data.sources import Sample, SourceReader
from neuron_methods.data.tokens import SeenLately, TokenBatch, decoder_identity, prefix_identity, sequence_identity
from neuron_methods.support.errors import UserError

NO_TOKEN = -1


class TextFeeder(Feeder):
    """Decoders with a causal loss, and other text models without one.

    Attributes:
        truncates: whether texts are cut off at `max_length`; else longer ones are refused.
    """

    columns = ("text",)
    truncates: bool = True

    def __init__(self, tokenizer: Any, max_length: int, context: int, causal: bool, separator: str = "\n") -> None:
        """Make a feeder whose exemplars show `context` tokens on either side; `separator` joins two columns."""
        self.separator = separator
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.context = context
        self.has_loss = self.causal = causal
        self._seen: dict[str, SeenLately] = {}

    def start(self, reader: SourceReader, gradients: bool) -> None:
        """Get ready; what was seen in other sources is forgotten."""
        super().start(reader, gradients)
        self._seen = {}

    def payload_width(self, stream: str) -> int:
        """Count the token and its context on both sides."""
        return 2 * self.context + 1

    def batch(self, samples: list[Sample]) -> Batch:
        """Lay out one sequence per sample."""
        texts = self.texts(samples, 0)
        if len(self.reader.columns) < 2:
            return self.sequences(self.tokenize(texts), [1] * len(texts), samples)
        return self.answered(*self.pairs(texts, self.texts(samples, 1)), samples)

    def prompts(self, samples: list[Sample]) -> list[list[int]]:
        """Make the token ids of what a model is to answer: a separator follows where there is a column of answers.

        One of spaces does not: tokenizers write it with the word that comes next, and the model is to say that itself.
        """
        separator = self.separator if len(self.reader.columns) > 1 and not self._spaced else ""
        return self.tokenize([text + separator for text in self.texts(samples, 0)])

    def answered(self, prompts: list[list[int]], answers: list[list[int]], samples: list[Sample]) -> Batch:
        """Lay out token ids of prompts with those of their answers, which are targets."""
        both = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        if self.truncates:
            both = [tokens[: self.max_length] for tokens in both]
        self.refuse_long(self.texts(samples, 0), both)
        return self.sequences(both, [len(prompt) for prompt in prompts], samples)

    def pairs(self, inputs: list[str], targets: list[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Make the token ids of inputs and of their targets.

        The separator is tokenized with the input; one of spaces with the target, so that an input has the same tokens
        whether a target follows or not.
        """
        if not self._spaced:
            return self.tokenize([text + self.separator for text in inputs]), self.tokenize(targets, special=False)
        return self.tokenize(inputs), self.tokenize([self.separator + text for text in targets], special=False)

    @property
    def _spaced(self) -> bool:
        """Whether the separator is spaces and nothing else."""
        return bool(self.separator) and not self.separator.strip(" ")

    def sequences(self, sequences: list[list[int]], starts: list[int], samples: list[Sample]) -> Batch:
        """Lay out token ids; in each sequence the tokens from `starts` on are targets."""
        ids, mask = pad(sequences)
        is_target = mask & (torch.arange(ids.shape[1]) >= torch.tensor(starts)[:, None])
        identity = prefix_identity(ids) if self.causal else sequence_identity(ids, mask)
        next_tokens = functional.pad(torch.where(is_target, ids, -100)[:, 1:], (0, 1), value=-100)
        return Batch(
            {"input_ids": ids, "attention_mask": mask.long()},
            {"": self.stream("", ids, mask, identity, samples)},
            next_tokens,
        )

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Measure how well the next token is told."""
        return target_loss(output.logits, batch.targets)

    def describe(self, stream: str, payloads: Tensor) -> list[dict[str, str]]:
        """Tell the token and the text before and after it."""
        windows = payloads.tolist()
        before, with_token, whole = (
            self.tokenizer.batch_decode([[t for t in window[:end] if t != NO_TOKEN] for window in windows])
            for end in (self.context, self.context + 1, 2 * self.context + 1)
        )
        return [
            {"before": b, "token": t.removeprefix(b), "after": w.removeprefix(t)}
            for b, t, w in zip(before, with_token, whole, strict=True)
        ]

    def texts(self, samples: list[Sample], column: int) -> list[str]:
        """Read the values of a column, which must be text."""
        for sample in samples:
            if not isinstance(sample.values[column], str):
                raise self.wrong_value(sample, column, "text")
        return [sample.values[column] for sample in samples]

    def tokenize(self, texts: list[str], special: bool = True) -> list[list[int]]:
        """Make token ids, at most `max_length` per text; raises UserError for a longer one that is not to be cut."""
        options = {"truncation": True, "max_length": self.max_length} if self.truncates else {}
        sequences = self.tokenizer(texts, add_special_tokens=special, **options)["input_ids"]
        self.refuse_long(texts, sequences)
        return sequences

    def refuse_long(self, texts: list[str], sequences: list[list[int]]) -> None:
        """Raise UserError if one of the texts has too many tokens."""
        for text, tokens in zip(texts, sequences, strict=True):
            if len(tokens) > self.max_length:
                raise UserError(
                    f"{self.reader.label}: a sample is {len(tokens)} tokens long ({text[:30]!r}...), and "
                    f"{self.max_length} is the limit (max_length, or what the model can read); shorten it or raise the "
                    "limit"
                )

    def stream(self, name: str, ids: Tensor, mask: Tensor, identity: Tensor, samples: list[Sample]) -> TokenBatch:
        """Describe one stream's tokens, each with the window around it; `ids`, `mask` and `identity` are (B, T)."""
        margin = torch.full((len(ids), self.context), NO_TOKEN)
        around = torch.cat((margin, ids.masked_fill(~mask, NO_TOKEN), margin), dim=1).int()
        windows = around.unfold(1, 2 * self.context + 1, 1)
        valid = mask.flatten().nonzero().squeeze(1)
        fresh = self._seen.setdefault(name, SeenLately()).fresh(identity, valid)
        return TokenBatch(
            *orders_and_rows(samples),
            windows,
            identity,
            valid=None if len(valid) == mask.numel() else valid,
            fresh=None if len(fresh) == len(valid) else fresh,
        )


class TextToTextFeeder(TextFeeder):
    """T5 and its kin: the encoder reads the first column, the decoder has to say the second."""

    columns = ("input", "target")
    columns_needed = columns_for_loss = 2

    def __init__(self, tokenizer: Any, max_length: int, context: int, model: PreTrainedModel) -> None:
        """Make a feeder; `model` knows how targets become the decoder's inputs."""
        super().__init__(tokenizer, max_length, context, causal=True)
        self.model = model
        self.has_loss = "ForConditionalGeneration" in type(model).__name__

    def stream_of(self, layer_key: str) -> str:
        """Name ``encoder`` or ``decoder``; keys and values of the attention to the encoder read what that says."""
        from_encoder = layer_key.startswith("encoder.") or layer_key.endswith(
            (".EncDecAttention.k", ".EncDecAttention.v")
        )
        return "encoder" if from_encoder else "decoder"

    def prompts(self, samples: list[Sample]) -> list[list[int]]:
        """Make the token ids of what the encoder reads."""
        return self.tokenize(self.texts(samples, 0))

    def batch(self, samples: list[Sample]) -> Batch:
        """Lay out inputs and targets, padded apart."""
        return self.answered(self.prompts(samples), self.tokenize(self.texts(samples, 1)), samples)

    def answered(self, prompts: list[list[int]], answers: list[list[int]], samples: list[Sample]) -> Batch:
        """Lay out token ids of inputs and of their answers, padded apart."""
        ids, mask = pad(prompts)
        targets, target_mask = pad(answers)
        labels = targets.masked_fill(~target_mask, -100)
        decoder_ids = self.model._shift_right(labels)
        read = sequence_identity(ids, mask)
        said = decoder_identity(decoder_ids, read)
        return Batch(
            {"input_ids": ids, "attention_mask": mask.long(), "decoder_input_ids": decoder_ids},
            {
                "encoder": self.stream("encoder", ids, mask, read, samples),
                "decoder": self.stream("decoder", decoder_ids, target_mask, said, samples),
            },
            labels,
        )


def target_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Measure the cross-entropy, the mean over the targets of each sample, added up over samples.

    Logits are (B, T, vocabulary), targets (B, T), -100 where nothing is to be predicted.
    """
    # Flat: over a transposed view of the logits the same takes half as long again.
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none"
    )
    return (losses.view(targets.shape).sum(1) / (targets != -100).sum(1).clamp(min=1)).sum()
