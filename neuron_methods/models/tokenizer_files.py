"""A tokenizer's files: looked at before tokenizers and transformers read them, and loaded to see whether they can."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from neuron_methods.models.companions import companions_of, makes_tokenizer, names_code
from neuron_methods.models.model_files import check_files, foreign_reading
from neuron_methods.support.documents import Foreign, read_object, validated
from neuron_methods.support.text import one_line

_AGAIN = "download or save the tokenizer again"
# Numbers are rows of embeddings, and what is between them is filled up; the largest vocabularies have 10^6 tokens.
TokenNumber = Annotated[int, Field(ge=0, lt=1 << 24)]


class AddedToken(Foreign):
    """A token that was added to a vocabulary."""

    id: TokenNumber
    content: str


class TokenizerModel(Foreign):
    """The vocabulary of a tokenizer.json: {token: number}, or [token, score] in the order of their numbers."""

    vocab: dict[str, TokenNumber] | list[Annotated[list[Any], Field(min_length=2)]] | None = None


class TokenizerFile(Foreign):
    """What is read of tokenizer.json before tokenizers reads all of it."""

    model: TokenizerModel
    added_tokens: list[AddedToken] | None = None


def read_vocabulary(place: Path) -> dict[str, int] | None:
    """Read which token has which number; None where tokenizer.json is not there, or does not say.

    Raises:
        UserError: tokenizer.json is damaged.
    """
    file = place / "tokenizer.json"
    if not file.is_file():
        return None
    found = validated(read_object(file, again=_AGAIN), TokenizerFile, str(file), _AGAIN)
    vocabulary = found.model.vocab
    if vocabulary is None:
        return None
    if isinstance(vocabulary, list):  # of a Unigram model, with scores
        vocabulary = {str(entry[0]): number for number, entry in enumerate(vocabulary)}
    return {**vocabulary, **{token.content: token.id for token in found.added_tokens or ()}}


def load_tokenizer(place: Path, where: str, *, trust_remote_code: bool = False) -> Any:
    """Load a directory's tokenizer.

    Args:
        place: the directory.
        where: how messages call it.
        trust_remote_code: whether custom code may be run.

    Raises:
        UserError: it is damaged, or transformers cannot load it.
        ImportError: it needs another package.
    """
    from transformers import AutoTokenizer

    check_files(place, str(place))
    read_vocabulary(place)
    with foreign_reading(where, ImportError):
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)


def check_tokenizer(place: Path, *, trust_remote_code: bool = False) -> list[str]:
    """Make sure that the tokenizer in a directory, if there is one, can be loaded.

    Returns:
        What could not be tried, in words.

    Raises:
        UserError: it cannot be loaded.
    """
    if not any(map(makes_tokenizer, companions_of(place, str(place)))):
        return []
    if not trust_remote_code and names_code(place / "tokenizer_config.json"):
        return ["its tokenizer is custom code, which --trust-remote-code would run, and was not tried"]
    try:
        load_tokenizer(place, f"{place}: its tokenizer cannot be loaded", trust_remote_code=trust_remote_code)
    except ImportError as error:
        return [f"its tokenizer was not tried, as it needs another package: {one_line(error)}"]
    return []
