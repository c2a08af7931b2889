"""Merges in memory through the contract of planned methods, and neurons picked out of state dicts one by one."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mergekit.merge_methods.base import ParameterScope, TensorEntry, TensorGroup, TensorMetadata
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from neuron_methods.methods.contract import MergeSettings, ModelFacts, PlannedMethod, PlannedTensor
from neuron_methods.methods.delegation import DelegatingMethod
from neuron_methods.methods.groups_file import groups_from_labels
from neuron_methods.neurons import MlpLayer, neuron_map
from neuron_methods.neurons.profile_file import NeuronProfile, ProfileInfo, SourceInfo
from neuron_methods.plugin.tensor_places import TensorPlaces
from tests.support.checkpoints import StateDict, build, fine_tune

Experts = Mapping[str, StateDict]
Parameters = Mapping[str, Any]


def models(kind: str, experts: int = 2) -> tuple[PretrainedConfig, StateDict, dict[str, StateDict]]:
    """Config, base and experts of a family, spelled as its checkpoints are."""
    with tempfile.TemporaryDirectory() as folder:

        def stored(model: PreTrainedModel) -> StateDict:
            model.save_pretrained(folder)
            return load_file(Path(folder) / "model.safetensors")

        base = build(kind)
        tuned = {f"expert-{'abc'[i]}": stored(fine_tune(build(kind), i, 0.02 * (i + 1))) for i in range(experts)}
        return base.config, stored(base), tuned


def plan(
    method: PlannedMethod,
    config: PretrainedConfig,
    base: StateDict,
    experts: Experts,
    shared: Parameters | None = None,
    own: Mapping[str, Parameters] | None = None,
) -> tuple[PlannedMethod, list[PlannedTensor]]:
    """The method as configured, and its plan; `own` are the experts' parameters."""
    shared, own = shared or {}, own or {}
    configured: PlannedMethod = method
    if isinstance(method, DelegatingMethod):
        configured = method.configured({slot: [shared[slot]] for slot in method.slots if slot in shared})
    known = {p.name for p in configured.spec.parameters}
    assert {*shared, *(key for values in own.values() for key in values)} <= known
    parameters: dict[str, Any] = {}
    expert_parameters: dict[str, dict[Hashable, Any]] = {}
    for p in configured.spec.parameters:
        if p.scope == ParameterScope.SHARED:
            parameters[p.name] = p.validate(shared.get(p.name, p.default))
        else:
            values = {e: own.get(e, {}).get(p.name, shared.get(p.name, p.default)) for e in experts}
            expert_parameters[p.name] = {e: p.validate(value) for e, value in values.items()}
    model, places = ModelFacts(config), TensorPlaces(config, list(base))
    tensors = [
        PlannedTensor(
            name,
            lambda name=name: (base[name], {e: tensors[name] for e, tensors in experts.items()}),
            parameters,
            expert_parameters,
            model=model,
            place=lambda name=name: places.of(name),
        )
        for name in base
    ]
    return configured, tensors


def merge(
    method: PlannedMethod,
    config: PretrainedConfig,
    base: StateDict,
    experts: Experts,
    shared: Parameters | None = None,
    own: Mapping[str, Parameters] | None = None,
) -> StateDict:
    """Prepare, measure and merge every tensor."""
    return merge_and_tell(method, config, base, experts, shared, own)[0]


def merge_and_tell(
    method: PlannedMethod,
    config: PretrainedConfig,
    base: StateDict,
    experts: Experts,
    shared: Parameters | None = None,
    own: Mapping[str, Parameters] | None = None,
) -> tuple[StateDict, list[str]]:
    """Do what `merge` does, and tell the findings."""
    method, tensors = plan(method, config, base, experts, shared, own)
    prepared = method.prepare(tensors)
    prepared.measure(MergeSettings())
    merged = {}
    for tensor in tensors:
        entries = [TensorEntry("base", base[tensor.name], is_base=True)]
        entries += [TensorEntry(e, weights[tensor.name]) for e, weights in experts.items()]
        group = TensorGroup(tuple(entries), TensorMetadata(tensor.name))
        parameters = {**tensor.parameters, **tensor.expert_parameters}
        merged[tensor.name] = prepared.merge(group, parameters, base[tensor.name].dtype)
    return merged, prepared.findings()


def neuron(tensors: StateDict, layer: MlpLayer, index: int) -> Tensor:
    """All weights one neuron owns, in one vector, float64."""
    parts = [tensors[p.tensor].double().select(p.axis, p.offset + index).reshape(-1) for p in layer.parts]
    return torch.cat(parts)


def permuted(tensors: StateDict, config: PretrainedConfig, seed: int) -> StateDict:
    """The same model with the neurons of each layer in another order."""
    result = dict(tensors)
    for layer in neuron_map(config).layers:
        order = torch.randperm(layer.neurons, generator=torch.Generator().manual_seed(seed + layer.index))
        for part in layer.parts:
            result[part.tensor] = result[part.tensor].index_select(part.axis, order)
    return result


def write_groups(path: Path, config: PretrainedConfig, names: list[str], offset: int = 0) -> str:
    """A groups file in which neurons take turns; returns its path."""
    labels = {
        layer: [names[(i + offset + j) % len(names)] for i in range(n)]
        for j, (layer, n) in enumerate(neuron_map(config).neurons.items())
    }
    groups_from_labels("base", config.model_type, labels, {"test": True}).write(path)
    return str(path)


def write_profile(
    path: Path, config: PretrainedConfig, sources: Mapping[str, int], seed: int = 0, taylor: bool = True
) -> NeuronProfile:
    """A profile with random statistics; `sources` are names and the tokens each read."""
    neurons = neuron_map(config).neurons
    generator = torch.Generator().manual_seed(seed)
    info = ProfileInfo(
        model="expert",
        model_fingerprint="",
        model_type=config.model_type,
        layers=dict(neurons),
        gated=[],
        settings={"gradients": taylor},
        sources={name: SourceInfo(name, "", 1, dict.fromkeys(neurons, tokens)) for name, tokens in sources.items()},
    )
    tensors = {}
    for source in sources:
        for layer, count in neurons.items():
            for name in info.statistics:
                tensors[f"{source}/{layer}/{name}"] = torch.rand(count, generator=generator)
            top = torch.rand(count, 3, generator=generator).sort(descending=True).values
            tensors[f"{source}/{layer}/top_activation"] = top
            tensors[f"{source}/{layer}/top_exemplar"] = torch.full((count, 3), -1, dtype=torch.int32)
    profile = NeuronProfile(info, tensors, path)
    profile.save(Path(path), 0, [])
    return profile


def copied(tensors: StateDict) -> StateDict:
    """A deep copy."""
    return deepcopy(tensors)
