"""Conversations as text, by the chat template of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neuron_methods.models.model_files import foreign_reading


def rendered(tokenizer: Any, conversation: Sequence[dict[str, str]], where: str, **options: Any) -> str:
    """Write a conversation up to where the model's next turn begins; the template writes special tokens itself.

    Args:
        tokenizer: of transformers.
        conversation: turns with `role` and `content`.
        where: for the message.
        **options: of `apply_chat_template`.

    Raises:
        UserError: with what the template says, which may not know a role.
    """
    with foreign_reading(f"{where}: its chat template cannot be followed"):
        return tokenizer.apply_chat_template(
            list(conversation), **{"add_generation_prompt": True, **options}, tokenize=False
        )
