"""Adapters in the memory of a model: loaded by peft and checked, their updates, and saved again."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neuron_methods.adapters.completeness import refuse_incomplete, refuse_other_ranks
from neuron_methods.adapters.config import CONFIG_NAME, AdapterConfig, refuse_unknown
from neuron_methods.adapters.keys import sort_keys
from neuron_methods.adapters.patterns import check_patterns
from neuron_methods.adapters.placement import target_names
from neuron_methods.adapters.updates import Layout, dora_factors, low_rank_delta
from neuron_methods.adapters.weights_file import SAFETENSORS_NAME, AdapterWeights, adapter_directory
from neuron_methods.models.loading import input_device, placed_weights
from neuron_methods.models.processes import process_state
from neuron_methods.models.reference import ModelName
from neuron_methods.support.documents import read_object
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_text
from neuron_methods.support.finite import check_finite
from neuron_methods.support.quiet import quiet_transformers
from neuron_methods.support.text import first_line

if TYPE_CHECKING:
    from peft import PeftModel


@contextmanager
def opened_model(
    name: ModelName,
    dtype: str,
    max_memory: dict[Any, int | str] | None = None,
    *,
    merged: bool = False,
    device: str | None = None,
) -> Iterator[tuple[Any, torch.device]]:
    """Load a model with its adapter, if it has one, for as long as the block lasts.

    The adapter stays unmerged unless asked for, so that nothing is rounded.

    Args:
        name: of the model.
        dtype: as for `models.loading.load_weights`.
        max_memory: accelerate's bounds per device, by default what is free.
        merged: merge the adapter, so that the model's modules are those of its base.
        device: as for `models.loading.placed_weights`.

    Yields:
        The model as transformers makes it, all weights frozen, and the device where its inputs go.

    Raises:
        UserError: the model or the adapter cannot be loaded, or they do not fit each other.
    """
    where = f"model {name.shown}"
    with placed_weights(name.base, where, dtype, max_memory, device) as model:
        if name.adapter is not None:
            if "disk" in getattr(model, "hf_device_map", {}).values():  # peft 0.21 fails there
                raise UserError(
                    f"{where}: the base does not fit into memory, and an adapter cannot be put on weights that are on "
                    "disk; merge the two into a directory first"
                )
            directory = adapter_directory(name.adapter.path, name.adapter.revision)
            labels = {"default": f"{where}: the adapter"}
            adapted = load_adapters(model, {"default": directory}, labels, allow_pickle=True)
            if merged:
                model = merge_in_memory(adapted)
        yield model.eval().requires_grad_(False), process_state().device if device is None else input_device(model)


def merge_in_memory(adapted: Any) -> Any:
    """Merge a model's adapter into what its modules compute with, and give the model.

    peft 0.21 merges into the weight of a module, and where others share that weight, into theirs, too; unmerged they
    do not have it. So modules that share a weight get one each, if peft changes any of them.

    Args:
        adapted: a `PeftModel`.
    """
    model = adapted.base_model.model
    ties = dict(getattr(model, "all_tied_weights_keys", {}))
    holders = {path: model.get_submodule(path.rpartition(".")[0]) for pair in ties.items() for path in pair}
    if any(_base_of(module) is not module for module in holders.values()):
        for path in ties:
            module, name = _base_of(holders[path]), path.rpartition(".")[2]
            setattr(module, name, torch.nn.Parameter(getattr(module, name).detach().clone(), requires_grad=False))
        model.all_tied_weights_keys = {}
        model.config.tie_word_embeddings = False
    return adapted.merge_and_unload()


def _base_of(module: Any) -> Any:
    """The module that peft has wrapped, or the module itself."""
    inner = getattr(module, "base_layer", getattr(module, "original_module", None))
    return module if inner is None else _base_of(inner)


def load_adapters(
    base: Any, directories: Mapping[str, str], labels: Mapping[str, str], *, allow_pickle: bool = False
) -> PeftModel:
    """Put adapters into a model, each under its name, and make sure that every tensor of their files found its place.

    Args:
        base: a model of transformers; the layers that adapters change become peft's, in place.
        directories: name -> local directory of the adapter.
        labels: name -> how messages call it.
        allow_pickle: accept adapter_model.bin.

    Raises:
        UserError: an adapter cannot be read, does not fit the base, or changes no weights.
    """
    from peft import PeftModel
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    model: Any = None
    for name, directory in directories.items():
        _check_before_peft(base, directory, labels[name], allow_pickle)
        try:
            with quiet_transformers(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if model is None:
                    model = PeftModel.from_pretrained(base, directory, adapter_name=name)
                else:
                    model.load_adapter(directory, adapter_name=name)
                # Once more, as peft 0.21 does not tell what was lost of a model's first adapter.
                weights = load_peft_weights(directory, device="cpu")
                result = set_peft_model_state_dict(model, weights, adapter_name=name)
        except Exception as error:  # whatever peft makes of a foreign config
            misfit = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
            reason = f"does not fit the base model: {misfit}" if misfit else f"cannot be loaded: {first_line(error)}"
            raise UserError(f"{labels[name]} {reason}") from None
        check_finite(weights.items(), labels[name])
        if model.peft_config[name].is_prompt_learning:
            raise UserError(f"{labels[name]} learned prompts, it does not change the neurons")
        own = re.compile(rf"\.lora_\w+\.{re.escape(name)}(\.|$)")
        lost = [*result.unexpected_keys, *filter(own.search, result.missing_keys)]
        if lost:
            raise UserError(
                f"{labels[name]} does not fit the base model: {len(lost)} of its tensors found no place or are "
                f"missing, such as {lost[0]}; was it trained on another one?"
            )
    return model.eval().requires_grad_(False)


def _check_before_peft(base: Any, directory: str, where: str, allow_pickle: bool) -> None:
    """Refuse what peft would load in part, take memory without end for, or call by names that nobody knows."""
    config = AdapterConfig.read(directory, where)
    refuse_unknown(config)
    file = AdapterWeights(directory, where, allow_pickle)
    check_patterns(config, [path for path, _ in base.named_modules()])
    refuse_other_ranks(config, file.shapes)
    if config.peft_type == "LORA":
        modules, replaced = sort_keys(file.shapes)
        refuse_incomplete(config, base.config, [module.path for module in modules], replaced)


def base_weight(layer: Any) -> Tensor:
    """Read the weight that peft's layer stands on, float32, dequantised."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer.get_base_layer()).detach().float()


def layer_update(layer: Any, name: str, base: Tensor | None = None) -> Tensor | None:
    """Form what an adapter adds to the weight of peft's LoRA layer.

    Args:
        layer: of any kind that LoRA has.
        name: of the adapter.
        base: the layer's `base_weight`, if it is at hand.

    Returns:
        float32, arranged like the weight; None where the adapter leaves the layer alone.
    """
    if name not in layer.scaling:
        return None
    base = base_weight(layer) if base is None else base
    layout = layout_of(layer, name)
    a, b = (part.detach().to(base) for part in factors_of(layer, name))
    update = low_rank_delta(a, b, layer.scaling[name], layout, base.shape)
    if name in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[name].weight.detach().to(base)
        axis = 1 if layout in ("transposed", "embedding") else 0
        factors = dora_factors(base + update, magnitude, axis)
        update = update.mul_(factors).addcmul_(base, factors - 1)
    return update


def factors_of(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """Get an adapter's parameters A and B in one layer."""
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def layout_of(layer: Any, name: str) -> Layout:
    """Say how a layer arranges its weight, see `updates.low_rank_delta`."""
    if name in layer.lora_embedding_A:
        return "embedding"
    if isinstance(layer.get_base_layer(), (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "convolution"
    return "transposed" if getattr(layer, "fan_in_fan_out", False) else "linear"


def config_for(model: Any, name: str, paths: Collection[str]) -> Any:
    """Copy an adapter's config for an adapter of the same model in other modules.

    Args:
        model: a `PeftModel` that carries it.
        name: of the adapter.
        paths: of the modules that the new one is in.
    """
    modules = [path for path, _ in model.get_base_model().named_modules() if ".base_layer" not in path]
    config = copy.deepcopy(model.peft_config[name])
    config.target_modules = target_names(paths, modules)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.init_lora_weights = True  # what it was initialised by is no concern of who loads it
    return config


def save_adapter(
    model: Any, name: str, directory: Path, paths: Collection[str], dtype: torch.dtype | None = None
) -> None:
    """Write an adapter in peft's format, with the updates of some modules only.

    Args:
        model: a `PeftModel` that carries it.
        name: of the adapter.
        directory: is made.
        paths: modules whose updates are kept.
        dtype: to store in; None: as it is in memory.
    """
    import json

    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    kept = set(paths)
    tensors = {}
    for key, tensor in get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).items():
        if key.removeprefix("base_model.model.").partition(".lora_")[0] in kept:
            tensors[key] = tensor.detach().to("cpu", dtype or tensor.dtype).clone().contiguous()
    config = config_for(model, name, kept)
    config.inference_mode = True
    directory.mkdir(parents=True)
    config.save_pretrained(str(directory))
    save_file(tensors, directory / SAFETENSORS_NAME, metadata={"format": "pt"})
    # peft writes sets in an order of their own.
    content = read_object(directory / CONFIG_NAME)
    write_text(directory / CONFIG_NAME, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def stored_dtype(directory: str) -> torch.dtype | None:
    """Find the dtype an adapter's tensors are stored in, None if they differ."""
    file = AdapterWeights(directory)
    dtypes = {file.tensor(key).dtype for key in file.shapes}
    return dtypes.pop() if len(dtypes) == 1 else None
