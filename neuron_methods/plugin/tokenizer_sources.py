"""Where a YAML takes the output's tokenizer and single tokens from: that those models are there and know the tokens."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergekit.tokenizer.build import get_vocab_size
from mergekit.tokenizer.config import ModelTokenEmbedding
from transformers import PreTrainedTokenizerBase

from neuron_methods.models.model_files import check_files
from neuron_methods.models.tokenizer_files import load_tokenizer, read_vocabulary
from neuron_methods.plugin.seam import models_in_order
from neuron_methods.plugin.token_maps import tokenizer_place
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import first_line, listed

_SOURCE = "tokenizer: source"


def check_tokenizer_models(configuration: MergeConfiguration, name: str) -> None:
    """Make sure that `tokenizer` names models of the merge; asks nobody about one that there is not.

    Args:
        configuration: as read.
        name: of the YAML, for messages.

    Raises:
        UserError: naming the model.
    """
    models = list(models_in_order(configuration))
    for place, model in _sources(configuration):
        if model not in models:
            known = ", ".join(dict.fromkeys(map(str, models)))
            raise UserError(f"{name}: {place}: {model} is no model of this merge (there are: {known})")


def _sources(configuration: MergeConfiguration) -> Iterator[tuple[str, ModelReference]]:
    source = configuration.tokenizer_source or (configuration.tokenizer and configuration.tokenizer.source)
    if isinstance(source, ModelReference):
        yield _SOURCE, source
    tokens = (configuration.tokenizer.tokens if configuration.tokenizer else None) or {}
    for token, entry in tokens.items():
        if isinstance(entry.source, ModelReference):
            yield f"tokenizer: token {token!r}", entry.source
        elif isinstance(entry.source, ModelTokenEmbedding):
            yield f"tokenizer: token {token!r}", entry.source.model


def check_tokenizer_sources(configuration: MergeConfiguration, options: MergeOptions, name: str) -> None:
    """Make sure that the models `tokenizer` names have tokenizers, which know the tokens asked of them.

    mergekit 0.1.5 finds out while it merges, and passes over a source that it happens not to need.

    Args:
        configuration: of a merge that builds a tokenizer.
        options: mergekit's.
        name: of the YAML, for messages.

    Raises:
        UserError: naming the token and the model.
    """
    for place in filter(None, map(tokenizer_place, configuration.referenced_models())):
        check_files(place, str(place))
        read_vocabulary(place)
    vocabularies = {}
    for place, model in _sources(configuration):
        vocabularies[model] = _tokenizer(model, options, f"{name}: {place}").get_vocab()
        rows = get_vocab_size(model.model, options.trust_remote_code)
        in_order = sorted(vocabularies[model].items(), key=lambda item: item[1])
        beyond = [token for token, number in in_order if rows is not None and number >= rows]
        if beyond and place == _SOURCE:
            shown = listed([repr(token) for token in beyond])
            raise UserError(
                f"{name}: {place}: the tokenizer of {model} has {len(beyond)} tokens ({shown}) for "
                f"which there are no rows in its embeddings, which have {rows}; take another source, or resize the "
                "embeddings of the base as it was done to train it"
            )
    tokens = (configuration.tokenizer.tokens if configuration.tokenizer else None) or {}
    for token, entry in tokens.items():
        if isinstance(entry.source, ModelTokenEmbedding):
            model, wanted = entry.source.model, entry.source.token
        else:
            model, wanted = entry.source, token
        if isinstance(model, ModelReference) and wanted is not None and wanted not in vocabularies[model]:
            raise UserError(f"{name}: tokenizer: token {token!r}: the tokenizer of {model} does not know {wanted!r}")


def _tokenizer(model: ModelReference, options: MergeOptions, place: str) -> PreTrainedTokenizerBase:
    found = tokenizer_place(model)
    if found is None:
        raise UserError(f"{place}: {model} has no tokenizer; name a model that has one")
    where = f"{place}: the tokenizer of {model} cannot be loaded"
    try:
        return load_tokenizer(found, where, trust_remote_code=options.trust_remote_code)
    except ImportError as error:
        raise UserError(f"{where}: {first_line(error)}") from None
