"""Architecture definitions that mergekit 0.1.5 lacks or gets wrong, for whole merges by every method.

Why each exists, as measured with mergekit 0.1.5 and transformers 5.23:

- **ViT, DeiT**: without a definition mergekit infers one from the instantiated model. transformers 5 renames
  ViT's modules in memory, the names are not found in the checkpoint, what is not found passes for optional,
  and the merge of `ViTModel`, `ViTForImageClassification` or `DeiTModel` with two layers writes 8 or 9
  tensors of 40 or 41 and exits normally.
- **CLIP**: for the same reason, of a `CLIPVisionModel` or `CLIPTextModel` whose names carry the tower's
  prefix, as in nearly all that are published, not one tensor is written, and the merge exits normally.
  `CLIPModel` and `CLIPForImageClassification` end in a NotImplementedError.
- **T5, MT5, UMT5**: the built-in definition has only `T5ForConditionalGeneration` with the gated feed-forward
  and refuses T5 v1.0 (t5-small and its kin) for want of `wi_0`. The rest of the family is inferred, which
  suffices for what transformers 5 writes but depends on what it can instantiate.
- **Llama, Qwen3, Gemma, Gemma 2, Gemma 3** with ``attention_bias`` (Llama also ``mlp_bias``) lose all these
  biases, and Gemma with an untied head loses the head; **Phi-3** with tied embeddings (Phi-4-mini) is refused
  for want of `lm_head.weight`. These keep mergekit's definition and get what it lacks.

The output spells each tensor as the base's checkpoint does, as transformers 5 itself does when it saves what
it loaded: whatever could load the base can load the merge. Experts may use any spelling the tables know; they
are in `architecture_tables`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from mergekit.architecture import arch_info_for_config, get_architecture_info
from mergekit.architecture.base import ModelArchitecture, ModuleArchitecture, ModuleDefinition, WeightInfo
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from neuron_methods.models.skeleton import Skeleton, model_class, unread
from neuron_methods.plugin.architecture_tables import (
    AMENDMENTS,
    Definition,
    StoredTensor,
    Table,
    clip_definitions,
    t5_definitions,
    vit_definitions,
)
from neuron_methods.plugin.seam import architecture_table, check_fit
from neuron_methods.plugin.stored_architecture import stored_architecture


def architecture_of_merge(configuration: MergeConfiguration, options: MergeOptions) -> ModelArchitecture:
    """Choose the definition that a merge is planned by.

    A definition from a table, ours or mergekit's, that fits what the models store is taken; where there is none, or it
    demands what the base does not store, or leaves out what the model's class reads, the base's own tensors define it.

    Args:
        configuration: of the merge.
        options: mergekit's.

    Raises:
        RuntimeError: by mergekit, where models are of different architectures.
        UserError: the base's class cannot be built from its config.
    """
    LoaderCache().setup(options)
    models = configuration.referenced_models()
    base = configuration.base_model or models[0]
    config = base.config(options.trust_remote_code)
    stored = {model: LoaderCache().get(model).index.tensor_paths for model in models}
    tabled = all(arch_info_for_config(model.config(options.trust_remote_code)) is not None for model in models)
    definition = get_architecture_info(configuration, options) if tabled else None
    fits = definition is not None and _demands_no_more(definition, config, stored[base])
    left = _left_out(definition, config, stored[base]) if fits else []
    if fits and not left:
        return definition
    built = model_class(config, base.model.path, trust_remote_code=options.trust_remote_code)
    skeleton = None if built is None else Skeleton.build(built, config)
    if definition is not None and (skeleton is None or (fits and len(unread(skeleton, left)) == len(left))):
        return definition
    others = [names for model, names in stored.items() if model != base]
    return stored_architecture(config, skeleton, stored[base], others)


def _demands_no_more(definition: ModelArchitecture, config: PretrainedConfig, stored: Collection[str]) -> bool:
    """Whether all that a definition holds for indispensable is stored, or made of what is."""
    try:
        weights = definition.all_weights(config)
    except RuntimeError:  # of Qwen2-VL, for one: its config keeps the number of layers elsewhere since transformers 5
        return False
    if any(weight.optional and weight.aliases for weight in weights):
        return False  # of BERT, for one: mergekit 0.1.5's planner ends in a TypeError there
    needed = [_spellings(weight) for weight in weights if not weight.optional]
    return all(
        any(name in stored for name in names) or can_convert_checkpoint_keys(config.model_type, set(stored), names[0])
        for names in needed
    )


def _left_out(definition: ModelArchitecture, config: PretrainedConfig, stored: Collection[str]) -> list[str]:
    """The stored names that a definition does not know."""
    known = {name for weight in definition.all_weights(config) for name in _spellings(weight)}
    return sorted(set(stored) - known)


def _spellings(weight: WeightInfo) -> tuple[str, ...]:
    return (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))


def register_architectures() -> None:
    """Make mergekit use these definitions, its own of the same names replaced or amended; once or again."""
    check_fit(("mergekit.architecture",))
    table = architecture_table()
    for definition in (*t5_definitions(), *vit_definitions(), *clip_definitions()):
        table[definition.architecture] = [_model_architecture(definition)]
    for architecture, amendment in AMENDMENTS.items():
        table[architecture] = [_amended(own, amendment) for own in table.get(architecture, [])]


@dataclass(frozen=True)
class TabledModule(ModuleArchitecture):
    """A module whose tensors are those of a table, given the config and what the base stores.

    All layers of one config list the same tensors in the same order, as mergekit pairs the tensors of base
    and experts by position.
    """

    table: Table

    def pre_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """List what comes before the layers."""
        return _weight_infos(self.table.before, config, _names_on_disk(config))

    def layer_weights(self, index: int, config: PretrainedConfig) -> list[WeightInfo]:
        """List what layer `index` holds."""
        return _weight_infos(self.table.layer, config, _names_on_disk(config), index)

    def post_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """List what comes after the layers."""
        return _weight_infos(self.table.after, config, _names_on_disk(config))

    def num_layers_config_key(self) -> str | None:
        """Give the config's key for the number of layers, None for a module without any."""
        return self.table.depth

    def num_layers(self, config: PretrainedConfig) -> int:
        """Give the number of layers, 0 for a module without any."""
        return 0 if self.table.depth is None else super().num_layers(config)


@dataclass(frozen=True)
class AmendedModule(ModuleArchitecture):
    """One of mergekit's own modules; what it gets wrong is replaced, by name, what it lacks is added last."""

    own: ModuleArchitecture
    amendment: Table

    def pre_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """List what comes before the layers."""
        return _override(self.own.pre_weights(config), _weight_infos(self.amendment.before, config))

    def layer_weights(self, index: int, config: PretrainedConfig) -> list[WeightInfo]:
        """List what layer `index` holds."""
        amendment = _weight_infos(self.amendment.layer, config, index=index)
        return _override(self.own.layer_weights(index, config) or [], amendment)

    def post_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """List what comes after the layers."""
        return _override(self.own.post_weights(config), _weight_infos(self.amendment.after, config))

    def num_layers_config_key(self) -> str:
        """Give the config's key for the number of layers."""
        return self.own.num_layers_config_key()

    def num_layers(self, config: PretrainedConfig) -> int:
        """Give the number of layers, 0 for a module without any."""
        return self.own.num_layers(config)


def _model_architecture(definition: Definition) -> ModelArchitecture:
    return ModelArchitecture(
        modules={name: ModuleDefinition(architecture=TabledModule(table)) for name, table in definition.modules},
        architectures=[definition.architecture],
        model_type=definition.model_type,
        tagalong_files=list(definition.copied_files) or None,
        vocab_size_config_key=definition.vocab_size_key,
    )


def _amended(own: ModelArchitecture, amendment: Table) -> ModelArchitecture:
    """Return mergekit's own definition of one module with `amendment`; unchanged if it was amended before."""
    module = own.modules["default"]
    if isinstance(module.architecture, AmendedModule):
        return own
    amended = module.model_copy(update={"architecture": AmendedModule(module.architecture, amendment)})
    return own.model_copy(update={"modules": {"default": amended}})


def _override(own: list[WeightInfo], amendment: list[WeightInfo]) -> list[WeightInfo]:
    by_name = {info.name: info for info in (*own, *amendment)}
    return list(by_name.values())


def _weight_infos(
    tensors: Iterable[StoredTensor],
    config: PretrainedConfig,
    stored: Collection[str] = (),
    index: int | None = None,
) -> list[WeightInfo]:
    """What mergekit has to merge of `tensors`: those `config` calls for, in the spelling found in `stored`.

    `stored` holds the names in the checkpoint that `config` was read from. Empty means unknown: then every
    tensor is spelled as in the table, and those that the base decides about stay optional.
    """
    infos = []
    for tensor in tensors:
        if tensor.when and not _holds(tensor.when, config):
            continue
        spellings = [name.replace("{i}", str(index)) for name in (tensor.name, *tensor.also)]
        found = [name for name in spellings if name in stored]
        if tensor.base_decides and stored and not found:
            continue
        name = found[0] if found else spellings[0]
        others = tuple(spelling for spelling in spellings if spelling != name)
        optional = tensor.optional or (tensor.first_layer_only and index != 0)
        infos.append(
            WeightInfo(
                name=name,
                # mergekit 0.1.5 raises a TypeError where an optional weight has aliases; its loader takes tied
                # names just as well.
                aliases=None if optional else others or None,
                tied_names=tensor.tied + (others if optional else ()) or None,
                optional=optional,
                vocabulary_axis=tensor.vocabulary_axis,
                force_dtype=tensor.force_dtype,
            )
        )
    return infos


def _holds(condition: str, config: PretrainedConfig) -> bool:
    field = condition.removeprefix("not ")
    return bool(getattr(config, field, False)) == (field == condition)


def _names_on_disk(config: PretrainedConfig) -> Collection[str]:
    """The tensor names of the checkpoint that `config` was read from, or none if mergekit has not opened it.

    mergekit opens all it merges before it plans. Nothing is opened or downloaded for this.
    """
    # Not at the top: mergekit.io.tasks imports mergekit.architecture, whose import may have led here.
    from mergekit.io.tasks import LoaderCache

    for reference, loader in LoaderCache.loaders.items():
        if reference.lora is None and reference.model.path == config.name_or_path:
            return loader.index.tensor_paths
    return ()
