"""Adapters by themselves in a merge's configuration: a directory or repository whose config names the base.

They become `base+adapter`, which is what mergekit's configuration has a form for, before anything asks them for a
model's config.json.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from pydantic import BaseModel

from neuron_methods.adapters.config import CONFIG_NAME, AdapterConfig
from neuron_methods.models.formats import quantised_with
from neuron_methods.models.reference import base_of, is_adapter, local_directory, same_model
from neuron_methods.support.documents import read_object
from neuron_methods.support.errors import UserError, explained_by

LOG = logging.getLogger(__name__)


def resolve_adapters(configuration: MergeConfiguration, cache_dir: str | None = None) -> MergeConfiguration:
    """Write every adapter that stands by itself as base+adapter; in place, once or again.

    Args:
        configuration: mergekit's; changed where it names adapters.
        cache_dir: the hub's cache, None for the default.

    Returns:
        `configuration`.

    Raises:
        UserError: an adapter's config names another base than the configuration's base_model, or none that is to be
            had.
    """
    known: dict[ModelReference, ModelReference] = {}
    base_model = configuration.base_model
    if base_model is not None:
        configuration.base_model = base_model = resolve_reference(base_model, None, cache_dir)

    def resolve(reference: ModelReference) -> ModelReference:
        if reference not in known:
            known[reference] = resolve_reference(reference, base_model, cache_dir)
        return known[reference]

    _walk(configuration, resolve)
    return configuration


@explained_by("adapters")
def resolve_reference(
    reference: ModelReference, base_model: ModelReference | None, cache_dir: str | None = None
) -> ModelReference:
    """The reference itself if it names a model, base+adapter if it names an adapter alone; see `resolve_adapters`."""
    path, revision = reference.model.path, reference.model.revision
    if reference.lora is not None or reference == base_model or not is_adapter(path, revision, cache_dir):
        return reference
    directory = local_directory(path, revision, cache_dir)
    assert directory is not None
    config = AdapterConfig.read(directory, str(reference.model))
    if base_model is not None:
        _check_same(config, base_model.model, directory)
        base = base_model.model
    else:
        found = base_of(config.raw, directory, config.where)
        base = ModelPath(path=found.path, revision=found.revision)
    return ModelReference(model=base, lora=reference.model, override_architecture=reference.override_architecture)


def _check_same(config: AdapterConfig, base_model: ModelPath, directory: str) -> None:
    found = config.base_model
    if found is None:
        LOG.info("%s: its %s names no base; taking base_model %s", config.where, CONFIG_NAME, base_model)
        return
    verdict = same_model(found, base_model.path, directory)
    if verdict is None:
        LOG.warning(
            "%s: its base is called %s; taking base_model %s for it, as the last parts of the names agree",
            config.where,
            found,
            base_model,
        )
    elif not verdict and (how := _quantised(found, directory)) is not None:
        raise UserError(
            f"{config.where}: trained on {found}, which is quantised ({how}); if base_model {base_model} is that model "
            f"unquantised, write {base_model}+{config.where}"
        )
    elif not verdict:
        raise UserError(
            f"{config.where}: its {CONFIG_NAME} names the base {found}, but base_model is {base_model}; give the base "
            f"the adapter was trained on, or write {base_model}+{config.where} if the two are the same model"
        )
    elif config.base_revision and base_model.revision and config.base_revision != base_model.revision:
        raise UserError(
            f"{config.where}: its {CONFIG_NAME} names revision {config.base_revision} of the base, but base_model is "
            f"{base_model}; use one revision, or write {base_model}+{config.where} if the two are the same model"
        )


def _quantised(base: str, directory: str) -> str | None:
    """With what the base that an adapter names is quantised, as its config says, or its name where it is not here."""
    for place in (base, os.path.join(directory, base)):
        if os.path.isfile(path := os.path.join(place, "config.json")):
            return quantised_with(read_object(path))
    return next((how for how in ("bnb-4bit", "bnb-8bit", "GPTQ", "AWQ", "FP8") if how.lower() in base.lower()), None)


def _walk(value: Any, resolve: Callable[[ModelReference], ModelReference]) -> Any:
    """Replace all references within a configuration, in place; returns what takes the value's own place."""
    if isinstance(value, ModelReference):
        return resolve(value)
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            old = getattr(value, name)
            new = _walk(old, resolve)
            if new is not old:
                _set(value, name, new)
    elif isinstance(value, list):
        value[:] = [_walk(item, resolve) for item in value]
    elif isinstance(value, dict):
        value.update({key: _walk(item, resolve) for key, item in value.items()})
    return value


def _set(model: BaseModel, name: str, value: Any) -> None:
    if model.model_config.get("frozen"):
        # mergekit's parts of a configuration are frozen, but nothing has hashed them before a plan is made.
        model.__dict__[name] = value
    else:
        setattr(model, name, value)
