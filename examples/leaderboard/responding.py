"""Merging by response for the leaderboard, in memory, and the inputs that the experts are measured on.

Rows with data see few samples of every task's training data, with their answers, as `mergekit-neuron profile --inputs`
measures them on each expert. RegMean is given the same files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import Weights, ZooModels

from neuron_methods.methods.contract import Inputs, MergeSettings, ModelFacts, PlannedTensor, TensorPlace
from neuron_methods.methods.neuron_response import NAME, NeuronResponse
from neuron_methods.profiling.module_inputs import input_width, linear_modules
from neuron_methods.support.stages import Stages

__all__ = ["NAME", "defaults", "measure", "merge_by_response", "places_of"]

#: What the experts read of a task, by its kind.
READS = {"image-classification": ("image",), "text-to-text": ("input", "target"), "generation": ("input", "target")}
#: What parts the two in a decoder's text, as the zoo trains it.
SEPARATOR = " "


def measure(zoo: Path, place: Path, stamp: Mapping[str, Any], samples: int, *, adapters: bool = False) -> Path:
    """Measure what the linear layers of a zoo's experts are given on samples of their own tasks, once.

    Args:
        zoo: its directory.
        place: directory for the files, ``TASK.safetensors``; kept as it is if it was made under the same stamp.
        stamp: what tells this zoo from another.
        samples: of each task's training data.
        adapters: measure the base with a task's adapter, not the full expert.

    Returns:
        The directory.
    """

    def build(path: Path) -> list[str]:
        from neuron_methods.evaluation import load_tasks
        from neuron_methods.profiling import InputSettings, measure_inputs

        tasks = load_tasks(zoo / "tasks.yml")
        settings = InputSettings(samples=samples, batch_size=20, separator=SEPARATOR, dtype="float32")
        for task in tasks:
            columns = ",".join(task.columns[role] for role in READS[task.kind])
            data = f"{task.name}={zoo / 'data' / task.name / 'train'}.parquet:{columns}"
            full = str(zoo / "experts" / task.name)
            model = f"{zoo / 'base'}+{zoo / 'adapters' / task.name}" if adapters else full
            measure_inputs(model, [data], path / f"{task.name}.safetensors", settings)
        return [task.name for task in tasks]

    about = {"inputs": READS, "samples": samples, "separator": SEPARATOR, "adapters": adapters}
    Stages(place.parent / ".stages", "the leaderboard").run(place, {**stamp, **about}, build)
    return place


def defaults() -> dict[str, Any]:
    """List what the method's parameters are where a row does not say."""
    return {parameter.name: parameter.default for parameter in NeuronResponse.spec.parameters}


def places_of(models: ZooModels) -> dict[str, TensorPlace]:
    """Tell where each parameter of a zoo's model stands, as a merge of files asks the model's class."""
    linear = linear_modules(models.model)
    found = {}
    for name in models.base:
        path, _, own = name.rpartition(".")
        width = input_width(linear[path]) if own == "weight" and path in linear else None
        found[name] = TensorPlace(path, "tokens" if name in models.tokens else "matrix", width)
    return found


def merge_by_response(base: Weights, experts: Mapping[str, Weights], settings: Mapping[str, Any]) -> Weights:
    """Run `neuron_response` in memory.

    Args:
        base: θ₀, all that an expert changed.
        experts: by task.
        settings: of the method; and what the row is handed: ``models``, the zoo's, whose adapters' updates are taken
            in factors, and for rows with ``samples`` the directory of measured ``measured`` inputs.
    """
    given = dict(settings)
    models: ZooModels = given.pop("models")
    given.pop("samples", None)
    if (measured := given.pop("measured", None)) is not None:
        given["profile"] = {task: str(Path(measured) / f"{task}.safetensors") for task in experts}
    method = NeuronResponse()
    shared = {p.name: p.validate(given.pop(p.name, p.default)) for p in method.spec.shared_parameters}
    own: dict[str, dict[Any, Any]] = {}
    for parameter in method.spec.input_parameters:
        value = given.pop(parameter.name, parameter.default)
        values = value if isinstance(value, Mapping) else dict.fromkeys(experts, value)
        own[parameter.name] = {task: parameter.validate(each) for task, each in values.items()}
    assert not given, given
    updates = {task: {**expert, **models.factors.get(task, {})} for task, expert in experts.items()}
    tensors = {name: {task: updates[task][name] for task in experts} for name in base}
    places = places_of(models)
    prepared = method.prepare(
        [
            PlannedTensor(
                name,
                load=lambda name=name: (base[name], tensors[name]),
                parameters=shared,
                expert_parameters=own,
                model=ModelFacts(models.model.config),
                place=lambda name=name: places[name],
            )
            for name in base
        ]
    )
    prepared.measure(MergeSettings())
    with torch.no_grad():
        return {
            name: prepared.merge_tensor(Inputs(name, base[name], tensors[name]), {**shared, **own}, torch.float32)
            for name in base
        }
