"""An adapter taken apart: its factors as an adapter of their own, and the head that it stores whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from transformers import PretrainedConfig

from neuron_methods.adapters.config import CONFIG_NAME, AdapterConfig
from neuron_methods.adapters.keys import sort_keys
from neuron_methods.adapters.own_head import OwnHead, find_own_head
from neuron_methods.adapters.weights_file import SAFETENSORS_NAME, AdapterWeights
from neuron_methods.models.skeleton import Skeleton
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_text
from neuron_methods.support.text import listed


def own_head_of(config: AdapterConfig, directory: str, base: PretrainedConfig) -> OwnHead | None:
    """Find the head that an adapter stores whole; None where it stores nothing but factors.

    Args:
        config: its adapter_config.json.
        directory: of the adapter.
        base: the base's config.

    Raises:
        UserError: it stores other tensors whole, or only a part of its head.
    """
    file = AdapterWeights(directory, config.where)
    whole = sort_keys(file.shapes)[1]
    if not whole:
        return None
    head = find_own_head(config, file, base, whole)
    # `modules_to_save` may copy what lies within the body: every expert's input would have to pass through its own.
    if rest := sorted(whole.keys() - (head.keys.keys() if head is not None else ())):
        raise UserError(
            f"{config.where}: it stores {listed(rest)} whole, which is of the model's body; what can be chosen per "
            "input is a head: train without it in modules_to_save"
        )
    assert head is not None
    if missing := sorted(head_paths(head) - head.keys.keys()):
        raise UserError(
            f"{config.where}: of its head it stores {listed(sorted(head.keys))}, and not {listed(missing)}; train with "
            "the whole head in modules_to_save"
        )
    return head


def head_paths(head: OwnHead) -> set[str]:
    """List the paths in memory of all tensors that the head of its class is made of."""
    skeleton = Skeleton.build(head.model, head.config)
    return {path for path in skeleton.tensors if skeleton.in_body(path) is None}


def write_factors(config: AdapterConfig, directory: str, head: OwnHead, out: Path) -> None:
    """Write an adapter without the head that it stores, in peft's format, into `out`, which is made."""
    file = AdapterWeights(directory, config.where)
    dropped = set(head.keys.values())
    out.mkdir(parents=True)
    tensors = {key: file.tensor(key) for key in file.shapes if key not in dropped}
    save_file(tensors, out / SAFETENSORS_NAME, metadata={"format": "pt"})
    # By its task peft would look for a head in the file; what the class is, it is told instead.
    trained = {"base_model_class": head.model.__name__, "parent_library": head.model.__module__}
    content: Mapping[str, object] = {
        **config.raw,
        **{"modules_to_save": None, "task_type": None, "auto_mapping": trained},
    }
    write_text(out / CONFIG_NAME, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
