"""`mergekit-neuron route --static`: the adapters of a routed model in one checkpoint, merged by response.

What each expert's layers are given is measured on the data that the router would learn from. Nothing is enhanced: it is
the adapters as they are that `neuron_response` merges.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from neuron_methods.adapters.config import AdapterConfig
from neuron_methods.data.sources import DataSource
from neuron_methods.models.loading import read_architecture, read_config
from neuron_methods.models.reference import Place
from neuron_methods.plugin.describe import describe_plan
from neuron_methods.plugin.merging import MergeWitness, merge_to_directory, plan_merge
from neuron_methods.profiling import InputSettings, measure_inputs
from neuron_methods.routing.base import routable_class
from neuron_methods.routing.data import PromptFeeder, source_of
from neuron_methods.routing.experts import adapter_directories
from neuron_methods.routing.route_yaml import RouteConfig
from neuron_methods.routing.route_yaml import read_config as read_route
from neuron_methods.support.errors import UserError
from neuron_methods.support.targets import check_target

#: Samples of an expert's data that its inputs are measured on.
SAMPLES = 40


def merge_routed(
    configuration: Path,
    out: Path,
    *,
    dry_run: bool = False,
    force: bool = False,
    witness: MergeWitness | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> None:
    """Merge the adapters of a routed model into one checkpoint.

    Args:
        configuration: the YAML of the routed model; see `route_yaml`.
        out: directory to write. The experts' inputs are kept beside it, in ``OUT.inputs``: its YAML names them.
        dry_run: tell the plan, and write nothing.
        force: measure again what is there, and replace an earlier output.
        witness: writes the card.
        report: called with texts for the user.

    Raises:
        UserError: anything is wrong with the configuration, the models, the data or `out`.
    """
    config = read_route(configuration)
    for name, directory in adapter_directories({e.name: e.adapter for e in config.experts}).items():
        if AdapterConfig.read(directory).raw.get("modules_to_save"):
            raise UserError(
                f"{configuration}: adapter of {name}: it brings a head of its own, and one checkpoint has one head; "
                "merge the bodies alone: mergekit-neuron merge --head keep"
            )
    # Everything that needs no inputs is checked before the first is measured.
    plan = plan_merge(_merge_yaml(config, None), config_name=str(configuration))
    sources = _sources(config, f"{configuration}: base_model")
    folder = Path(f"{out.absolute()}.inputs")
    measured = f"inputs of each expert, on {SAMPLES} samples of its data: {folder}"
    if dry_run:
        report(f"{describe_plan(plan)}\n{measured}")
        return
    named = (configuration, config.base_model, *(e.adapter for e in config.experts))
    check_target(out, force, [path for path in map(str, named) if os.path.exists(path)])
    report(measured)
    settings = InputSettings(
        samples=SAMPLES, max_length=config.text.max_length, separator=config.text.separator, dtype=config.dtype
    )
    for expert in config.experts:
        model, place = f"{config.base_model}+{expert.adapter}", _inputs(folder, expert.name)
        measure_inputs(model, [sources[expert.name]], place, settings, force=force, report=report)
    text = _merge_yaml(config, folder)
    summary = merge_to_directory(text, out, force=force, config_name=str(configuration), witness=witness, resume=False)
    report(str(summary))


def _sources(config: RouteConfig, where: str) -> dict[str, DataSource]:
    """Find every expert's data, with the columns that the router reads."""
    base = read_config(Place.parse(config.base_model), where)
    kind = routable_class(read_architecture(base, where), base, where).kind
    found = {expert.name: source_of(expert.name, expert.data, kind) for expert in config.experts}
    if kind != "causal":
        return found
    return {name: replace(source, columns=source.columns or PromptFeeder.columns) for name, source in found.items()}


def _merge_yaml(config: RouteConfig, inputs: Path | None) -> str:
    """Write the YAML of the merge, without data where there is no directory of inputs yet."""
    models: list[dict[str, Any]] = [{"model": f"{config.base_model}+{expert.adapter}"} for expert in config.experts]
    recipe: dict[str, Any] = {
        "merge_method": "neuron_response",
        "base_model": config.base_model,
        "models": models,
    }
    if inputs is not None:
        for model, expert in zip(models, config.experts, strict=True):
            model["parameters"] = {"profile": str(_inputs(inputs, expert.name))}
        recipe["parameters"] = {"inputs": "both"}
    if config.dtype != "auto":
        recipe["dtype"] = config.dtype
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=1000)


def _inputs(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"
