"""What is put into mergekit: our methods, and functions around some of its own.

The start-up hook calls each function as soon as the module of mergekit that it concerns is imported. Each first makes
sure that its part of the seam fits; all are idempotent. `arm` is for our own commands: it does and checks everything at
once.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from neuron_methods.plugin.seam import (
    ARCHITECTURE_INFO,
    ARCHITECTURE_OF_MERGE,
    BUILD_TOKENIZER,
    CONFIG,
    DONOR,
    FLAT_MERGE,
    FLAT_PARAMETERS,
    GET_LOADER,
    IS_HF,
    LAZY_LOADER,
    LOCAL_PATH,
    PLAN,
    REFERENCED_MODELS,
    SEAM,
    check_fit,
    models_in_order,
    replace,
    write_references_as_text,
)
from neuron_methods.support.documents import open_file
from neuron_methods.support.errors import UserError

# Configs that are kept at most, and the size from which on one is not.
_CONFIGS, _CONFIG_BYTES = 64, 1 << 20


def register() -> None:
    """Make the method names of this package known to mergekit in this process. Idempotent.

    Raises:
        UserError: some part of mergekit could not be extended; the start-up hook alone would only warn.
    """
    from neuron_methods import _autoload

    register_methods()
    # Definitions and patches follow as the modules they concern are imported; those that are get them here.
    _autoload.arm()
    if failures := _autoload.failures():
        target, error = failures[0]
        if isinstance(error, UserError):
            raise error
        raise UserError(f"mergekit {version('mergekit')} could not be extended: {target} failed with {error!r}")


def arm() -> None:
    """Put all that is ours into mergekit now, for a command of ours. Idempotent.

    Raises:
        UserError: as `register` and `check_fit`.
    """
    check_fit(SEAM)
    register()
    for patch in (patch_architectures, patch_loaders, patch_configuration, patch_planner, patch_merge, patch_raw_merge):
        patch()


def register_methods() -> None:
    """Put the names of our methods into mergekit's registry."""
    check_fit(("mergekit.merge_methods",))
    from neuron_methods.methods.registered import register_methods

    register_methods()


def patch_planner() -> None:
    """Let our methods see the plans that `MergePlanner` makes.

    mergekit-yaml, mergekit-multi, mergekit-evolve and the in-memory planner all pass there.
    """
    check_fit(("mergekit.plan",))
    from neuron_methods.plugin.planning import attach_to_planner, configure_planner

    def around(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def plan(planner: Any) -> None:
            listed = configure_planner(planner)
            original(planner)
            attach_to_planner(planner, listed)

        return plan

    replace(PLAN, around)


def patch_raw_merge() -> None:
    """Let our methods see the plans of `mergekit-pytorch`, and its parameters include those of inner methods."""
    check_fit(("mergekit.scripts.merge_raw_pytorch",))
    from neuron_methods.plugin.composite import configured
    from neuron_methods.plugin.planning import attach_to_flat_merge

    def around_plan(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def plan_flat_merge(config: Any, *args: Any, **kwargs: Any) -> list[Any]:
            options = kwargs.get("options") or args[-1]
            tasks = original(config, *args, **kwargs)
            return attach_to_flat_merge(config, tasks, device=options.device or "cpu", quiet=options.quiet)

        return plan_flat_merge

    def around_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
        def construct_param_dicts(config: Any, merge_method: Any, tensor_name: str) -> Any:
            return original(config, configured(merge_method, config), tensor_name)

        return construct_param_dicts

    replace(FLAT_MERGE, around_plan)
    replace(FLAT_PARAMETERS, around_parameters)


def patch_architectures() -> None:
    """Plan by definitions that fit what the models store."""
    check_fit(("mergekit.architecture",))
    logging.getLogger("mergekit.architecture").addFilter(_is_not_of_a_gap)
    replace(ARCHITECTURE_INFO, _around_architecture)


def _is_not_of_a_gap(record: logging.LogRecord) -> bool:
    """Keep it off the terminal that mergekit 0.1.5 has no definition of an architecture: ours fill the gap."""
    return not record.getMessage().startswith("No JSON architecture found")


def _around_architecture(own: Callable[..., Any]) -> Callable[..., Any]:
    def get_architecture_info(config: Any, options: Any) -> Any:
        from neuron_methods.plugin.architectures import architecture_of_merge
        from neuron_methods.plugin.session import session_of

        session = session_of(options)
        chosen = session.architecture if session is not None else None
        return chosen or architecture_of_merge(config, options, own)

    return get_architecture_info


def patch_loaders() -> None:
    """Let mergekit's loaders read as transformers does, adapters lazily, and find all that is of a model of the Hub.

    mergekit 0.1.5 merges each adapter into a cache directory. Of a repository it gets JSON files, tokenizer.model and
    weights, not the template nor other files of tokenizers; and it asks the Hub what lies there even where
    ``HF_HUB_OFFLINE=1`` forbids it.
    """
    check_fit(("mergekit.io.tasks",))
    from mergekit.io.tasks import LoaderCache

    from neuron_methods.adapters.opening import open_adapter
    from neuron_methods.models.hub import snapshot
    from neuron_methods.plugin.checkpoints import CheckpointLoader

    def around_get(original: Callable[..., Any]) -> Callable[..., Any]:
        def get(cache: Any, model: Any) -> Any:
            if model.lora is not None and model not in cache.loaders:
                cache.loaders[model] = open_adapter(
                    model,
                    cache.get(model.model_copy(update={"lora": None})),
                    cache_dir=cache.hf_cache_dir,
                    allow_pickle=cache.lazy_unpickle,
                    trust_remote_code=cache.trust_remote_code,
                )
            return original(cache, model)

        return get

    def lazy_loader(model: Any, cache_dir: str | None = None, lazy_unpickle: bool = True) -> Any:
        base = CheckpointLoader.open(model.local_path(cache_dir, ignore_lora=True), lazy_unpickle)
        if model.lora is None:
            return base
        return open_adapter(model, base, cache_dir=cache_dir, allow_pickle=lazy_unpickle)

    def around_path(original: Callable[..., str]) -> Callable[..., str]:
        def local_path(model: Any, cache_dir: str | None = None, ignore_lora: bool = False) -> str:
            if os.path.exists(model.model.path):
                return original(model, cache_dir, ignore_lora)
            place = model.model
            return snapshot(place.path, place.revision, cache_dir, code=LoaderCache().trust_remote_code)

        return local_path

    replace(CONFIG, _around_config)
    replace(LOCAL_PATH, around_path)
    replace(GET_LOADER, around_get)
    replace(LAZY_LOADER, lambda _own: lazy_loader)


def _around_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Parse a config once: a merge asks some forty times for those of its models, a third of its time on tiny ones.

    What is given is a copy, and known by all bytes of the file, so that one that changes is parsed anew.
    """
    known: dict[tuple[Any, bytes], Any] = {}

    def config(model: Any, trust_remote_code: bool = False) -> Any:
        found = None if trust_remote_code else _config_file(model.model.path)
        if found is None:
            return original(model, trust_remote_code)
        key = ((model.model.path, model.override_architecture), found)
        if key not in known:
            if len(known) >= _CONFIGS:
                known.clear()
            known[key] = original(model, trust_remote_code)
        return copy.deepcopy(known[key])

    return config


def _config_file(place: str) -> bytes | None:
    """Read a directory's config.json; None where it is not all that its config is made of, and of the Hub's models."""
    try:
        with open_file(os.path.join(place, "config.json"), place) as file:
            found = file.read(_CONFIG_BYTES)
    except (OSError, UserError):
        return None
    return None if len(found) == _CONFIG_BYTES or b"configuration_files" in found else found


def patch_configuration() -> None:
    """Let an adapter stand by itself, list the models in the YAML's order instead of a set's, and write any path.

    Every command of mergekit calls `referenced_models` before anything else.
    """
    check_fit(("mergekit.config",))
    from neuron_methods.adapters.resolve import resolve_adapters

    def around(original: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
        def referenced_models(configuration: Any) -> list[Any]:
            found = original(resolve_adapters(configuration))
            return sorted(found, key=list(models_in_order(configuration)).index)

        return referenced_models

    replace(REFERENCED_MODELS, around)
    write_references_as_text()


def patch_merge() -> None:
    """Take tokenizers of adapters and other files of their bases, and ask no network about local paths.

    mergekit's card asks the Hub about what exists here, too; without a network that ends in a traceback, after the
    weights are written and before the tokenizer is.
    """
    check_fit(("mergekit.merge",))
    from neuron_methods.plugin.tokenizer_build import with_own_tokenizers

    def around_donor(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_donor_model(merge_config: Any, options: Any) -> tuple[Any, str]:
            donor = merge_config.base_model or merge_config.referenced_models()[0]
            if donor.lora is None:
                return original(merge_config, options)
            return donor, donor.local_path(cache_dir=options.transformers_cache, ignore_lora=True)

        return get_donor_model

    def around_card(original: Callable[[str], bool]) -> Callable[[str], bool]:
        return lambda path: not os.path.exists(path) and original(path)

    replace(ARCHITECTURE_OF_MERGE, _around_architecture)  # where it was imported before it was replaced
    replace(DONOR, around_donor)
    replace(IS_HF, around_card)
    replace(BUILD_TOKENIZER, with_own_tokenizers)
