"""The head that an adapter brings along: stored whole (`modules_to_save`), its base having none or one of another size.

A base such as a `ViTModel` is trained with a classifier on top, and only the adapter's file holds that. Its class
stands in adapter_config.json; how many labels there are, only the shapes tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor
from transformers import PretrainedConfig

from neuron_methods.adapters.config import AdapterConfig
from neuron_methods.adapters.weights_file import AdapterWeights
from neuron_methods.models.headers import Header
from neuron_methods.models.skeleton import Skeleton, model_class
from neuron_methods.support.errors import UserError

# peft's names of tasks whose models carry a head of their own -> transformers' table of their classes.
_TASKS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
}


@dataclass(frozen=True)
class OwnHead:
    """Tensors of a head that the base's checkpoint has no place for.

    Attributes:
        keys: {path in memory: key in the adapter's file}.
        file: that holds them.
        model: the class that was trained.
        config: the base's, with as many labels as the head has.
    """

    keys: Mapping[str, str]
    file: AdapterWeights
    model: type
    config: PretrainedConfig

    def tensor(self, path: str) -> Tensor:
        """Read a tensor, on the CPU, in its stored dtype."""
        return self.file.tensor(self.keys[path])

    def header(self, path: str) -> Header:
        """Tell shape and dtype of a tensor."""
        return Header.of(self.tensor(path))


def find_own_head(
    config: AdapterConfig, file: AdapterWeights, base: PretrainedConfig, misfits: Mapping[str, str]
) -> OwnHead | None:
    """Find the head in an adapter's file.

    Args:
        config: its adapter_config.json.
        file: its weights.
        base: the base's config.
        misfits: {path: key} of the whole tensors that the base does not store, or in another shape.

    Returns:
        None where none of them is a head's, or the class that was trained is not to be had.
    """
    model = trained_class(config, base)
    try:
        skeleton = None if model is None else Skeleton.build(model, base)
    except UserError:
        return None
    if model is None or skeleton is None:
        return None
    keys = {p: key for p, key in misfits.items() if p in skeleton.tensors and skeleton.in_body(p) is None}
    shapes = {path: file.shapes[key] for path, key in keys.items()}
    for labels in {shape[0]: None for shape in shapes.values() if shape}:
        sized = deepcopy(base)
        sized.num_labels = labels
        tensors = Skeleton.build(model, sized).tensors
        if all(tuple(tensors[path].shape) == shape for path, shape in shapes.items()):
            return OwnHead(keys, file, model, sized)
    return None


def trained_class(
    config: AdapterConfig, base: PretrainedConfig, place: str = "", *, trust_remote_code: bool = False
) -> type | None:
    """Find the class that an adapter was trained on: by name, by its task, or the base's own; None if none is there.

    Args:
        config: its adapter_config.json.
        base: the base's config.
        place: the base's directory or repository, where custom code lies.
        trust_remote_code: whether custom code may be run.
    """
    name = (config.raw.get("auto_mapping") or {}).get("base_model_class")
    if name is not None and (named := getattr(transformers, str(name), None)) is not None:
        return named
    table: Any = getattr(transformers, _TASKS.get(str(config.raw.get("task_type")), ""), {})
    return table.get(type(base), None) or model_class(base, place, trust_remote_code=trust_remote_code)
