"""Tasks scored by how likely a text is: multiple choice, perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from neuron_methods.data.batching import batched, by_length, pad
from neuron_methods.evaluation.examples import Examples, Outcome
from neuron_methods.evaluation.kinds.scorer import Scorer, longest_input, shortened
from neuron_methods.evaluation.kinds.setting_checks import one_of, string, whole_number
from neuron_methods.support.errors import UserError

#: Tokens of a window of perplexity, unless the task or the model sets another bound.
WINDOW = 1024


class MultipleChoice(Scorer):
    """The choice that is likeliest after the input, for a causal or a text-to-text model.

    `normalize: tokens` compares log-likelihoods per token, so that long choices are not at a disadvantage;
    `normalize: none` compares their sums.
    """

    columns: ClassVar[Mapping[str, str]] = {"input": "input", "choices": "choices", "label": "label"}
    settings: ClassVar = {
        "normalize": one_of("none", "tokens"),
        "separator": string(empty=True),
        "max_length": whole_number(2),
    }
    batch_size = 16

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.tokenizer = self.part("tokenizer")
        self.encodes = bool(getattr(self.model.config, "is_encoder_decoder", False))
        self.longest = longest_input(self.task, self.model.config)
        self.choices, self.targets = read_choices(self.examples)
        self.truncated = [False] * len(self.examples)
        self.pairs = [[self._pair(i, choice) for choice in choices] for i, choices in enumerate(self.choices)]

    @classmethod
    def check_examples(cls, examples: Examples, config: Any) -> None:
        """Refuse an example without choices, or without a label among them."""
        read_choices(examples)

    def length(self, index: int) -> int:
        """Count the tokens of the input and the longest choice."""
        return max(len(before) + len(after) for before, after in self.pairs[index])

    def score(self, indices: Sequence[int]) -> list[Outcome]:
        """Find the likeliest choice of each."""
        flat = [(place, pair) for place, i in enumerate(indices) for pair in self.pairs[i]]
        likelihoods = self._likelihoods([pair for _, pair in flat])
        if self.task.settings.get("normalize", "none") == "tokens":
            likelihoods = [value / len(pair[1]) for value, (_, pair) in zip(likelihoods, flat, strict=True)]
        outcomes, following = [], iter(likelihoods)
        for i in indices:
            right, choices = self.targets[i], self.choices[i]
            own = [next(following) for _ in choices]
            best = own.index(max(own))
            row = self.examples.samples[i].row
            outcomes.append(
                Outcome(row, float(best == right), choices[best], choices[right], truncated=self.truncated[i])
            )
        return outcomes

    def _pair(self, index: int, choice: str) -> tuple[list[int], list[int]]:
        """Split into tokens that are given and tokens that are scored."""
        text = self.examples.text(index, "input")
        before = self.tokenizer(text)["input_ids"]
        if self.encodes:
            before, self.truncated[index] = shortened(before, self.longest, keep_end=False)
            return before, self.tokenizer(text_target=choice)["input_ids"]
        whole = self.tokenizer(text + self.task.settings.get("separator", " ") + choice)["input_ids"]
        same = 0  # the last token of the input may become another one where the choice follows
        while same < min(len(before), len(whole) - 1) and before[same] == whole[same]:
            same += 1
        same = max(same, 1)
        before, after = whole[:same], whole[same:]
        room = None if self.longest is None else self.longest - len(after)
        if room is not None and room < 1:
            raise self.examples.wrong(index, "choices", f"at most {self.longest - 1} tokens per choice")
        before, cut = shortened(before, room, keep_end=True)
        self.truncated[index] |= cut
        return before, after

    def _likelihoods(self, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        found = [0.0] * len(pairs)
        order = by_length([len(before) + len(after) for before, after in pairs])
        score = self._encoded if self.encodes else self._continued
        for chosen in batched(order, self.task.batch_size):
            for i, value in zip(chosen, score([pairs[i] for i in chosen]), strict=True):
                found[i] = value
        return found

    def _continued(self, batch: list[tuple[list[int], list[int]]]) -> list[float]:
        sequences = [before + after for before, after in batch]
        starts = [len(before) for before, _ in batch]
        options = {}
        if hasattr(self.model, "route"):  # by what is given alone: the choices of a question go the same way
            ids, mask = pad_right([before for before, _ in batch], self.device)
            options["routing"] = self.model.route(input_ids=ids, attention_mask=mask)
        return causal_log_likelihoods(self.model, sequences, starts, self.device, **options)

    def _encoded(self, batch: list[tuple[list[int], list[int]]]) -> list[float]:
        ids, mask = pad_right([before for before, _ in batch], self.device)
        said, said_mask = pad_right([after for _, after in batch], self.device)
        labels = said.masked_fill(said_mask == 0, -100)
        plain = self.model.base if hasattr(self.model, "route") else self.model
        decoder_ids = plain.prepare_decoder_input_ids_from_labels(labels)
        output = self.model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False)
        return [_sum(logits, ids) for logits, ids in zip(output.logits, [after for _, after in batch], strict=True)]


class Perplexity(Scorer):
    """exp of the mean negative log-likelihood of a token, over the tokens of all texts.

    A text longer than the window (`max_length`, by default 1024 or what the model reads) is read window after window,
    each beginning with the last token of the one before, so that every token but the first is scored once.
    """

    columns: ClassVar[Mapping[str, str]] = {"text": "text"}
    metrics = ("perplexity",)
    models = ("causal",)
    needed = "a causal language model"
    settings: ClassVar = {"max_length": whole_number(2)}
    batch_size = 8

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        width = longest_input(self.task, self.model.config, unless_set=WINDOW)
        tokenizer = self.part("tokenizer")
        texts = [tokenizer(self.examples.text(i, "text"))["input_ids"] for i in range(len(self.examples))]
        self.tokens = [max(len(tokens) - 1, 0) for tokens in texts]
        self.windows = [
            [tokens[start : start + width] for start in range(0, len(tokens) - 1, width - 1)] for tokens in texts
        ]
        if not any(self.tokens):
            raise UserError(f"task {self.task.name!r}: no text has a second token to predict")

    def length(self, index: int) -> int:
        """Count the tokens of the text."""
        return self.tokens[index]

    def score(self, indices: Sequence[int]) -> list[Outcome]:
        """Compute the negative log-likelihood of each text, in nats."""
        flat = [(i, window) for i in indices for window in self.windows[i]]
        sums = dict.fromkeys(indices, 0.0)
        for batch in batched(flat, self.task.batch_size):
            found = causal_log_likelihoods(self.model, [w for _, w in batch], [1] * len(batch), self.device)
            for (i, _), value in zip(batch, found, strict=True):
                sums[i] -= value
        return [Outcome(self.examples.samples[i].row, sums[i], weight=self.tokens[i]) for i in indices]


def causal_log_likelihoods(
    model: Any, sequences: Sequence[list[int]], starts: Sequence[int], device: torch.device, **options: Any
) -> list[float]:
    """Compute the log-likelihood of each sequence's tokens from its `start` (1 or more) on, given those before.

    Nats, summed in float64. Sequences are of any lengths; options go to the model.
    """
    ids, mask = pad_right(sequences, device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
    return [
        _sum(row[start - 1 : len(tokens) - 1], tokens[start:])
        for row, tokens, start in zip(logits, sequences, starts, strict=True)
    ]


def _sum(logits: Tensor, tokens: Sequence[int]) -> float:
    """Add up log-likelihoods of `tokens`, each predicted by the logits (positions, vocabulary) in its place."""
    wanted = torch.tensor(tokens, device=logits.device)
    chosen = logits[: len(tokens)].float().log_softmax(dim=-1)
    return float(chosen.gather(1, wanted[:, None]).double().sum())


def pad_right(sequences: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Lay sequences side by side on a device: ids and mask, int64 (B, T)."""
    ids, mask = pad(sequences)
    return ids.to(device), mask.long().to(device)


def read_choices(examples: Examples) -> tuple[list[list[str]], list[int]]:
    """Read the choices of every example, and the place of the right one.

    Choices are a list of texts, or ``{text: [...], label: [...]}``; the label is a place, a choice's text, or one of
    the labels beside the choices.

    Raises:
        UserError: an example is neither.
    """
    all_choices, targets = [], []
    for index in range(len(examples)):
        choices, label = examples.value(index, "choices"), examples.value(index, "label")
        names = choices.get("label") if isinstance(choices, dict) else None
        choices = choices.get("text") if isinstance(choices, dict) else choices
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise examples.wrong(index, "choices", "a list of two texts or more")
        for known in (names, choices):
            if isinstance(label, str) and known and label in known:
                label = known.index(label)
        if isinstance(label, str) and label.isdecimal():
            label = int(label)
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
            raise examples.wrong(
                index, "label", f"one of the {len(choices)} choices, by its place from 0 on or its text"
            )
        all_choices.append(choices)
        targets.append(label)
    return all_choices, targets
