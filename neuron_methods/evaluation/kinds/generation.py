"""Tasks whose answer the model says itself, greedily: a causal model goes on, a text-to-text model answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import regex
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from neuron_methods.data.batching import pad
from neuron_methods.evaluation.examples import Outcome
from neuron_methods.evaluation.kinds.code import PASS_AT_1, passes, program
from neuron_methods.evaluation.kinds.prompting import CHAT, FEW_SHOT, Prompts, check_chat
from neuron_methods.evaluation.kinds.scorer import Scorer, longest_input, shortened
from neuron_methods.evaluation.kinds.setting_checks import pattern, string, whole_number
from neuron_methods.evaluation.scores import TEXT_METRICS, check_metric
from neuron_methods.evaluation.tasks import Task
from neuron_methods.models.greedy import greedy_answers
from neuron_methods.models.kinds import text_limit
from neuron_methods.support.errors import UserError

#: Seconds that `extract` may look for what it finds in one answer.
MATCHING = 10.0


class Generation(Scorer):
    """A causal model goes on from the prompt; what it says up to `stop` is the answer."""

    columns: ClassVar[Mapping[str, str]] = {"input": "input", "target": "target"}
    metrics = (*TEXT_METRICS, PASS_AT_1)
    models = ("causal",)
    needed = "a causal language model (text-to-text is a kind of its own)"
    settings: ClassVar = {
        "max_new_tokens": whole_number(),
        "stop": string('the text that ends an answer, such as "\\n"'),
        "max_length": whole_number(),
        "extract": pattern(),
        "separator": string(empty=True),
        **FEW_SHOT,
        **CHAT,
    }
    path_settings = ("template",)
    default_new_tokens: ClassVar[int] = 32
    #: Whether prompt and answer are one text, and share what the model can read.
    goes_on: ClassVar[bool] = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.tokenizer = self.part("tokenizer")
        self.new_tokens: int = self.task.settings.get("max_new_tokens", self.default_new_tokens)
        self.longest = longest_input(self.task, self.model.config, self.new_tokens if self.goes_on else 0)
        separator = self.task.settings.get("separator", " ")
        asked = Prompts(self.tokenizer, self.examples, lambda e, i: e.texts(i, "target")[0], separator=separator)
        self.prompting, self.notes = asked.account(), asked.notes() if self.goes_on else []
        texts = [asked.tokens(index) for index in range(len(self.examples))]
        cut = [shortened(tokens, self.longest, keep_end=self.goes_on) for tokens in texts]
        self.prompts = [tokens for tokens, _ in cut]
        self.truncated = [was_cut for _, was_cut in cut]
        self.settings_of_generate = greedy_answers(self.model, self.tokenizer, self.new_tokens, asked.ends())
        found = self.task.settings.get("extract")
        self.extract = regex.compile(found) if found else None

    @classmethod
    def check_model(cls, task: Task, config: Any, architecture: str, shown: str) -> None:
        """Refuse, too, a model that has no room for a prompt and its answer."""
        super().check_model(task, config, architecture, shown)
        check_metric(task)
        limit, new = text_limit(config), task.settings.get("max_new_tokens", cls.default_new_tokens)
        if cls.goes_on and limit is not None and new >= limit:
            raise UserError(
                f"task {task.name!r}: max_new_tokens: model {shown} reads {limit} tokens, {new} leave none for a prompt"
            )

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> tuple[str, str] | None:
        """Find what has no effect."""
        if "separator" in settings and not settings.get("few_shot"):
            return "separator", "stands between a shown question and its answer; give few_shot, too, or remove it"
        return check_chat(settings)

    def length(self, index: int) -> int:
        """Count the tokens of the prompt."""
        return len(self.prompts[index])

    def score(self, indices: Sequence[int]) -> list[Outcome]:
        """Answer, and compare with the target."""
        outcomes = []
        for index, answer in zip(indices, self._answer([self.prompts[i] for i in indices]), strict=True):
            targets = self.examples.texts(index, "target")
            shown = targets[0] if len(targets) == 1 else targets
            row = self.examples.samples[index].row
            score = self.measure(answer, targets, index)
            outcomes.append(Outcome(row, score, answer, shown, truncated=self.truncated[index]))
        return outcomes

    def measure(self, answer: str, targets: list[str], index: int) -> float:
        """Score an answer, 0 to 1; what `extract` finds in it, where the task has one."""
        if self.task.metric == PASS_AT_1:
            asked = "" if self.prompting["chat"] else self.examples.text(index, "input")
            return passes(program(asked, answer), targets, f"task {self.task.name!r}")
        if self.extract is not None:
            try:
                found = self.extract.search(answer, timeout=MATCHING)
            except TimeoutError:
                row = self.examples.samples[index].row + 1
                raise UserError(
                    f"task {self.task.name!r}: extract: takes more than {MATCHING:.0f} s in the answer to row {row}; "
                    "an expression that goes back less, without repetitions within repetitions, will do"
                ) from None
            answer = "" if found is None else (found[1] or "") if self.extract.groups else found[0]
        return TEXT_METRICS[self.task.metric](answer, targets)

    def _answer(self, prompts: list[list[int]]) -> list[str]:
        # On the left, so that answers follow their prompts.
        ids, mask = pad(prompts, self.settings_of_generate.pad_token_id, left=self.goes_on)
        said_from = ids.shape[1] if self.goes_on else 0
        stop = self.task.settings.get("stop")
        criteria = StoppingCriteriaList([StopAt(self.tokenizer, stop, said_from)] if stop else [])
        output = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.long().to(self.device),
            generation_config=self.settings_of_generate,
            stopping_criteria=criteria,
        )
        texts = self.tokenizer.batch_decode(output[:, said_from:], skip_special_tokens=True)
        ended = [text.split(stop)[0] if stop else text for text in texts]
        # A program's first line may begin with blanks that mean something.
        return [text if self.task.metric == PASS_AT_1 else text.strip() for text in ended]


class TextToText(Generation):
    """A text-to-text model (T5 and its kin) answers the input."""

    settings: ClassVar = {key: check for key, check in Generation.settings.items() if key not in CHAT}
    path_settings = ()
    models = ("text-to-text",)
    needed = "a text-to-text model such as T5 (causal models: generation)"
    goes_on = False


class StopAt(StoppingCriteria):
    """The end of each answer that holds a text."""

    def __init__(self, tokenizer: Any, stop: str, start: int) -> None:
        """Look for `stop` in what comes after the first `start` tokens."""
        self.tokenizer, self.stop, self.start = tokenizer, stop, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Tell which rows are done, bool (B,)."""
        said = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        return torch.tensor([self.stop in text for text in said], device=input_ids.device)
