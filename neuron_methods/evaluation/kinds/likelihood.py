"""Tasks scored by how likely a text is: multiple choice, perplexity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from neuron_methods.data.batching import batched, by_length, pad
from neuron_methods.evaluation.examples import Examples, Outcome
from neuron_methods.evaluation.kinds.prompting import CHAT, FEW_SHOT, Prompts, chats, check_chat
from neuron_methods.evaluation.kinds.scorer import Scorer, longest_input, shortened
from neuron_methods.evaluation.kinds.setting_checks import one_of, string, whole_number
from neuron_methods.evaluation.tasks import Task
from neuron_methods.support.errors import UserError

#: Tokens of a window of perplexity, unless the task or the model sets another bound.
WINDOW = 1024


class MultipleChoice(Scorer):
    """The choice that is likeliest after the input, for a causal or a text-to-text model.

    `normalize: tokens` compares log-likelihoods per token, so that long choices are not at a disadvantage;
    `normalize: none` compares their sums. In a chat a choice is what the model says, with no separator unless given.
    """

    columns: ClassVar[Mapping[str, str]] = {"input": "input", "choices": "choices", "label": "label"}
    settings: ClassVar = {
        "normalize": one_of("none", "tokens"),
        "separator": string(empty=True),
        "max_length": whole_number(2),
        **FEW_SHOT,
        **CHAT,
    }
    path_settings = ("template",)
    batch_size = 16

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.tokenizer = self.part("tokenizer")
        self.encodes = bool(getattr(self.model.config, "is_encoder_decoder", False))
        self.longest = longest_input(self.task, self.model.config)
        self.choices, self.targets = read_choices(self.examples)
        self.separator = self.task.settings.get("separator", "" if chats(self.task.settings) else " ")
        shots = read_choices(self.examples.shots) if self.examples.shots is not None else ([], [])
        right = [choices[place] for choices, place in zip(*shots, strict=True)]
        self.asked = Prompts(self.tokenizer, self.examples, lambda _, i: right[i], separator=self.separator)
        self.prompting, self.notes = self.asked.account(), [] if self.encodes else self.asked.notes()
        self.truncated = [False] * len(self.examples)
        self.pairs = [[self._pair(i, choice) for choice in choices] for i, choices in enumerate(self.choices)]

    @classmethod
    def check_examples(cls, examples: Examples, config: Any) -> None:
        """Refuse an example without choices, or without a label among them."""
        read_choices(examples)

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> tuple[str, str] | None:
        """Find what has no effect."""
        return check_chat(settings)

    @classmethod
    def check_model(cls, task: Task, config: Any, architecture: str, shown: str) -> None:
        """Refuse a chat with a text-to-text model, too."""
        super().check_model(task, config, architecture, shown)
        if chats(task.settings) and getattr(config, "is_encoder_decoder", False):
            raise UserError(f"task {task.name!r}: chat: model {shown} is text-to-text; chats are for causal models")

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
        text = self.asked.text(index)
        if self.encodes:
            before, self.truncated[index] = shortened(self.asked.tokenize(text), self.longest, keep_end=False)
            return before, self.tokenizer(text_target=choice)["input_ids"]
        before, after = given_and_said(self.asked.tokenize, text, self.separator + choice)
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
    each beginning with the last token of the one before, so that every token but the first is scored once. In a chat
    the text is what the model says to the column `input`, and scored alone.
    """

    columns: ClassVar[Mapping[str, str]] = {"text": "text"}
    optional_columns = ("input",)
    metrics = ("perplexity",)
    models = ("causal",)
    needed = "a causal language model"
    settings: ClassVar = {"max_length": whole_number(2), **CHAT}
    path_settings = ("template",)
    batch_size = 8

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        width = longest_input(self.task, self.model.config, unless_set=WINDOW)
        asked = Prompts(self.part("tokenizer"), self.examples, lambda _e, _i: "")
        self.prompting, self.notes = asked.account(), asked.notes()
        if ("input" in self.task.columns) != asked.chat:
            problem = "the column input is what the user says" if asked.chat else "the column input is of a chat alone"
            raise UserError(f"task {self.task.name!r}: columns: {problem}; give both, chat: true and input, or neither")
        self.tokens, self.windows = [], []
        for index in range(len(self.examples)):
            text = self.examples.text(index, "text")
            if asked.chat:
                before, after = given_and_said(asked.tokenize, asked.text(index), text)
            else:
                tokens = asked.tokenize(text)
                before, after = tokens[:1], tokens[1:]
            self.tokens.append(len(after))
            self.windows.append(windows(before + after, len(before), width))
        if not any(self.tokens):
            raise UserError(f"task {self.task.name!r}: no text has a second token to predict")

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> tuple[str, str] | None:
        """Find what has no effect."""
        return check_chat(settings)

    def length(self, index: int) -> int:
        """Count the tokens of the text."""
        return self.tokens[index]

    def score(self, indices: Sequence[int]) -> list[Outcome]:
        """Compute the negative log-likelihood of each text, in nats."""
        flat = [(i, window) for i in indices for window in self.windows[i]]
        sums = dict.fromkeys(indices, 0.0)
        for batch in batched(flat, self.task.batch_size):
            tokens, starts = [window for _, (window, _) in batch], [start for _, (_, start) in batch]
            found = causal_log_likelihoods(self.model, tokens, starts, self.device)
            for (i, _), value in zip(batch, found, strict=True):
                sums[i] -= value
        return [Outcome(self.examples.samples[i].row, sums[i], weight=self.tokens[i]) for i in indices]


def given_and_said(tokenize: Callable[[str], list[int]], given: str, said: str) -> tuple[list[int], list[int]]:
    """Split the tokens of a text into those that are given, one at least, and those that are scored.

    The last token of what is given may become another one where more follows; it is scored, then.
    """
    before, whole = tokenize(given), tokenize(given + said)
    same = 0
    while same < min(len(before), len(whole) - 1) and before[same] == whole[same]:
        same += 1
    same = max(same, 1)
    return whole[:same], whole[same:]


def windows(tokens: list[int], given: int, width: int) -> list[tuple[list[int], int]]:
    """Cut tokens into windows that share one token each; with the place in each from which on tokens are scored.

    Args:
        tokens: of a text.
        given: how many of them, one at least, are not scored.
        width: of a window.
    """
    starts = range(0, len(tokens) - 1, width - 1)
    cut = [(tokens[start : start + width], max(1, given - start)) for start in starts]
    return [(window, start) for window, start in cut if start < len(window)]


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
