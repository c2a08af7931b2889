"""Do models number their tokens alike? Rows of embeddings are merged by their numbers, whatever words these stand for.

The maps are read from tokenizer.json itself, once per model, or from the tokenizer that transformers makes of other
files; models whose files are the same bytes have the same map.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from neuron_methods.adapters.weights_file import adapter_directory
from neuron_methods.models.companions import companions_of, makes_tokenizer
from neuron_methods.models.tokenizer_files import load_tokenizer, read_vocabulary
from neuron_methods.support.documents import read_bytes
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import first_line, listed


def tokenizer_place(model: ModelReference) -> Path | None:
    """Find the directory of a model's tokenizer: an adapter's own comes before its base's; None if there is none."""
    cache = LoaderCache().hf_cache_dir
    places = []
    if model.lora is not None:
        places.append(adapter_directory(model.lora.path, model.lora.revision, cache))
    places.append(model.local_path(cache_dir=cache, ignore_lora=True))
    found = (Path(place) for place in places if any(map(makes_tokenizer, companions_of(Path(place), str(model)))))
    return next(found, None)


def compare_token_maps(models: Sequence[ModelReference], name: str) -> list[str]:
    """Make sure that models whose rows are merged number their tokens alike; those without a tokenizer pass.

    A number that only one model has a token for is a padding row of the others. One that a model keeps unused, or
    reserved, and another has given a name is one row.

    Args:
        models: the base first, if there is one.
        name: of the YAML, for messages.

    Returns:
        What the user should know.

    Raises:
        UserError: naming two tokens.
    """
    notes: list[str] = []
    first: ModelReference | None = None
    maps: dict[str, Mapping[str, int] | None] = {}
    for model in models:
        place = tokenizer_place(model)
        if place is None:
            continue
        digest = _digest(place, str(model))
        if digest not in maps:
            try:
                maps[digest] = _token_map(place)
            except (UserError, ImportError) as error:
                maps[digest] = None
                notes.append(
                    f"the tokenizer of {model} cannot be read, so its rows may be of other tokens: {first_line(error)}"
                )
        found = maps[digest]
        if found is None:
            continue
        if first is None:
            first, reference = model, found
        elif found is not reference:
            notes += _compare(str(first), reference, str(model), found, name)
    return notes


def _compare(one: str, tokens: Mapping[str, int], other: str, others: Mapping[str, int], name: str) -> list[str]:
    at, there = ({number: token for token, number in found.items()} for found in (tokens, others))
    shared = sorted(at.keys() & there.keys())
    differ = [number for number in shared if at[number] != there[number]]
    moved = next((token for token, number in tokens.items() if others.get(token, number) != number), None)
    other_words = [number for number in differ if not (_is_unused(at[number]) or _is_unused(there[number]))]
    if moved is not None or other_words:
        if differ:
            number = (other_words or differ)[0]
            shown = f"{number} is {there[number]!r} in {other} and {at[number]!r} in {one}"
        else:
            shown = f"{moved!r} is {others[moved]} in {other} and {tokens[moved]} in {one}"
        raise UserError(
            f"{name}: {other} numbers its tokens otherwise than {one}: {shown}, and rows are merged by their numbers; "
            "add tokenizer: {source: base}, which aligns them"
        )
    if not differ:
        return []
    renamed = listed([f"{number} is {at[number]!r} and {there[number]!r}" for number in differ])
    return [f"{one} and {other} name {len(differ)} tokens differently, whose rows are merged as one's: {renamed}"]


def _is_unused(token: str) -> bool:
    """Whether a token is a placeholder, such as `<|reserved_special_token_5|>`, `[unused1]` and `<extra_id_0>`."""
    return re.search(r"reserved|unused|extra_\d|extra_id|placeholder|dummy", token, re.IGNORECASE) is not None


def _digest(place: Path, where: str) -> str:
    files = [place / "tokenizer.json"]
    if not files[0].is_file():
        files = [place / name for name in companions_of(place, where) if makes_tokenizer(name)]
    return hashlib.sha256(b"".join(hashlib.sha256(read_bytes(file)).digest() for file in files)).hexdigest()


def _token_map(place: Path) -> Mapping[str, int]:
    found = read_vocabulary(place)
    if found is None:
        return load_tokenizer(place, str(place), trust_remote_code=LoaderCache().trust_remote_code).get_vocab()
    return found
