"""How a model is asked to answer greedily."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig


def greedy_answers(model: Any, tokenizer: Any, new_tokens: int, more_ends: Sequence[int] = ()) -> GenerationConfig:
    """Ask greedily, whatever the checkpoint would do by itself, for at most `new_tokens` tokens.

    An answer ends at what ends one for the checkpoint, else for its tokenizer, and at the tokens `more_ends`.
    """
    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    first = known[0] if known else None
    if more_ends:
        ends = [*known, *(token for token in more_ends if token not in known)]
    pad = tokenizer.pad_token_id
    begin = getattr(own, "decoder_start_token_id", None)
    return GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=ends,
        pad_token_id=pad if pad is not None else (first or 0),
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None) if begin is None else begin,
    )
