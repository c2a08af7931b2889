"""A tiny tokenizer of whole words, made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def build_tokenizer(words: Sequence[str], begin: str | None = None, **names: str) -> PreTrainedTokenizerFast:
    """One token per word, in the order of `words`; every text begins with `begin`; `names` as ``pad_token``."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=names["unk_token"]))
    tokenizer.pre_tokenizer = Whitespace()
    if begin:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, words.index(begin))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_tokenizer(path: Path, words: Sequence[str], **options: str) -> None:
    """Save a tokenizer that knows `words`, with those numbers; the first one stands for every unknown word."""
    build_tokenizer(words, unk_token=words[0], **options).save_pretrained(path)
