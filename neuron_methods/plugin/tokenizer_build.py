"""The output's tokenizer as mergekit builds it, with what mergekit 0.1.5 does not look at.

It asks the base of an adapter for a tokenizer, never the adapter, though one that was trained with new tokens or a
template brings its own. And it counts tokens where it should ask for the highest number: a vocabulary with a gap ends
in an IndexError.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.tokenizer.build import TokenizerInfo, get_vocab_size

from neuron_methods.models.companions import code_files, companions_of, is_of_tokenizer
from neuron_methods.plugin.token_maps import tokenizer_place
from neuron_methods.support.errors import UserError


def with_own_tokenizers(original: Callable[..., TokenizerInfo]) -> Callable[..., TokenizerInfo]:
    """Put around mergekit's `build_tokenizer` what it does not look at."""

    def build_tokenizer(
        base_model: ModelReference | None,
        referenced_models: Sequence[ModelReference],
        tokenizer_source: Any,
        trust_remote_code: bool,
        add_tokens: Sequence[str] | None = None,
    ) -> TokenizerInfo:
        with tempfile.TemporaryDirectory(prefix="mergekit-neuron-tokenizers-") as folder:
            known: dict[ModelReference, ModelReference] = {}
            for model in (*referenced_models, *([base_model] if base_model else ())):
                known[model] = _stand_in(model, Path(folder) / str(len(known)), trust_remote_code)
            info = original(
                known[base_model] if base_model else None,
                [known[model] for model in referenced_models],
                known.get(tokenizer_source, tokenizer_source),
                trust_remote_code,
                add_tokens or (),
            )
        info = TokenizerInfo(
            tokenizer=info.tokenizer,
            permutations={model: info.permutations[known[model]] for model in referenced_models},
            original_vocabs={model: info.original_vocabs[k] for model, k in known.items() if k in info.original_vocabs},
        )
        _fill_gaps(info, base_model or referenced_models[0], trust_remote_code)
        return info

    return build_tokenizer


def _stand_in(model: ModelReference, folder: Path, trust_remote_code: bool) -> ModelReference:
    """A directory with an adapter's own tokenizer and its base's config; the model itself where there is none."""
    place = tokenizer_place(model) if model.lora is not None else None
    if place is None or place == Path(model.local_path(ignore_lora=True)):
        return model
    folder.mkdir()
    names = [name for name in companions_of(place, str(model)) if is_of_tokenizer(name)]
    if trust_remote_code:
        names += code_files(place, str(model))
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(place / name, folder / name)
    model.config(trust_remote_code).save_pretrained(folder)
    return ModelReference.model_validate({"model": {"path": str(folder)}})


def _fill_gaps(info: TokenizerInfo, base: ModelReference, trust_remote_code: bool) -> None:
    """Give each number below the highest that no token has the row of the base, as if a token had it."""
    own = info.tokenizer.get_vocab()
    numbers, of_base = set(own.values()), info.original_vocabs[base]
    if len(numbers) < len(own) and len({*of_base.values()}) == len(of_base):
        raise UserError(
            "tokenizer: the base's vocabulary has a gap, so that new tokens get numbers which others have; give it "
            "source: base, or a model's"
        )
    for permutation in info.permutations.values():
        for number in numbers:
            permutation.setdefault(number, -1)  # of a token for which the model has no row mergekit says nothing
    gaps = set(range(max(numbers, default=-1) + 1)) - numbers
    if not gaps:
        return
    holders: dict[int, ModelReference] = {}  # the base, or the first model with a row there that is of no other token
    for model in (base, *info.permutations):
        vocabulary = info.original_vocabs.get(model, of_base)
        rows = set(range(get_vocab_size(model.model, trust_remote_code) or 0)) - set(vocabulary.values())
        holders = {**dict.fromkeys(gaps & rows, model), **holders}
    for model, permutation in info.permutations.items():
        permutation.update({number: number if holders.get(number) == model else -1 for number in gaps})
    # mergekit asks for no more than this; what is saved is not made of it.
    filled = {**own, **{f"<no token {number}>": number for number in sorted(gaps)}}
    info.tokenizer.get_vocab = lambda: dict(filled)
