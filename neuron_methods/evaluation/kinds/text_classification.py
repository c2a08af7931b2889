"""Tasks for a classifier of texts, or of pairs of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from neuron_methods.data.batching import pad
from neuron_methods.evaluation.examples import Outcome
from neuron_methods.evaluation.kinds.classification import Classification
from neuron_methods.evaluation.kinds.scorer import longest_input
from neuron_methods.evaluation.kinds.setting_checks import whole_number


class TextClassification(Classification):
    """The class of a text with the largest logit; the column `pair` holds a second text."""

    columns: ClassVar[Mapping[str, str]] = {"text": "text", "label": "label"}
    optional_columns = ("pair",)
    settings: ClassVar = {**Classification.settings, "max_length": whole_number()}
    models = ("text-classification",)
    needed = "a text classifier with its head (…ForSequenceClassification)"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        config, tokenizer = self.model.config, self.part("tokenizer")
        bound = longest_input(self.task, config)
        self.inputs: list[dict[str, list[int]]] = []
        self.truncated: list[bool] = []
        for index in range(len(self.examples)):
            texts = [self.examples.text(index, role) for role in ("text", "pair") if role in self.task.columns]
            whole = tokenizer(*texts)
            cut = bound is not None and len(whole["input_ids"]) > bound
            self.inputs.append(dict(tokenizer(*texts, truncation=True, max_length=bound) if cut else whole))
            self.truncated.append(cut)
        self.pad = getattr(config, "pad_token_id", None)

    def length(self, index: int) -> int:
        """Count the tokens."""
        return len(self.inputs[index]["input_ids"])

    def score(self, indices: Sequence[int]) -> list[Outcome]:
        """Classify texts."""
        # A decoder that knows no padding cannot tell where a padded text ends.
        size = len(indices) if self.pad is not None else 1
        logits = torch.cat([self._logits(indices[i : i + size]) for i in range(0, len(indices), size)])
        outcomes = self.outcomes(logits, indices)
        return [replace(o, truncated=self.truncated[i]) for i, o in zip(indices, outcomes, strict=True)]

    def _logits(self, indices: Sequence[int]) -> torch.Tensor:
        fill = {"input_ids": self.pad or 0, "attention_mask": 0, "token_type_ids": 0}
        inputs = {
            name: pad([self.inputs[i][name] for i in indices], value)[0].to(self.device)
            for name, value in fill.items()
            if name in self.inputs[indices[0]]
        }
        return self.model(**inputs).logits.float().cpu()
