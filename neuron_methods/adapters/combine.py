"""Merge the adapters of a loaded `PeftModel` into a new one, by any method, in the manner of `add_weighted_adapter`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_methods.adapters.export import AdapterSummary, KindSummary, module_kind
from neuron_methods.adapters.factor import Factors, factor
from neuron_methods.adapters.live import base_weight, config_for, factors_of, layer_update, layout_of
from neuron_methods.adapters.placement import layout_shape
from neuron_methods.kernels.task_vectors import TaskVector
from neuron_methods.methods.contract import MergeSettings, ModelFacts, PlannedMethod, PlannedTensor
from neuron_methods.methods.registered import register_methods
from neuron_methods.support.errors import UserError

if TYPE_CHECKING:
    from mergekit.merge_methods.base import TensorGroup
    from peft import PeftModel

_BASE = "base"


def merge_adapters(
    model: PeftModel,
    adapters: Sequence[str],
    method: str = "neuro_merging",
    *,
    adapter_name: str = "merged",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    **parameters: Any,
) -> AdapterSummary:
    """Merge adapters of a loaded model and add the result to it under a new name.

    The update of every layer is merged as the same method would merge whole models (a model-wide threshold counts all
    of the model's parameters) and factored again. The new adapter is not made the active one; `model.set_adapter`
    does.

    Args:
        model: carries the adapters, all of type LoRA.
        adapters: their names.
        method: name of any merge method, ours or mergekit's.
        adapter_name: of the new adapter.
        weights: one per adapter, for methods with a parameter `weight`; 1 each if not given.
        rank: of the new adapter's layers at most; the sum of the adapters' ranks if neither this nor `energy` is given.
        energy: share of each layer's squared norm to keep, in (0, 1].
        **parameters: of the method, each a value or a mapping from adapter to value.

    Returns:
        What the new adapter keeps of the merged update.

    Raises:
        UserError: unknown adapters or method, a name that is taken, or adapters with more than LoRA layers.
    """
    from mergekit import merge_methods

    register_methods()
    known = {registered.spec.name for registered in merge_methods.registered_methods()}
    if method not in known:
        raise UserError(f"merge_adapters: unknown method {method!r}; known: {', '.join(sorted(known))}")
    layers = _layers(model, adapters, adapter_name)
    merge = merge_methods.get(method)
    with torch.no_grad():
        updates = _merged_updates(model, layers, list(adapters), merge, _bound(adapters, weights, merge, parameters))
        if rank is None and energy is None:
            rank = sum(_largest_rank(model.peft_config[name]) for name in adapters)
        factored = {}
        for path, update in updates:
            if bool(update.any()):
                layer = layers[path]
                layout = layout_of(layer, next(name for name in adapters if name in layer.scaling))
                factored[path] = factor(layout_shape(update, layout), rank=rank, energy=energy)
        if not factored:
            raise UserError("merge_adapters: the merged update is zero everywhere; there is nothing to add")
        _add(model, adapters, adapter_name, layers, factored)
    return _summary(factored)


def _layers(model: PeftModel, adapters: Sequence[str], adapter_name: str) -> dict[str, Any]:
    """{path: LoRA layer} of the layers that any of the adapters is in."""
    from peft import PeftType
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    missing = [name for name in adapters if name not in model.peft_config]
    if missing or not adapters:
        found = ", ".join(model.peft_config)
        raise UserError(f"merge_adapters: no adapter {', '.join(missing) or 'named'}; the model has: {found}")
    if adapter_name in model.peft_config:
        raise UserError(f"merge_adapters: the model has an adapter {adapter_name!r} already; choose another name")
    for name in adapters:
        config = model.peft_config[name]
        if config.peft_type != PeftType.LORA:
            raise UserError(f"merge_adapters: {name} is of type {config.peft_type.value}; only LoRA can be merged here")
        for option in ("target_parameters", "lora_bias"):
            if getattr(config, option, None):
                raise UserError(f"merge_adapters: {name} has {option}; merge it by a YAML with mergekit-neuron merge")
        if config.bias != "none":
            raise UserError(f"merge_adapters: {name} trains biases; merge it by a YAML with mergekit-neuron merge")
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and set(module._adapters) & set(adapters):
            raise UserError(
                f"merge_adapters: {path} is stored whole (modules_to_save), which cannot be merged into LoRA; merge "
                "the adapters by a YAML with mergekit-neuron merge"
            )
    return {
        path: module
        for path, module in model.base_model.model.named_modules()
        if isinstance(module, LoraLayer) and any(name in module.scaling for name in adapters)
    }


def _bound(
    adapters: Sequence[str], weights: Sequence[float] | None, method: Any, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    names = {parameter.name for parameter in method.spec.parameters}
    given = dict(parameters)
    if weights is not None and len(weights) != len(adapters):
        raise UserError(f"merge_adapters: {len(weights)} weights for {len(adapters)} adapters")
    if "weight" in names and "weight" not in given:
        given["weight"] = dict(zip(adapters, weights or [1.0] * len(adapters), strict=True))
    unknown = sorted(set(given) - names)
    if unknown or ("weight" not in names and weights is not None):
        name, has = unknown[0] if unknown else "weights", ", ".join(sorted(names)) or "none"
        raise UserError(f"merge_adapters: {method.spec.name} has no parameter {name!r}; it has: {has}")
    return given


def _merged_updates(
    model: PeftModel, layers: Mapping[str, Any], adapters: list[str], method: Any, parameters: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Merge layer by layer; yields (path, float32 update in the arrangement of the layer's weight)."""
    from mergekit.merge_methods.base import BasePolicy, TensorGroup

    uses_base = method.spec.contract.base not in (BasePolicy.IGNORED, BasePolicy.FORBIDDEN)
    direct = isinstance(method, PlannedMethod)

    def group(path: str) -> tuple[Tensor, TensorGroup]:
        base, task_vectors = _task_vectors(layers[path], adapters)
        experts = [tau.as_subclass(TaskVector) if direct else base + tau for tau in task_vectors]
        tensors = [base, *experts] if uses_base else experts
        ids = [_BASE, *adapters] if uses_base else adapters
        base_index = 0 if uses_base else None
        return base, TensorGroup.from_tensors(tensors, ids=ids, base_index=base_index, name=f"{path}.weight")

    prepared = None
    if isinstance(method, PlannedMethod):
        prepared = method.prepare(_plan(model, layers, adapters, lambda path: group(path)[1], method, parameters))
        prepared.measure(MergeSettings())
    for path in layers:
        base, tensors = group(path)
        if prepared is not None:
            (bound,) = method._bind_parameters((tensors,), parameters)
            merged = prepared.merge(tensors, bound, torch.float32)
        else:
            (merged,) = method((tensors,), parameters=parameters, out_dtype=torch.float32)
        yield path, merged.as_subclass(Tensor) - base


def _plan(
    model: PeftModel,
    layers: Mapping[str, Any],
    adapters: Sequence[str],
    group: Callable[[str], TensorGroup],
    method: PlannedMethod,
    parameters: Mapping[str, Any],
) -> list[PlannedTensor]:
    """All of the model's parameters: those of `layers` change, the others are known to stay as they are."""
    from mergekit.merge_methods.base import TensorGroup

    facts = ModelFacts(model.base_model.model.config)

    def loaded(path: str) -> tuple[Tensor, dict[Any, Tensor]]:
        tensors = group(path)
        return tensors.base.tensor, {entry.id: entry.tensor for entry in tensors.non_base}

    def unchanged(parameter: Tensor) -> tuple[Tensor, dict[Any, Tensor]]:
        zeros = torch.zeros((), device=parameter.device).expand(parameter.shape).as_subclass(TaskVector)
        return parameter.detach(), dict.fromkeys(adapters, zeros)

    plan = []
    for name, parameter in model.base_model.model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        name = name.replace(".base_layer", "")
        # What parameters resolve to depends on names alone.
        empty = [torch.empty(0, device="meta") for _ in range(len(adapters) + 1)]
        names = TensorGroup.from_tensors(empty, ids=[_BASE, *adapters], base_index=0, name=name)
        (bound,) = method._bind_parameters((names,), parameters)
        path = name.removesuffix(".weight")
        touched = path in layers and name.endswith(".weight")
        quantised = getattr(parameter, "quant_state", None)
        plan.append(
            PlannedTensor(
                name=name,
                load=partial(loaded, path) if touched else partial(unchanged, parameter),
                parameters={key: value for key, value in bound.items() if not isinstance(value, Mapping)},
                expert_parameters={key: dict(value) for key, value in bound.items() if isinstance(value, Mapping)},
                entries=math.prod(parameter.shape if quantised is None else quantised.shape),
                untouched=not touched,
                model=facts,
            )
        )
    return plan


def _task_vectors(layer: Any, adapters: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """(base weight, task vector of each adapter) of one layer, in float32."""
    base = base_weight(layer)
    updates = (layer_update(layer, name, base) for name in adapters)
    nothing = torch.zeros((), device=base.device).expand(base.shape)
    return base, [nothing if update is None else update for update in updates]


def _largest_rank(config: Any) -> int:
    return max([config.r, *config.rank_pattern.values()])


def _add(
    model: PeftModel,
    adapters: Sequence[str],
    adapter_name: str,
    layers: Mapping[str, Any],
    factored: Mapping[str, Factors],
) -> None:
    ranks = {path: factors.rank for path, factors in factored.items()}
    ((default, _),) = Counter(ranks.values()).most_common(1)
    others = {path: rank for path, rank in ranks.items() if rank != default}
    config = config_for(model, adapters[0], factored)
    config.r = config.lora_alpha = default
    config.rank_pattern, config.alpha_pattern = others, dict(others)
    config.use_rslora = config.use_dora = False
    config.lora_dropout = 0.0
    model.add_adapter(adapter_name, config)
    for path, factors in factored.items():
        for part, value in zip(factors_of(layers[path], adapter_name), (factors.a, factors.b), strict=True):
            part.data.copy_(value.reshape(part.shape))


def _summary(factored: Mapping[str, Factors]) -> AdapterSummary:
    kinds: dict[str, KindSummary] = {}
    for path, factors in factored.items():
        kind = kinds.setdefault(module_kind(path), KindSummary(module_kind(path)))
        kind.ranks.append(factors.rank)
        kind.energy += factors.energy
        kind.error += factors.error
    size = sum(factors.a.nbytes + factors.b.nbytes for factors in factored.values())
    return AdapterSummary(list(kinds.values()), [], 0, [], bytes=size)
