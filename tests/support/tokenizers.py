"""A tiny tokenizer of whole words, made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


def save_tokenizer(path: Path, words: Sequence[str], **options: str) -> None:
    """Save a tokenizer that knows `words`, with those numbers; the first one stands for every unknown word."""
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0], **options).save_pretrained(path)
