"""What the user should know of a plan before it is carried out: dtypes, weights of nothing, configs that disagree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from neuron_methods.plugin.preflight import MergePlan
from neuron_methods.support.errors import UserError

# Keys of configs that say how weights of the same shapes are computed with, as families spell them.
_COMPUTED_BY = frozenset(
    (
        "rope_theta",
        "rope_type",
        "factor",
        "partial_rotary_factor",
        "hidden_act",
        "hidden_activation",
        "activation_function",
        "dense_act_fn",
        "rms_norm_eps",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "norm_eps",
        "num_attention_heads",
        "num_key_value_heads",
        "num_heads",
        "n_head",
        "head_dim",
        "d_kv",
    )
)


def config_notes(configuration: MergeConfiguration, trust_remote_code: bool = False) -> list[str]:
    """Warn of models whose weights are computed with otherwise than the base's, as their configs say.

    Args:
        configuration: of a merge.
        trust_remote_code: whether custom code may be run to read the configs.
    """
    models = configuration.referenced_models()
    base = configuration.base_model or models[0]
    expected = dict(_facts(base.config(trust_remote_code).to_dict()))
    notes = []
    for model in models:
        if model.model == base.model:
            continue
        found = dict(_facts(model.config(trust_remote_code).to_dict()))
        differing = [
            f"{key} {found[key]} and not {expected[key]}"
            for key in expected.keys() & found.keys()
            if found[key] != expected[key]
        ]
        if differing:
            notes.append(
                f"warning: {model} computes otherwise than {base}, whose config the output gets: "
                f"{', '.join(sorted(differing))}"
            )
    return notes


def _facts(config: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _facts(value, f"{within}{key}.")
        elif key in _COMPUTED_BY and value is not None and (key != "factor" or "rope" in within):
            yield f"{within}{key}", value


def dtype_notes(plan: MergePlan, configuration: MergeConfiguration) -> list[str]:
    """Say which dtype was chosen and why, where the YAML gives none and the models are stored in several.

    Args:
        plan: with the headers of all inputs.
        configuration: of the merge.
    """
    if configuration.dtype or configuration.out_dtype:
        return []
    stored: dict[ModelReference, set[torch.dtype]] = {}
    for _, inputs, _ in plan.tensors:
        for model, header in inputs.items():
            if header.dtype.is_floating_point and model.lora is None:
                stored.setdefault(model, set()).add(header.dtype)
    if len(set().union(*stored.values())) < 2:
        return []
    shown = "; ".join(f"{model}: {' and '.join(sorted(map(_spelled, dtypes)))}" for model, dtypes in stored.items())
    written = " and ".join(sorted(map(_spelled, plan.dtypes)))
    return [
        f"written in {written}, the narrowest that holds all inputs of a tensor, as the YAML gives no dtype and the "
        f"models are stored in several ({shown}); dtype: bfloat16 or the like would choose one"
    ]


def weight_notes(plan: MergePlan, name: str) -> list[str]:
    """Say that nothing is merged where every model has the weight 0.

    Args:
        plan: with the parameters of every tensor.
        name: of the YAML, for messages.

    Raises:
        UserError: there is no base that would be left.
    """
    weights = [
        values["weight"] for _, models in plan.parameters.values() for values in models.values() if "weight" in values
    ]
    if not weights or any(weights):
        return []
    if plan.base is None:
        raise UserError(f"{name}: weight: 0 for every model, so nothing is left; give one model another weight")
    return [f"weight is 0 for every model, so the output is {plan.base} again; give one model another weight"]


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
