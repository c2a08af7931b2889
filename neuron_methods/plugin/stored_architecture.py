"""The definition of an architecture by what its base stores, where mergekit has none or one that does not fit.

mergekit 0.1.5 infers a definition from the names that the model has in memory, and takes those that it does not find in
the checkpoint for optional: where transformers packs the experts of a mixture, and the first layer has none, all of
them are lost without a word. Its own tables demand what newer checkpoints no longer store, or leave out what they do.
Here the tensors are those that the base stores, each under its stored name, as far as the model's class reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from mergekit.architecture.base import ModelArchitecture, ModuleArchitecture, ModuleDefinition, WeightInfo
from transformers import PretrainedConfig
from transformers.core_model_loading import dot_natural_key

from neuron_methods.models.skeleton import Skeleton

_LAYER = re.compile(r"\.(\d+)\.")
# Where a config may say how many layers there are.
_DEPTH_KEYS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
    "depth",
)
_PARTS = ("", "text_config", "vision_config", "audio_config", "encoder", "decoder")


@dataclass(frozen=True)
class StoredModule(ModuleArchitecture):
    """A module whose tensors are those that the base stores.

    Attributes:
        loose: tensors outside the layers.
        layers: per layer of the base, its tensors.
        depth_key: the config's key for the number of layers, None where it has none.
        statistics: names of tensors that were measured and not learned, such as a batch norm's running mean.
    """

    loose: tuple[WeightInfo, ...]
    layers: tuple[tuple[WeightInfo, ...], ...] = ()
    depth_key: str | None = None
    statistics: frozenset[str] = frozenset()

    def pre_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """List what lies outside the layers."""
        return list(self.loose)

    def layer_weights(self, index: int, config: PretrainedConfig) -> list[WeightInfo]:
        """List what layer `index` holds; one beyond the base's is laid out like its last."""
        if index < len(self.layers):
            return list(self.layers[index])
        return [_renumbered(info, index) for info in self.layers[-1]]

    def post_weights(self, config: PretrainedConfig) -> list[WeightInfo]:
        """List nothing: all loose tensors come before the layers."""
        return []

    def num_layers_config_key(self) -> str | None:
        """Give the config's key for the number of layers."""
        return self.depth_key

    def num_layers(self, config: PretrainedConfig) -> int:
        """Count the layers by the config where it tells, else those of the base."""
        return super().num_layers(config) if self.depth_key else len(self.layers)


def stored_architecture(
    config: PretrainedConfig,
    skeleton: Skeleton | None,
    base: Collection[str],
    others: Iterable[Collection[str]] = (),
    written: Callable[[str], str] = str,
) -> ModelArchitecture:
    """Define an architecture by what a merge's models store.

    Args:
        config: the base's.
        skeleton: of the class that the config names; None where it is not to be had, and every name is taken as it is.
        base: the names that the base stores; the output spells its tensors like them.
        others: the names that each other model stores. What they spell otherwise is read under their own names; a
            head that they alone store, as the base ties it, becomes optional.
        written: how the output spells a tensor, given how the base does.
    """
    if skeleton is None:
        return _in_modules([WeightInfo(name=name) for name in sorted(base, key=dot_natural_key)], config)
    spelled = _spellings(skeleton, base)
    foreign: dict[str, dict[str, bool]] = {}
    for names in others:
        for path, own in _spellings(skeleton, names).items():
            if own != spelled.get(path):
                foreign.setdefault(path, {}).update(own)
    infos = []
    for path in (path for path in skeleton.tensors if path in spelled):
        own, others_own = spelled[path], foreign.get(path, {})
        also = [name for name in others_own if name not in own]
        whole = [name for name, converted in {**own, **others_own}.items() if not converted]
        if len(own) == 1 and len(whole) == 1 + len(also):
            (first,) = own
            infos.append(_weight(skeleton, written(first), path, [first, *also]))
        elif also:
            # Packed here and in parts there, or the other way round: merged as the class has it in memory. Parts are no
            # other names of it; mergekit's loader converts them where it finds no such name.
            infos.append(_weight(skeleton, path, path, whole))
        else:
            infos += [_weight(skeleton, written(name), path, [name]) for name in own]
    if (head := skeleton.output) in foreign and head not in spelled and skeleton.tied_to(head):
        infos.append(_weight(skeleton, *foreign[head], head))
    statistics = frozenset(written(name) for path in skeleton.statistics for name in spelled.get(path, ()))
    return _in_modules(infos, config, statistics)


def statistics_of(architecture: ModelArchitecture) -> frozenset[str]:
    """The names of tensors that were measured and not learned, as far as the definition knows them."""
    modules = (module.architecture for module in architecture.modules.values())
    return frozenset().union(*(module.statistics for module in modules if isinstance(module, StoredModule)))


def _spellings(skeleton: Skeleton, names: Iterable[str]) -> dict[str, dict[str, bool]]:
    """{path in memory: {stored name: whether it is converted}} of what the class reads."""
    found: dict[str, dict[str, bool]] = {}
    for name, new in skeleton.renamed(names).items():
        if new.path in skeleton.tensors:
            found.setdefault(new.path, {})[name] = new.converted
    return found


def _weight(skeleton: Skeleton, name: str, path: str, also: Collection[str] = ()) -> WeightInfo:
    group = skeleton.tied_to(path)
    # A tied copy may be missing where its source is stored, under whichever of the names; and encoders are often saved
    # without the pooler, which their config does not tell. What no model stores by its own name cannot be optional:
    # mergekit 0.1.5 would pass it over.
    stored = not also or name in also
    optional = stored and (path in group[1:] or "pooler" in path.split("."))
    others = tuple(dict.fromkeys([*also, *(member for member in group if member != path)]))
    # mergekit 0.1.5 raises a TypeError where an optional weight has aliases; its loader takes tied names just as well.
    return WeightInfo(
        name=name,
        tied_names=tuple(other for other in others if other != name) or None,
        optional=optional,
        vocabulary_axis=0 if path in skeleton.vocabulary else None,
    )


def _in_modules(
    infos: Iterable[WeightInfo], config: PretrainedConfig, statistics: frozenset[str] = frozenset()
) -> ModelArchitecture:
    """Divide tensors into modules by the layers that they lie in or beside; one where all layers have one prefix."""
    layers: dict[str, dict[int, list[WeightInfo]]] = {}
    loose = []
    for info in infos:
        match = _LAYER.search(info.name)
        if match is None:
            loose.append(info)
        else:
            layers.setdefault(info.name[: match.start()], {}).setdefault(int(match[1]), []).append(info)
    stacks: dict[str, tuple[tuple[WeightInfo, ...], ...]] = {}
    for prefix, found in layers.items():
        if _depth_key(config, prefix, max(found) + 1) is None and len(layers) > 1:
            loose += [info for index in sorted(found) for info in found[index]]  # a list that is no stack of layers
        else:
            stacks[prefix] = tuple(tuple(found.get(index, ())) for index in range(max(found) + 1))
    modules: dict[str, StoredModule] = {}
    for prefix, stack in stacks.items():
        name = _module_name(prefix, stacks)
        own = [info for info in loose if len(stacks) == 1 or info.name.startswith(f"{name}.")]
        loose = [info for info in loose if info not in own]
        key = _depth_key(config, prefix, len(stack))
        modules[name] = StoredModule(tuple(own), stack, key, statistics)
    if loose:
        name, *more = {info.name.partition(".")[0] for info in loose}
        modules["default" if more or name in modules else name] = StoredModule(tuple(loose), statistics=statistics)
    keys = ("vocab_size", "text_config.vocab_size")
    return ModelArchitecture(
        modules={name: ModuleDefinition(architecture=module) for name, module in modules.items()},
        architectures=list(config.architectures or []),
        model_type=config.model_type,
        tagalong_files=["generation_config.json", "preprocessor_config.json", "processor_config.json"],
        vocab_size_config_key=next((key for key in keys if _value(config, key) is not None), None),
    )


def _module_name(prefix: str, prefixes: Collection[str]) -> str:
    """The shortest beginning of a prefix that tells it from the others; `default` where there are none."""
    if len(prefixes) == 1:
        return "default"
    parts = prefix.split(".")
    names = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((n for n in names if sum(p.startswith(f"{n}.") for p in prefixes) == 1), prefix)


def _depth_key(config: PretrainedConfig, prefix: str, depth: int) -> str | None:
    """The config's key that says that there are `depth` layers under `prefix`; None where none does."""
    keys = [f"{part}.{key}".lstrip(".") for part in _PARTS for key in _DEPTH_KEYS]
    words = set(re.split(r"[._]", prefix))
    fitting = [key for key in keys if _value(config, key) == depth]
    return max(fitting, key=lambda key: len(words & set(re.split(r"[._]", key))), default=None)


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part, None)
    return config


def _renumbered(info: WeightInfo, layer: int) -> WeightInfo:
    def changed(names: Iterable[str] | None) -> tuple[str, ...] | None:
        return names and tuple(_LAYER.sub(f".{layer}.", name, count=1) for name in names)

    (name,) = changed((info.name,)) or ()
    return info.model_copy(
        update={"name": name, "aliases": changed(info.aliases), "tied_names": changed(info.tied_names)}
    )
