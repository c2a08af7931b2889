"""Adapters into one `PeftModel`: what can be mixed per sample is loaded, everything else is refused by name."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from neuron_methods.adapters.config import AdapterConfig
from neuron_methods.adapters.live import load_adapters
from neuron_methods.adapters.parting import Parts, parts_of, write_factors
from neuron_methods.adapters.weights_file import adapter_directory
from neuron_methods.models.kinds import facts_of
from neuron_methods.models.reference import Place, same_model
from neuron_methods.routing.routed_files import CLASSIFIERS
from neuron_methods.support.errors import UserError

# What changes the model otherwise than by s·B·A on a linear layer, and what to do instead.
_REFUSED = {
    "use_dora": "DoRA's norm is that of the merged weights, so that only one expert at weight 1 would be exact",
    "lora_bias": "biases in LoRA's B",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained token embeddings",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing of its own",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}


def check_adapter(directory: str, where: str) -> AdapterConfig:
    """Read an adapter's config and refuse what cannot be mixed per sample.

    Raises:
        UserError: it is no LoRA adapter, or of a kind that changes more than linear layers by B·A.
    """
    config = AdapterConfig.read(directory, where)
    if config.peft_type != "LORA":
        raise UserError(f"{where}: an adapter of type {config.peft_type}; only LoRA can be mixed per input")
    for option, what in _REFUSED.items():
        if config.raw.get(option):
            raise UserError(f"{where}: it has {option} ({what}), which cannot be mixed per input")
    reason = config.needs_peft()
    if reason is not None:
        raise UserError(f"{where}: {reason}, so it cannot be mixed per input; convert it to plain LoRA with peft first")
    return config


def parts_of_experts(
    configs: Mapping[str, AdapterConfig], directories: Mapping[str, str], base: PretrainedConfig
) -> dict[str, Parts]:
    """Find the heads and the biases that adapters store beside their factors.

    Raises:
        UserError: an adapter stores anything else whole, a head is no classifier's, or two are of different classes.
    """
    parts = {name: parts_of(config, directories[name], base) for name, config in configs.items()}
    heads = {name: found.head for name, found in parts.items() if found.head is not None}
    first = next(iter(heads), "")
    for name, head in heads.items():
        facts = facts_of(head.model.__name__)
        if facts is None or facts.kind not in CLASSIFIERS:
            raise UserError(
                f"{configs[name].where}: it stores the head of a {head.model.__name__} whole (modules_to_save); only "
                "classifiers' heads can be chosen per input"
            )
        if head.model is not heads[first].model:
            raise UserError(
                f"{configs[name].where}: its head is that of a {head.model.__name__}, the one of {first} that of a "
                f"{heads[first].model.__name__}; route experts of one class"
            )
    return parts


@contextmanager
def factors_alone(
    configs: Mapping[str, AdapterConfig], directories: Mapping[str, str], parts: Mapping[str, Parts]
) -> Iterator[dict[str, str]]:
    """Give directories of the adapters' factors alone, which are there within the block.

    peft would want a head to fit, and change the base's own biases.
    """
    with tempfile.TemporaryDirectory(prefix="mergekit-neuron-route-") as folder:
        places = {name: str(Path(folder, name)) if found.keys else directories[name] for name, found in parts.items()}
        for name, found in parts.items():
            if found.keys:
                write_factors(configs[name], directories[name], found, Path(places[name]))
        yield places


def check_bases(
    configs: Mapping[str, AdapterConfig], directories: Mapping[str, str], base: str, where: str
) -> list[str]:
    """Make sure that all adapters were trained on the base model of the YAML; see `models.reference.same_model`.

    Returns:
        Lines for the user about bases whose last names alone agree with the base model's.

    Raises:
        UserError: naming the expert and both bases.
    """
    named: tuple[str, str] | None = None
    notes = []
    for expert, config in configs.items():
        if config.base_model is None:
            continue
        if named is not None and same_model(config.base_model, named[1], directories[expert]) is False:
            raise UserError(
                f"{where}: adapters of different bases: {named[0]} was trained on {named[1]}, {expert} on "
                f"{config.base_model}; route adapters of one base"
            )
        named = named or (expert, config.base_model)
        verdict = same_model(config.base_model, base, directories[expert])
        if verdict is False:
            raise UserError(
                f"{where}: the adapter of {expert} was trained on {config.base_model}, base_model is {base}; name that "
                "base, or set check_base: false if they are the same model"
            )
        if verdict is None:
            note = f"trained on {config.base_model}; taking {base} for it, as the last parts of the names agree"
            notes.append(f"note: {expert} was {note}")
    return notes


def load_experts(base: Any, directories: Mapping[str, str], where: str) -> Any:
    """Put all adapters into one `PeftModel`, each under its expert's name; layers of `base` become peft's, in place.

    Raises:
        UserError: an adapter does not fit the base, or is in a layer that cannot be mixed per sample.
    """
    from peft.tuners.lora import LoraLayer

    model = load_adapters(base, directories, {name: f"{where}: adapter of {name}" for name in directories})
    for path, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        factors = [*module.lora_A.values(), *module.lora_B.values()]
        if not factors or not all(isinstance(factor, nn.Linear) for factor in factors):
            raise UserError(
                f"{where}: the adapters change {path} ({type(module.get_base_layer()).__name__}); only linear layers "
                "can be mixed per input"
            )
    return model


def adapter_directories(adapters: Mapping[str, str]) -> dict[str, str]:
    """Find the local directory of each expert's adapter; those of the hub are downloaded."""
    places = {name: Place.parse(text) for name, text in adapters.items()}
    return {name: adapter_directory(place.path, place.revision) for name, place in places.items()}
