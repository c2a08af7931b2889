"""Which definition of an architecture a merge is planned by: mergekit's own where it fits, else what the base stores.

As measured with mergekit 0.1.5 and transformers 5.23, its own definitions

- infer ViT, DeiT, CLIP and most other models from the names in memory, which transformers 5 has changed: what is not
  found passes for optional, and the merge of two ViT classifiers writes 8 of 40 tensors and exits normally;
- know of T5 only the gated one, and refuse T5 v1.0 (t5-small and its kin) for want of `wi_0`;
- lose the biases of Llama, Qwen3, Gemma, Gemma 2 and 3 with ``attention_bias`` or ``mlp_bias``, and Gemma's untied
  head; refuse Phi-3 with tied embeddings for want of `lm_head.weight`, and BERT by a TypeError.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from mergekit.architecture import arch_info_for_config
from mergekit.architecture.base import ModelArchitecture, WeightInfo
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from neuron_methods.models.skeleton import Skeleton, model_class, unread
from neuron_methods.plugin.stored_architecture import stored_architecture


def architecture_of_merge(
    configuration: MergeConfiguration, options: MergeOptions, inferred: Callable[..., ModelArchitecture]
) -> ModelArchitecture:
    """Choose the definition that a merge is planned by.

    Args:
        configuration: of the merge.
        options: mergekit's.
        inferred: mergekit's own `get_architecture_info`, in whose place this stands.

    Raises:
        RuntimeError: as mergekit does, where models are of different architectures.
        UserError: the base's class cannot be built from its config.
    """
    LoaderCache().setup(options)
    models = configuration.referenced_models()
    base = configuration.base_model or models[0]
    configs = {model: model.config(options.trust_remote_code) for model in models}
    config = configs.get(base) or base.config(options.trust_remote_code)
    stored = LoaderCache().get(base).index.tensor_paths
    tabled = all(arch_info_for_config(found) is not None for found in configs.values())
    own = inferred(configuration, options) if tabled else None
    if len({tuple(found.architectures or ()) for found in configs.values()}) > 1 and not options.allow_crimes:
        raise RuntimeError("Must specify --allow-crimes to attempt to mix different architectures")
    others = [LoaderCache().get(model).index.tensor_paths for model in models if model != base]
    # Experts may spell their tensors otherwise than the base.
    fits = own is not None and all(_demands_no_more(own, config, names) for names in (stored, *others))
    fits = fits and _adds_nothing(own, config, stored, others)
    left = stored.keys() - known_names(own, config) if fits else ()
    if fits and not left:
        return own
    built = model_class(config, base.model.path, trust_remote_code=options.trust_remote_code)
    skeleton = None if built is None else Skeleton.build(built, config)
    if own is not None and (skeleton is None or (fits and len(unread(skeleton, left)) == len(left))):
        return own
    return stored_architecture(config, skeleton, stored, others)


def known_names(definition: ModelArchitecture, config: PretrainedConfig) -> set[str]:
    """Every spelling of every tensor that a definition knows in a model of this config."""
    return {name for weight in definition.all_weights(config) for name in spellings(weight)}


def spellings(weight: WeightInfo) -> tuple[str, ...]:
    """The names that a tensor may be stored under, the output's first."""
    return (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))


def _demands_no_more(definition: ModelArchitecture, config: PretrainedConfig, stored: Collection[str]) -> bool:
    """Whether all that a definition holds for indispensable is stored, or made of what is."""
    try:
        weights = definition.all_weights(config)
    except RuntimeError:  # of Qwen2-VL, for one: its config keeps the number of layers elsewhere since transformers 5
        return False
    if any(weight.optional and weight.aliases for weight in weights):
        return False  # of BERT, for one: mergekit 0.1.5's planner ends in a TypeError there
    return all(
        any(name in stored for name in spellings(weight))
        or can_convert_checkpoint_keys(config.model_type, set(stored), weight.name)
        for weight in weights
        if not weight.optional
    )


def _adds_nothing(
    definition: ModelArchitecture, config: PretrainedConfig, base: Collection[str], others: list[Collection[str]]
) -> bool:
    """Whether the output would hold no optional tensor that experts alone store."""
    optional = {weight.name for weight in definition.all_weights(config) if weight.optional}
    return not any(name in names for name in optional.difference(base) for names in others)
