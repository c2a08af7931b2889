"""Where a YAML takes the output's tokenizer and single tokens from: that those models are there and know the tokens."""

from __future__ import annotations

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergekit.tokenizer.config import ModelTokenEmbedding
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from neuron_methods.errors import UserError


def check_tokenizer_sources(configuration: MergeConfiguration, options: MergeOptions, name: str) -> None:
    """Make sure that `tokenizer` names models of the merge, whose tokenizers know the tokens asked of them.

    mergekit 0.1.5 finds out while it merges, and passes over a source that it happens not to need.

    Args:
        configuration: of a merge that builds a tokenizer.
        options: mergekit's.
        name: of the YAML, for messages.

    Raises:
        UserError: naming the token and the model.
    """
    models = configuration.referenced_models()
    source = configuration.tokenizer_source or (configuration.tokenizer and configuration.tokenizer.source)
    if isinstance(source, ModelReference):
        _tokenizer(source, models, options, f"{name}: tokenizer: source")
    tokens = (configuration.tokenizer.tokens if configuration.tokenizer else None) or {}
    for token, entry in tokens.items():
        place = f"{name}: tokenizer: token {token!r}"
        if isinstance(entry.source, ModelReference):
            known = _tokenizer(entry.source, models, options, place).get_vocab()
            if token not in known:
                raise UserError(f"{place}: the tokenizer of {entry.source} does not know it")
        elif isinstance(entry.source, ModelTokenEmbedding):
            known = _tokenizer(entry.source.model, models, options, place).get_vocab()
            wanted = entry.source.token
            if wanted is not None and wanted not in known:
                raise UserError(f"{place}: the tokenizer of {entry.source.model} does not know {wanted!r}")


def _tokenizer(
    model: ModelReference, models: list[ModelReference], options: MergeOptions, place: str
) -> PreTrainedTokenizerBase:
    if model not in models:
        raise UserError(f"{place}: {model} is no model of this merge (there are: {', '.join(map(str, models))})")
    try:
        return AutoTokenizer.from_pretrained(
            model.model.path, revision=model.model.revision, trust_remote_code=options.trust_remote_code
        )
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{place}: the tokenizer of {model} cannot be loaded: {reason}") from None
