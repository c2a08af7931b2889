"""What a model is asked: the prompt as the data has it, behind worked examples, or through its chat template.

Without `chat` a prompt is the text of its column, as in lm-evaluation-harness 0.4, where chat templates are off unless
they are asked for. With it, the column is what the user says, and the model's own template makes the prompt of it.
`few_shot: N` puts N examples of the validation split before it, the same for all; in a chat they are earlier turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from neuron_methods.evaluation.examples import Examples
from neuron_methods.evaluation.kinds.setting_checks import string, truth, whole_number
from neuron_methods.evaluation.tasks import Task
from neuron_methods.models.chat import rendered
from neuron_methods.support.documents import read_text
from neuron_methods.support.errors import UserError, explained_by

#: The keys of a task that say how it is asked in a chat, each with its check.
CHAT = {"chat": truth(), "system": string("what the system says"), "template": string("a file with a chat template")}
FEW_SHOT = {"few_shot": whole_number(0)}
#: Between worked examples, where there is no chat; as in lm-evaluation-harness.
BETWEEN = "\n\n"

Message = dict[str, str]


def chats(settings: Mapping[str, Any]) -> bool:
    """Tell whether prompts go through a chat template: whether a task says so, or says what only a chat has."""
    return bool(settings.get("chat", "system" in settings or "template" in settings))


def check_chat(settings: Mapping[str, Any]) -> tuple[str, str] | None:
    """Find what has no effect without a chat; (key, what is wrong)."""
    for key in ("system", "template"):
        if key in settings and not chats(settings):
            return key, "has no effect with chat: false; remove one of them"
    return None


class Prompts:
    """The prompts of a task's examples, as tokens."""

    def __init__(
        self,
        tokenizer: Any,
        examples: Examples,
        answer: Callable[[Examples, int], str],
        role: str = "input",
        separator: str = " ",
    ) -> None:
        """Get ready.

        Args:
            tokenizer: of the model.
            examples: with those that are shown, where the task has `few_shot`.
            answer: the right answer of one of the examples that are shown.
            role: the column that is asked.
            separator: between a shown question and its answer, outside of a chat.

        Raises:
            UserError: there is no chat template, it cannot be read or followed, or it does not ask what the user asks.
        """
        self.tokenizer, self.examples, self.answer, self.role = tokenizer, examples, answer, role
        self.separator = separator
        settings = examples.task.settings
        self.chat = chats(settings)
        self.system: str | None = settings.get("system")
        self.template = chat_template(tokenizer, examples.task) if self.chat else None
        if self.chat and len({self._asked([], text) for text in ("neuron", "model")}) == 1:
            raise UserError(
                f"task {examples.task.name!r}: chat: {_whose(examples.task)} chat template writes the same prompt "
                "whatever the user says; give template: FILE, or chat: false"
            )

    def tokens(self, index: int) -> list[int]:
        """Make the tokens up to where the answer of an example begins."""
        return self.tokenize(self.text(index))

    def tokenize(self, text: str) -> list[int]:
        """Make tokens of a prompt, or of what begins with one; a chat template writes its special tokens itself."""
        return self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"]

    def text(self, index: int) -> str:
        """Write the prompt of an example."""
        asked = self.examples.text(index, self.role)
        shown = self.examples.shots
        shots = (
            [(shown.text(shot, self.role), self.answer(shown, shot)) for shot in self.examples.shots_before(index)]
            if shown is not None
            else []
        )
        if not self.chat:
            return BETWEEN.join([*(question + self.separator + said for question, said in shots), asked])
        return self._asked(shots, asked)

    def _asked(self, shots: Sequence[tuple[str, str]], asked: str) -> str:
        """Write a conversation that ends with what is asked; `shots` are (question, answer)."""
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system is not None else []
        for question, said in shots:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
        return self.render([*messages, {"role": "user", "content": asked}])

    def render(self, messages: list[Message], answers: bool = True) -> str:
        """Let the template write a conversation; `answers`: up to where the model's next turn begins."""
        options = {"chat_template": self.template, "add_generation_prompt": answers}
        return rendered(self.tokenizer, messages, f"task {self.examples.task.name!r}", **options)

    def ends(self) -> list[int]:
        """Find the tokens that end the model's turn, by what the template writes after one; none outside of a chat."""
        if not self.chat:
            return []
        said = "neuron"
        whole = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": said}], answers=False)
        special = {
            *self.tokenizer.all_special_ids,
            *(number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special),
        }
        following = self.tokenize(whole.rpartition(said)[2])
        return following[:1] if following and following[0] in special else []

    def account(self) -> dict[str, Any]:
        """Say how prompts were made, for the JSON."""
        settings = self.examples.task.settings
        account: dict[str, Any] = {"chat": self.chat, "few_shot": settings.get("few_shot", 0)}
        if self.chat:
            account["template"] = "of the task" if "template" in settings else "of the model"
        return account | ({"system": self.system} if self.system is not None else {})

    def notes(self) -> list[str]:
        """Say how prompts were made, for the screen."""
        return chat_notes(self.tokenizer, self.examples.task)


def _whose(task: Task) -> str:
    return "the task's" if "template" in task.settings else "the model's"


def chat_notes(tokenizer: Any, task: Task) -> list[str]:
    """Say whether a task's prompts go through a chat template, for the screen."""
    if chats(task.settings):
        return [f"prompts through {_whose(task)} chat template"]
    if "chat" not in task.settings and getattr(tokenizer, "chat_template", None):
        return ["prompts as the data has them; the model has a chat template, which chat: true uses"]
    return []


@explained_by("chat")
def chat_template(tokenizer: Any, task: Task) -> str:
    """Find the chat template that a task asks for: its own file, or the model's.

    Raises:
        UserError: there is none, or the file cannot be read.
    """
    if "template" in task.settings:
        return read_text(task.settings["template"])
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):  # several by name
        found = found.get("default")
    if not found:
        raise UserError(
            f"task {task.name!r}: chat: the model's tokenizer has no chat template; give template: FILE, or chat: false"
        )
    return found
