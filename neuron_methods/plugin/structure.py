"""Do the models of a YAML fit each other, and what do they store that mergekit's definitions do not know?

mergekit 0.1.5 pairs the tensors of a layer by their position in each model's list, whatever their names: where the base
has no attention bias and an expert has, the expert's is lost without a word, and the other way round the plan ends in
an IndexError. Modules that the YAML leaves out are left out of the output. Both are refused here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mergekit.architecture import (
    ConfiguredModelArchitecture,
    ConfiguredModuleArchitecture,
    ModelArchitecture,
)
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration, OutputSliceDefinition
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch import Tensor

from neuron_methods.models.headers import HeaderFiles
from neuron_methods.models.skeleton import Skeleton, model_class
from neuron_methods.models.verification import load_report
from neuron_methods.plugin.architectures import known_names, spellings
from neuron_methods.plugin.seam import architecture_info
from neuron_methods.support.errors import UserError, explained_by


@dataclass(frozen=True)
class _Part:
    """What a model contributes to a slice of the output: the layers from `start` up to `stop`."""

    model: ModelReference
    start: int
    stop: int


@explained_by("models")
def check_structure(
    configuration: MergeConfiguration, options: MergeOptions, name: str, architecture: ModelArchitecture | None = None
) -> ModelArchitecture:
    """Make sure that modules, layers and layouts of the models fit each other; their loaders must be open.

    Args:
        configuration: as read, not yet normalised by mergekit's planner.
        options: mergekit's.
        name: of the YAML, for messages.
        architecture: that the merge is planned by, where that is decided.

    Returns:
        The definition of the architecture.

    Raises:
        UserError: naming the module, the models and what differs.
    """
    try:
        architecture = architecture or architecture_info(configuration, options)
    except RuntimeError as error:
        if "--allow-crimes" not in str(error):
            raise UserError(f"{name}: {error}") from None
        raise UserError(different_architectures(configuration, options)) from None
    base = configuration.base_model or configuration.referenced_models()[0]
    kind = base.config(options.trust_remote_code).architectures[0]
    modules = architecture.modules
    if configuration.slices and len(modules) > 1:
        raise UserError(
            f"{name}: slices: a {kind} has the modules {', '.join(modules)}, each with layers of its own; write the "
            "slices under modules:"
        )
    for key in configuration.modules or ():
        if key not in modules:
            raise UserError(f"{name}: modules: a {kind} has no module {key!r} (it has: {', '.join(modules)})")
    left_out = [key for key in modules if configuration.modules and key not in configuration.modules]
    if left_out:
        raise UserError(
            f"{name}: modules: {', '.join(left_out)} of {kind} left out, so the output would lack them; list every "
            f"module ({', '.join(modules)})"
        )
    for key in modules:
        written = 0
        for parts in _slices(configuration, architecture, key, options, name):
            _check_layers(parts, written, key, architecture, base, options)
            written += parts[0].stop - parts[0].start
    return architecture


def different_architectures(configuration: MergeConfiguration, options: MergeOptions) -> str:
    """Say which model is of which architecture, one for each."""
    found: dict[str, ModelReference] = {}
    for model in configuration.referenced_models():
        found.setdefault(model.config(options.trust_remote_code).architectures[0], model)
    models = ", ".join(f"{model} is a {kind}" for kind, model in found.items())
    return f"the models are of different architectures: {models}; merge models of one architecture"


def _slices(
    configuration: MergeConfiguration,
    architecture: ModelArchitecture,
    key: str,
    options: MergeOptions,
    name: str,
) -> list[list[_Part]]:
    """What the module `key` of the output is made of, layer ranges checked."""
    depths = {
        model: architecture.modules[key].architecture.num_layers(model.config(options.trust_remote_code))
        for model in configuration.referenced_models()
    }
    module = (configuration.modules or {}).get(key)
    outputs: Sequence[OutputSliceDefinition] = (module.slices if module else configuration.slices) or ()
    if outputs:
        slices = [[_Part(s.model, *s.layer_range) for s in output.sources] for output in outputs]
    else:
        listed = [m.model for m in (module.models if module else configuration.models) or ()]
        if configuration.base_model is not None and configuration.base_model not in listed:
            listed.append(configuration.base_model)
        slices = [[_Part(model, 0, depths[model]) for model in listed]]
    of_module = f"module {key}: " if len(architecture.modules) > 1 else ""
    for parts in slices:
        for part in parts:
            if not 0 <= part.start <= part.stop <= depths[part.model]:
                raise UserError(
                    f"{name}: {of_module}layer_range [{part.start}, {part.stop}] of {part.model}, which has "
                    f"{depths[part.model]} layers"
                )
        lengths = {part.stop - part.start: part.model for part in parts}
        if len(lengths) > 1:
            shown = ", ".join(f"{model} {length}" for length, model in lengths.items())
            raise UserError(f"{name}: {of_module}the models contribute different numbers of layers ({shown})")
    return slices


def _check_layers(
    parts: list[_Part],
    written: int,
    key: str,
    architecture: ModelArchitecture,
    base: ModelReference,
    options: MergeOptions,
) -> None:
    """Refuse layers whose tensors would be paired with others than their namesakes.

    The layers of `parts` become those of the output from number `written` on, laid out by the base's config.
    """

    def module(model: ModelReference) -> ConfiguredModuleArchitecture:
        config = model.config(options.trust_remote_code)
        return ConfiguredModelArchitecture(info=architecture, config=config).get_module(key)

    of_base = module(base)
    for part in parts:
        of_model = module(part.model)
        for offset in range(part.stop - part.start):
            expected, found = _layer(of_base, written + offset), _layer(of_model, part.start + offset)
            if len(found) == len(expected) and (
                options.allow_crimes or all(f & e for f, e in zip(found, expected, strict=True))
            ):
                continue
            extra = next((min(f) for f in found if not any(f & e for e in expected)), None)
            lacking = next((min(e) for e in expected if not any(f & e for f in found)), None)
            what = " and ".join(
                [f"have {extra}, which those of {base} lack"] * (extra is not None)
                + [f"lack {lacking}, which those of {base} have"] * (lacking is not None)
            )
            if written != part.start and [*map(sorted, _layer(of_base, part.start + offset))] == [*map(sorted, found)]:
                raise UserError(
                    f"{part.model}: slices put its layer {part.start + offset} where the output has layer "
                    f"{written + offset}, and by the config of {base} that is another kind of layer; choose slices "
                    "that leave each kind of layer in its place"
                )
            raise UserError(
                f"{part.model}: its layers {what or 'hold their tensors in another order'}; experts must have the "
                "layout of the base they were fine-tuned from"
            )


def _layer(module: ConfiguredModuleArchitecture, index: int) -> list[set[str]]:
    """The spellings of each tensor of a layer, with `{i}` for all numbers."""
    return [set(map(_numberless, spellings(w))) for w in module.layer_weights(index)]


@dataclass(frozen=True)
class Unknown:
    """Tensors that mergekit's definition of the architecture does not know.

    Attributes:
        of_base: stored by the base, to be carried over unchanged.
        of_experts: {model: stored by it and not by the base}, which no method merges.
    """

    of_base: list[str]
    of_experts: dict[ModelReference, list[str]]


def unknown_tensors(
    configuration: MergeConfiguration, architecture: ModelArchitecture, options: MergeOptions
) -> Unknown:
    """Find what the models store beside the tensors of their definition.

    Args:
        configuration: of the merge, normalised or not.
        architecture: from `check_structure`.
        options: mergekit's.

    Raises:
        UserError: base and expert store different values under one such name, and no method would merge them.
    """
    base = configuration.base_model or configuration.referenced_models()[0]
    _refuse_incomplete(base, options)
    left = left_over(configuration, architecture, options)
    loader = LoaderCache().get(base)
    of_experts = {}
    for model, names in left.items():
        other = LoaderCache().get(model)
        for name in sorted(names & left[base]):
            if not _agree(other.get_tensor(name), loader.get_tensor(name)):
                raise UserError(
                    f"{model}: tensor {name} differs from that of {base}, but the model's class does not read it, so "
                    "no method would merge it"
                )
        alone = sorted(names - left[base])
        if model != base and not options.allow_crimes:
            _refuse_other_layers(model, base, alone, architecture, options)
        if alone:
            of_experts[model] = alone
    return Unknown(sorted(left[base]), of_experts)


def _refuse_incomplete(base: ModelReference, options: MergeOptions) -> None:
    """Refuse a base in which its own class would miss something, as an output by what it stores would, too."""
    config, headers = base.config(options.trust_remote_code), HeaderFiles()
    built = model_class(config, base.model.path, trust_remote_code=options.trust_remote_code)
    loader = LoaderCache().get(base.model_copy(update={"lora": None}))
    if built is None or not loader.index.is_safetensors:
        return
    stored = {name: headers.behind(loader, name) for name in loader.index.tensor_paths}
    # Encoders are often saved without the pooler, which their config does not tell.
    missing = [name for name in load_report(built, config, stored).missing if "pooler" not in name.split(".")]
    if missing:
        raise UserError(
            f"{base}: tensor {missing[0]} is missing from its checkpoint ({len(stored)} tensors found); the "
            "architecture in its config.json promises it: is the checkpoint complete?"
        )


def left_over(
    configuration: MergeConfiguration, architecture: ModelArchitecture, options: MergeOptions
) -> dict[ModelReference, set[str]]:
    """Find what each model stores and a definition does not merge, the base first; arguments as `unknown_tensors`."""
    models = configuration.referenced_models()
    base = configuration.base_model or models[0]
    configs = {model: model.config(options.trust_remote_code) for model in (base, *models)}
    known = set().union(*(known_names(architecture, config) for config in configs.values()))
    left = {model: set(LoaderCache().get(model).index.tensor_paths) - known for model in configs}
    built = model_class(configs[base], base.model.path, trust_remote_code=options.trust_remote_code)
    if any(left.values()) and built is not None:
        # Under another name, or as a part of what is merged whole, a tensor is merged all the same.
        renamed = Skeleton.build(built, configs[base]).renamed(known.union(*left.values()))
        merged = known | {renamed[name].path for name in known}
        left = {model: {n for n in names if renamed[n].path not in merged} for model, names in left.items()}
    return left


@explained_by("models")
def _refuse_other_layers(
    model: ModelReference,
    base: ModelReference,
    alone: list[str],
    architecture: ModelArchitecture,
    options: MergeOptions,
) -> None:
    """Refuse an expert whose layers have what the base's lack and the expert's class reads, or lack what those have."""
    config, stored = model.config(options.trust_remote_code), LoaderCache().get(model).index.tensor_paths
    weights = [w for w in architecture.all_weights(config) if not w.optional and _in_layer(w.name)]
    found = {_numberless(w.name) for w in weights if any(name in stored for name in spellings(w))}
    lacking = [name for name in dict.fromkeys(_numberless(w.name) for w in weights) if name not in found]
    having = [name for name in alone if _in_layer(name)]
    built = model_class(config, model.model.path, trust_remote_code=options.trust_remote_code)
    if not (lacking or having) or built is None:
        return
    skeleton = Skeleton.build(built, config)
    read = {name: new.path for name, new in skeleton.renamed(stored).items() if new.path in skeleton.tensors}
    of_class = {_numberless(path) for path in read.values()}
    # The base may spell them otherwise than the expert.
    renamed = skeleton.renamed(weight.name for weight in weights)
    in_memory = {_numberless(name): _numberless(new.path) for name, new in renamed.items()}
    lacking = [name for name in lacking if of_class.isdisjoint({name, in_memory[name]})]
    order = list(skeleton.tensors)
    having = [_numberless(n) for n in sorted((n for n in having if n in read), key=lambda n: order.index(read[n]))]
    what = [f"have {name}, which those of {base} lack" for name in having[:1]]
    what += [f"lack {name}, which those of {base} have" for name in lacking[:1]]
    if what:
        raise UserError(
            f"{model}: its layers {' and '.join(what)}; experts must have the layout of the base they were fine-tuned "
            "from"
        )


def _in_layer(name: str) -> bool:
    return re.search(r"\.\d+\.", name) is not None


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "{i}", name)


def _agree(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values, as far as the narrower of their dtypes can tell."""
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype:
        return torch.equal(one, other) or torch.equal(_bits(one), _bits(other))
    return torch.equal(one.to(other.dtype), other) or torch.equal(one, other.to(one.dtype))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
