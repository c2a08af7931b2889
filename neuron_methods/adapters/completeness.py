"""An adapter's file held against its config: whether all is there that the config names in the base."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import PretrainedConfig

from neuron_methods.adapters.config import CONFIG_NAME, AdapterConfig
from neuron_methods.adapters.own_head import trained_class
from neuron_methods.adapters.placement import FACTORED, place_parameter
from neuron_methods.models.skeleton import Skeleton
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import listed

# What decides which modules of a base carry factors.
_CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def refuse_incomplete(
    config: AdapterConfig, base: PretrainedConfig, factored: Sequence[str], whole: Collection[str]
) -> None:
    """Make sure that nothing is missing from an adapter's file, if the class that it was trained on is to be had.

    Args:
        config: its adapter_config.json.
        base: the base's config.
        factored: paths of the modules that carry factors.
        whole: paths of the parameters stored whole.

    Raises:
        UserError: modules that the config names in the base have no tensors in the file.
    """
    model = trained_class(config, base)
    try:
        skeleton = None if model is None else Skeleton.build(model, base)
    except UserError:
        return
    if skeleton is None:
        return
    saved: list[str] = list(config.raw.get("modules_to_save") or ())
    missing = [*_without_factors(config.raw, skeleton, factored, saved), *_not_whole(skeleton, whole, saved)]
    if missing:
        raise UserError(
            f"{config.where}: incomplete: {CONFIG_NAME} names {listed(missing)}, and the file holds no tensors for "
            f"{'it' if len(missing) == 1 else 'them'}; save or download the adapter again"
        )


def _without_factors(
    raw: Mapping[str, Any], skeleton: Skeleton, factored: Sequence[str], saved: Iterable[str]
) -> list[str]:
    there = {new.path for new in skeleton.renamed(f"{path}.weight" for path in factored).values()}
    if not raw.get("target_modules") or not there <= skeleton.parameters.keys():
        return []  # spelled as this transformers does not, so that the config's names are not its own either
    choice = LoraConfig(**{key: raw.get(key) for key in _CHOICE})
    return [
        path
        for path in skeleton.modules
        if f"{path}.weight" in skeleton.parameters.keys() - there
        and place_parameter(skeleton, f"{path}.weight").kind in FACTORED
        and check_target_module_exists(choice, path)
        and not any(f"{name}." in f"{path}." for name in saved)
    ]


def _not_whole(skeleton: Skeleton, whole: Collection[str], saved: Iterable[str]) -> list[str]:
    absent = tuple(name for name in saved if not any(f"{name}." in path for path in whole))
    return [
        path
        for path, module in skeleton.modules.items()
        if absent and path.endswith(absent) and any(module.state_dict())
    ]
