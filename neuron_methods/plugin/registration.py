"""Make our methods and architecture definitions known to mergekit, and show our methods the plan of a merge.

mergekit 0.1.5 has no plug-in discovery, and hands a method one tensor at a time without ever showing it the plan. What
has to be put into mergekit for that is put there here and nowhere else:

- names into the registry of methods (`register`), definitions into the table of architectures
  (`architectures.register_architectures`);
- `MergePlanner._plan` is preceded by `planning.configure_planner` and followed by `planning.attach_to_planner`
  (`patch_planner`): mergekit-yaml, mergekit-multi, mergekit-evolve and the in-memory planner all pass there;
- `plan_flat_merge` of mergekit-pytorch is followed by `planning.attach_to_flat_merge`, and resolves the parameters of
  inner methods too (`patch_raw_merge`);
- adapters are read lazily, where mergekit would merge each into a cache directory first: `LoaderCache.get` and
  `ModelReference.lazy_loader` open an `AdapterLoader` for references with an adapter (`patch_loaders`),
  `MergeConfiguration.referenced_models`, which every command calls before anything else, writes adapters that stand by
  themselves as base+adapter and lists the models in the order of the YAML (`patch_configuration`), and the donor of
  tokenizer and config is the base itself (`patch_merge`);
- the model card asks no network about paths that exist locally (`patch_merge`).

All are idempotent and called by the start-up hook as soon as the module they concern is imported.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

_MARK = "_neuron_methods_patched"


def register() -> None:
    """Make the method names of this package known to mergekit in this process. Idempotent.

    Raises:
        RuntimeError: if some part of mergekit could not be extended; the start-up hook alone would stay silent.
    """
    from mergekit.merge_methods import registry

    from neuron_methods import _autoload
    from neuron_methods.methods.min_merging import MinMerging
    from neuron_methods.methods.neuro_merging import NeuroMerging
    from neuron_methods.methods.neuron_merge import NeuronMerge

    known = {method.spec.name for method in registry.registered_methods()}
    for method_class in (NeuroMerging, MinMerging, NeuronMerge):
        if method_class.spec.name not in known:
            registry.register(method_class())
    # Definitions and patches follow as the modules they concern are imported; those that are get them here.
    _autoload.arm()
    if failures := _autoload.failures():
        target, error = failures[0]
        raise RuntimeError(f"mergekit could not be extended: {target} failed with {error!r}") from error


def patch_planner() -> None:
    """Let our methods see the plans that `MergePlanner` makes."""
    from neuron_methods.plugin.planning import attach_to_planner, configure_planner

    planner_class = sys.modules["mergekit.plan"].MergePlanner
    original = planner_class._plan
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def plan(self: Any) -> None:
        configure_planner(self)
        original(self)
        attach_to_planner(self)

    setattr(plan, _MARK, True)
    planner_class._plan = plan


def patch_raw_merge() -> None:
    """Let our methods see the plans of `mergekit-pytorch`, and its parameters include those of inner methods."""
    from neuron_methods.plugin.composite import configured
    from neuron_methods.plugin.planning import attach_to_flat_merge

    module = sys.modules["mergekit.scripts.merge_raw_pytorch"]
    original = module.plan_flat_merge
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def plan_flat_merge(config: Any, *args: Any, **kwargs: Any) -> list[Any]:
        options = kwargs.get("options") or args[-1]
        tasks = original(config, *args, **kwargs)
        return attach_to_flat_merge(config, tasks, device=options.device or "cpu", quiet=options.quiet)

    resolve = module.construct_param_dicts

    @functools.wraps(resolve)
    def construct_param_dicts(config: Any, merge_method: Any, tensor_name: str) -> Any:
        return resolve(config, configured(merge_method, config), tensor_name)

    setattr(plan_flat_merge, _MARK, True)
    module.plan_flat_merge = plan_flat_merge
    module.construct_param_dicts = construct_param_dicts


def patch_loaders() -> None:
    """Let mergekit's loaders hand out adapters' tensors lazily, without a cache directory."""
    from mergekit.common import ModelReference

    from neuron_methods.adapters.opening import open_adapter

    cache_class = sys.modules["mergekit.io.tasks"].LoaderCache
    original_get, original_loader = cache_class.get, ModelReference.lazy_loader
    if getattr(original_get, _MARK, False):
        return

    @functools.wraps(original_get)
    def get(self: Any, model: Any) -> Any:
        if model.lora is not None and model not in self.loaders:
            self.loaders[model] = open_adapter(
                model,
                self.get(model.model_copy(update={"lora": None})),
                cache_dir=self.hf_cache_dir,
                allow_pickle=self.lazy_unpickle,
                trust_remote_code=self.trust_remote_code,
            )
        return original_get(self, model)

    @functools.wraps(original_loader)
    def lazy_loader(self: Any, cache_dir: str | None = None, lazy_unpickle: bool = True) -> Any:
        if self.lora is None:
            return original_loader(self, cache_dir, lazy_unpickle)
        base = original_loader(self.model_copy(update={"lora": None}), cache_dir, lazy_unpickle)
        return open_adapter(self, base, cache_dir=cache_dir, allow_pickle=lazy_unpickle)

    setattr(get, _MARK, True)
    cache_class.get = get
    ModelReference.lazy_loader = lazy_loader


def patch_configuration() -> None:
    """Let an adapter stand by itself in a configuration, and list the models in its order."""
    from neuron_methods.adapters.resolve import resolve_adapters

    configuration_class = sys.modules["mergekit.config"].MergeConfiguration
    original = configuration_class.referenced_models
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def referenced_models(self: Any) -> list[Any]:
        found = original(resolve_adapters(self))
        return sorted(found, key=list(models_in_order(self)).index)

    setattr(referenced_models, _MARK, True)
    configuration_class.referenced_models = referenced_models


def models_in_order(configuration: Any) -> Iterator[Any]:
    """The models of a configuration as they stand in it, the base first.

    mergekit 0.1.5 takes them from a set, whose order changes from run to run. Where there is no base_model, the first
    one gives the output its config and tokenizer.
    """
    if configuration.base_model is not None:
        yield configuration.base_model
    for holder in (configuration, *(configuration.modules or {}).values()):
        yield from (entry.model for entry in holder.models or ())
        yield from (source.model for output in holder.slices or () for source in output.sources)


def patch_merge() -> None:
    """Take config, tokenizer and other files of base+adapter from the base, and ask no network about local paths.

    mergekit 0.1.5's model card asks the Hub about every path of the form `a` or `a/b`, also where it exists locally;
    without a network a run ends there in a traceback, after the weights are written and before the tokenizer is.
    """
    module = sys.modules["mergekit.merge"]
    original = module._get_donor_model
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def get_donor_model(merge_config: Any, options: Any) -> tuple[Any, str]:
        donor = merge_config.base_model or merge_config.referenced_models()[0]
        if donor.lora is None:
            return original(merge_config, options)
        return donor, donor.local_path(cache_dir=options.transformers_cache, ignore_lora=True)

    setattr(get_donor_model, _MARK, True)
    module._get_donor_model = get_donor_model

    card = sys.modules["mergekit.card"]
    ask = card.is_hf
    card.is_hf = functools.wraps(ask)(lambda path: not os.path.exists(path) and ask(path))
