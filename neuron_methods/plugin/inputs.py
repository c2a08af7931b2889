"""Open the models of a merge, and say clearly what stands in the way.

Paths that exist locally are never asked for at the Hub. Weights are taken from safetensors; pickles (`.bin`) only where
`--lazy-unpickle` allows them.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from neuron_methods.adapters.weights_file import adapter_directory
from neuron_methods.models.companions import code_files
from neuron_methods.models.formats import refuse_other_formats, refuse_quantised
from neuron_methods.models.headers import open_safetensors, stored_count
from neuron_methods.models.hub import hub_answers, hub_file, hub_refusal
from neuron_methods.models.model_files import CONFIG_NAME, check_files, foreign_reading, read_model_config
from neuron_methods.models.reference import ADAPTER_CONFIG, Place, looks_local
from neuron_methods.models.states import weights_digest
from neuron_methods.plugin.seam import models_in_order
from neuron_methods.support.errors import UserError, explained_by

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@contextmanager
def opened_models(configuration: MergeConfiguration, options: MergeOptions) -> Iterator[None]:
    """Hold mergekit's loaders of all models open within the block, each checked.

    mergekit 0.1.5 keeps its loaders in a table of the class for the life of the process: a model that changed on disk
    would be read by its old index in the next merge.

    Raises:
        UserError: naming the model, what is missing and what to do.
    """
    LoaderCache.loaders.clear()
    try:
        LoaderCache().setup(options)
        check_paths(configuration)
        for model in configuration.referenced_models():
            check_config(model, options.trust_remote_code)
            _open(model, options)
        yield
    finally:
        LoaderCache.loaders.clear()


@explained_by("models")
def check_paths(configuration: MergeConfiguration) -> None:
    """Make sure that every model is a directory here, or a repository that the Hub has.

    The Hub is not asked about a path that can only be local.

    Raises:
        UserError: naming the model and what to do.
    """
    for path in dict.fromkeys(model.model for model in models_in_order(configuration)):
        if os.path.exists(path.path):
            continue
        if looks_local(path.path):
            hint = "write the home directory out, ~ is not expanded" if path.path.startswith("~") else "check the path"
            raise UserError(f"model {path}: no such directory; {hint}")
        if any(hub_file(path.path, name, path.revision, None) for name in ("config.json", ADAPTER_CONFIG)):
            continue
        if not hub_answers():
            raise UserError(
                f"model {path}: no such directory here (check the path), and not in the Hub's cache, where the Hub "
                "cannot be asked"
            )
        if refusal := hub_refusal(path.path, path.revision):
            raise UserError(
                f"model {path}: no such directory here (check the path), and not to be had from the Hub: {refusal}"
            )


@explained_by("models")
def check_config(model: ModelReference, trust_remote_code: bool = False) -> None:
    """Make sure that a model that there is has a config that says what it is.

    Raises:
        UserError: naming the model, what is missing and what to do.
    """
    path = model.model.path
    refuse_other_formats(path, f"model {path}")
    custom = f"model {path}: its config.json names custom code, which is run only with --trust-remote-code"
    if os.path.isdir(path):
        if not os.path.lexists(os.path.join(path, CONFIG_NAME)):
            raise UserError(f"model {path}: the directory has no config.json; is it a saved transformers model?")
        check_files(path, path)
        read_model_config(Path(path, CONFIG_NAME), stored_count(Path(path)))
    elif os.path.exists(path):
        raise UserError(f"model {path}: a file, not a directory; give the directory that holds config.json")
    elif (found := hub_file(path, CONFIG_NAME, model.model.revision, None)) is not None:
        read_model_config(Path(found))
    try:
        with foreign_reading(f"model {path}: config.json"):
            config = model.config(trust_remote_code)
    except UserError as error:
        if "trust_remote_code=True" in str(error):
            raise UserError(custom) from None
        raise
    instead = "name the model it was made from, in bfloat16"
    if model.lora is not None:
        instead = f"name that base unquantised, which works as well: UNQUANTISED+{model.lora}"
    refuse_quantised(config, f"model {path}", instead)
    if not config.architectures:
        raise UserError(f'model {path}: its config.json names no architectures, e.g. ["LlamaForCausalLM"]; add them')
    if trust_remote_code:
        if os.path.isdir(path):
            code_files(Path(path), path)
    elif getattr(config, "auto_map", None) and not hasattr(transformers, config.architectures[0]):
        raise UserError(custom)


def _open(model: ModelReference, options: MergeOptions) -> None:
    path = model.model.path
    here = set(os.listdir(path)) if os.path.isdir(path) else set(_SAFETENSORS)
    if not here & {*_SAFETENSORS, *_PICKLES}:
        raise UserError(f"model {path}: no weights in it (model.safetensors or its index); is it complete?")
    if not here & set(_SAFETENSORS):
        _refuse_pickles(path, options)
    with foreign_reading(f"model {path}: its weights cannot be opened"):
        loader = LoaderCache().get(model)
    index = loader.index
    if not index.is_safetensors:
        _refuse_pickles(path, options)
    for shard in sorted(set(index.tensor_paths.values())):
        file = os.path.join(index.base_path, shard)
        if shard.endswith(".safetensors"):
            open_safetensors(file)
        elif not os.path.isfile(file):
            raise UserError(f"{file}: no such file, but the checkpoint's index names it")


def _refuse_pickles(path: str, options: MergeOptions) -> None:
    if not options.lazy_unpickle:
        raise UserError(
            f"model {path}: its weights are a pickle (pytorch_model.bin), which is read only on request; save it as "
            "safetensors, or allow it with --lazy-unpickle"
        )


def state_of(base: ModelReference | None, model: Hashable | None) -> tuple[str, str]:
    """Name and digest of a model's weights, as `ModelFacts.state` gives them; models must be open."""
    found = base if model is None else model
    if not isinstance(found, ModelReference):
        return "", ""
    parts = [part for part in (found.model, found.lora) if part is not None]
    places = [LoaderCache().get(found.model_copy(update={"lora": None})).index.base_path]
    if found.lora is not None:
        places.append(adapter_directory(found.lora.path, found.lora.revision, LoaderCache().hf_cache_dir))
    return "+".join(Place(part.path, part.revision).shown for part in parts), weights_digest(*places)
