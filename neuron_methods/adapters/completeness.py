"""An adapter's file held against its config: whether all is there that the config names in the base."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import PretrainedConfig

from neuron_methods.adapters.config import CONFIG_NAME, AdapterConfig
from neuron_methods.adapters.keys import AdaptedModule, sort_keys
from neuron_methods.adapters.own_head import trained_class
from neuron_methods.adapters.placement import FACTORED, place_parameter
from neuron_methods.models.model_files import foreign_reading
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
    missing = [
        *_without_factors(config.raw, skeleton, factored, saved, config.where),
        *_not_whole(skeleton, whole, saved),
    ]
    if missing:
        raise UserError(
            f"{config.where}: incomplete: {CONFIG_NAME} names {listed(missing)}, and the file holds no tensors for "
            f"{'it' if len(missing) == 1 else 'them'}; save or download the adapter again"
        )


def refuse_half(where: str, modules: Iterable[AdaptedModule]) -> None:
    """Make sure that each module of an adapter's file has both of its factors.

    Args:
        where: how messages call the adapter.
        modules: from `keys.sort_keys`.

    Raises:
        UserError: naming the factor that is there and the one that is not.
    """
    for module in modules:
        if not module.keys.keys() - {"tokens"}:
            continue
        for part in module.factors:
            if part not in module.keys:
                other = next(key for what, key in module.keys.items() if what != "tokens")
                raise UserError(f"{where}: {other} is there, its lora_{part} is not; save the adapter again")


def refuse_other_ranks(config: AdapterConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Make sure that the ranks in a config are those of the file, before memory is taken for them.

    Args:
        config: adapter_config.json.
        shapes: {key: shape} of the file.

    Raises:
        UserError: naming the module and the two ranks.
    """
    modules, _ = sort_keys(shapes)
    refuse_half(config.where, modules)
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    if config.peft_type != "LORA" and config.rank > max(largest, 64):
        raise UserError(f"{config.where}: {CONFIG_NAME} says r: {config.rank}, but its file holds no such dimension")
    for module in modules if config.peft_type == "LORA" and not config.target_parameters else ():
        key = module.keys.get(module.factors[0])
        if key is not None and shapes[key][:1] != (rank := config.rank_of(module.path),)[:1]:
            raise UserError(
                f"{config.where}: {key} has shape {list(shapes[key])}, but {CONFIG_NAME} says rank {rank} for "
                f"{module.path}; the two files are not of one adapter"
            )


def _without_factors(
    raw: Mapping[str, Any], skeleton: Skeleton, factored: Sequence[str], saved: Iterable[str], where: str
) -> list[str]:
    there = {new.path for new in skeleton.renamed(f"{path}.weight" for path in factored).values()}
    if not raw.get("target_modules") or not there <= skeleton.parameters.keys():
        return []  # spelled as this transformers does not, so that the config's names are not its own either
    with foreign_reading(f"{where}: {CONFIG_NAME}"):
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
