"""Adapters into one `PeftModel`: what can be mixed per sample is loaded, everything else is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuron_methods.adapters.config import AdapterConfig
from neuron_methods.adapters.placement import target_names
from neuron_methods.adapters.weights_file import AdapterWeights, adapter_directory
from neuron_methods.support.errors import UserError
from neuron_methods.support.quiet import quiet_transformers

_SAMPLE = 1 << 16  # bytes compared at a few places of each file

# What changes the model otherwise than by s·B·A on a linear layer, and what to do instead.
_REFUSED = {
    "use_dora": "DoRA rescales the base weights",
    "lora_bias": "biases in LoRA's B",
    "modules_to_save": "modules stored whole, such as a head of its own: train all experts on one shared head",
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
    if config.raw.get("bias", "none") != "none":
        raise UserError(f"{where}: it trains biases (bias: {config.raw['bias']}), which cannot be mixed per input")
    reason = config.needs_peft()
    if reason is not None:
        raise UserError(f"{where}: {reason}, so it cannot be mixed per input; convert it to plain LoRA with peft first")
    return config


def check_bases(configs: Mapping[str, AdapterConfig], base: str, where: str) -> None:
    """Make sure that all adapters name the same base model as the YAML.

    Where both names are directories that exist, their weights are compared (by size and samples of the files),
    otherwise the last parts of the names: a base may have been moved or downloaded since.

    Args:
        configs: expert -> its adapter's config.
        base: the base model's directory or hub id.
        where: file name for messages.

    Raises:
        UserError: naming the expert and both bases.
    """
    named: tuple[str, str] | None = None
    for expert, config in configs.items():
        if config.base_model is None:
            continue
        if named is not None and not _same_model(config.base_model, named[1]):
            raise UserError(
                f"{where}: adapters of different bases: {named[0]} was trained on {named[1]}, {expert} on "
                f"{config.base_model}; route adapters of one base"
            )
        named = named or (expert, config.base_model)
    if named is not None and not _same_model(named[1], base):
        raise UserError(
            f"{where}: the adapter of {named[0]} was trained on {named[1]}, base_model is {base}; name that base, or "
            "set check_base: false if they are the same model"
        )


def _same_model(one: str, other: str) -> bool:
    if one == other:
        return True
    if os.path.isdir(one) and os.path.isdir(other):
        return os.path.samefile(one, other) or _weights(one) == _weights(other)
    return Path(one).name.lower() == Path(other).name.lower()


def _weights(directory: str) -> list[Any]:
    """Name, size and some bytes of every file of weights."""
    found: list[Any] = []
    for path in sorted(Path(directory).glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            found += [path.name, size]
            for place in (0, size // 3, size // 2, max(0, size - _SAMPLE)):
                file.seek(place)
                found.append(file.read(_SAMPLE))
    return found


def load_experts(base: Any, directories: Mapping[str, str], where: str) -> Any:
    """One `PeftModel` that carries all adapters, each under its expert's name, on top of `base`.

    Args:
        base: a model of transformers; its linear layers become peft's LoRA layers, in place.
        directories: expert -> local directory of its adapter.
        where: file or directory name for messages.

    Raises:
        UserError: an adapter does not fit the base, or is in a layer that cannot be mixed per sample.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model = None
    for name, directory in directories.items():
        label = f"{where}: adapter of {name}"
        AdapterWeights(directory, label)  # says more clearly than peft what is wrong with a file
        try:
            with quiet_transformers():
                if model is None:
                    model = PeftModel.from_pretrained(base, directory, adapter_name=name)
                result = model.load_adapter(directory, adapter_name=name)  # also the first: it tells what was missing
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error))
            raise UserError(f"{label} does not fit the base model: {reason}") from None
        lost = [*result.unexpected_keys, *(key for key in result.missing_keys if ".lora_" in key)]
        if lost:
            raise UserError(
                f"{label} does not fit the base model: {len(lost)} of its tensors found no place or are missing, such "
                f"as {lost[0]}; was it trained on another one?"
            )
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and not _is_linear(module):
            raise UserError(
                f"{where}: the adapters change {path} ({type(module.get_base_layer()).__name__}); only linear layers "
                "can be mixed per input"
            )
    return model.eval().requires_grad_(False)


def _is_linear(module: Any) -> bool:
    factors = [*module.lora_A.values(), *module.lora_B.values()]
    return bool(factors) and all(isinstance(factor, nn.Linear) for factor in factors)


def adapter_directories(adapters: Mapping[str, str]) -> dict[str, str]:
    """Expert -> local directory of its adapter; those of the hub are downloaded."""
    return {name: adapter_directory(path) for name, path in adapters.items()}


def save_expert(peft_model: Any, name: str, directory: Path, paths: Sequence[str], dtype: torch.dtype | None) -> None:
    """Write one adapter in peft's format, with the updates of some modules only.

    Args:
        peft_model: carries it.
        name: of the adapter.
        directory: is made.
        paths: modules whose updates are kept.
        dtype: to store in; None: as it is in memory.
    """
    import copy

    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    kept = set(paths)
    tensors = {}
    for key, tensor in get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False).items():
        path = key.removeprefix("base_model.model.").partition(".lora_")[0]
        if path in kept:
            tensors[key] = tensor.detach().to("cpu", dtype or tensor.dtype).clone().contiguous()
    modules = [path for path, _ in peft_model.get_base_model().named_modules() if ".base_layer" not in path]
    config = copy.deepcopy(peft_model.peft_config[name])
    config.target_modules = target_names(kept, modules)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.init_lora_weights = True  # what it was initialised by is no concern of who loads it
    config.inference_mode = True
    directory.mkdir(parents=True)
    config.save_pretrained(str(directory))
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    written = directory / "adapter_config.json"
    content = json.loads(written.read_text(encoding="utf-8"))
    written.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def stored_dtype(directory: str) -> torch.dtype | None:
    """The dtype an adapter's tensors are stored in, None if they differ."""
    file = AdapterWeights(directory)
    dtypes = {file.tensor(key).dtype for key in file.shapes}
    return dtypes.pop() if len(dtypes) == 1 else None
