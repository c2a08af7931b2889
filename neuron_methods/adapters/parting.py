"""An adapter taken apart: its factors as an adapter of their own, the head that it stores whole, its trained biases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from neuron_methods.adapters.config import CONFIG_NAME, AdapterConfig
from neuron_methods.adapters.keys import sort_keys
from neuron_methods.adapters.own_head import OwnHead, find_own_head
from neuron_methods.adapters.weights_file import SAFETENSORS_NAME, AdapterWeights
from neuron_methods.models.skeleton import Skeleton
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_text
from neuron_methods.support.finite import check_finite
from neuron_methods.support.text import listed


@dataclass(frozen=True)
class Parts:
    """What an adapter stores beside its factors.

    Attributes:
        head: of its own, if it has one.
        biases: {path of a module: key of the bias that it trained}.
    """

    head: OwnHead | None
    biases: Mapping[str, str]

    @property
    def keys(self) -> set[str]:
        """All keys of these in the adapter's file."""
        return {*self.biases.values(), *(self.head.keys.values() if self.head is not None else ())}


def parts_of(config: AdapterConfig, directory: str, base: PretrainedConfig) -> Parts:
    """Find what an adapter stores beside its factors.

    Args:
        config: its adapter_config.json.
        directory: of the adapter.
        base: the base's config.

    Raises:
        UserError: it stores other tensors whole, or only a part of its head.
    """
    file = AdapterWeights(directory, config.where)
    whole = sort_keys(file.shapes)[1]
    head = find_own_head(config, file, base, whole) if whole else None
    biases = {path: key for path, key in whole.items() if path.endswith(".bias")}
    if config.raw.get("bias", "none") == "none":
        biases = {}
    elif head is not None and head.keys.keys() <= biases.keys():  # of the base's head only the bias was trained
        head = None
    of_head = head.keys if head is not None else {}
    biases = {path: key for path, key in biases.items() if path not in of_head}
    # `modules_to_save` may copy what lies within the body: every expert's input would have to pass through its own.
    if rest := sorted(whole.keys() - of_head.keys() - biases.keys()):
        raise UserError(
            f"{config.where}: it stores {listed(rest)} whole, which is of the model's body; what can be chosen per "
            "input is a head: train without it in modules_to_save"
        )
    if head is not None and (missing := sorted(head_paths(head) - head.keys.keys())):
        raise UserError(
            f"{config.where}: of its head it stores {listed(sorted(head.keys))}, and not {listed(missing)}; train with "
            "the whole head in modules_to_save"
        )
    return Parts(head, {path.removesuffix(".bias"): key for path, key in biases.items()})


def head_paths(head: OwnHead) -> set[str]:
    """List the paths in memory of all tensors that the head of its class is made of."""
    skeleton = Skeleton.build(head.model, head.config)
    return {path for path in skeleton.tensors if skeleton.in_body(path) is None}


def write_factors(config: AdapterConfig, directory: str, parts: Parts, out: Path) -> None:
    """Write an adapter without what it stores beside its factors, in peft's format, into `out`, which is made."""
    file = AdapterWeights(directory, config.where)
    out.mkdir(parents=True)
    tensors = {key: file.tensor(key) for key in file.shapes if key not in parts.keys}
    save_file(tensors, out / SAFETENSORS_NAME, metadata={"format": "pt"})
    content = {**config.raw, "modules_to_save": None, "bias": "none"}
    if parts.head is not None:
        # By its task peft would look for a head in the file; what the class is, it is told instead.
        model = parts.head.model
        trained = {"base_model_class": model.__name__, "parent_library": model.__module__}
        content |= {"task_type": None, "auto_mapping": trained}
    write_text(out / CONFIG_NAME, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def trained_biases(config: AdapterConfig, directory: str, parts: Parts, base: Any) -> dict[str, Tensor]:
    """Read by how much an adapter changed each bias, float32 (out,), by the path of the module in `base`.

    Raises:
        UserError: the base has no such module, none with such a bias, or one whose bias is not added to its output.
    """
    file = AdapterWeights(directory, config.where)
    modules = dict(base.named_modules())
    changes = {}
    for path, key in parts.biases.items():
        module = modules.get(path)
        own = getattr(module, "bias", None)
        if not isinstance(own, Tensor) or tuple(own.shape) != file.shapes[key]:
            there = "none" if own is None else f"one of shape {list(own.shape)}"
            raise UserError(
                f"{config.where}: it trained a bias of {path} of shape {list(file.shapes[key])}, and the base has "
                f"{there}; route it with the base it was trained on"
            )
        if not isinstance(module, (nn.Linear, nn.LayerNorm, nn.Conv2d)):
            raise UserError(
                f"{config.where}: it trained the bias of {path}, a {type(module).__name__}, which is not known to be "
                "added to what that gives out, so it cannot be mixed per input"
            )
        changes[path] = file.tensor(key).float() - own.detach().float().cpu()
    check_finite(changes.items(), config.where)
    return changes
