"""Is a directory what it says it is: a whole model, an adapter or a routed model? By what would be loaded from it."""

from __future__ import annotations

from pathlib import Path

from neuron_methods.adapters.verification import verify_adapter_directory
from neuron_methods.models.headers import open_safetensors
from neuron_methods.models.tokenizer_files import check_tokenizer
from neuron_methods.models.verification import Verified, verify_model
from neuron_methods.routing.routed_files import (
    ADAPTERS,
    ROUTER_NAME,
    RoutedConfig,
    RoutedExpert,
    bias_file,
    head_file,
    is_routed,
)
from neuron_methods.support.errors import UserError


def verify_directory(place: Path, *, trust_remote_code: bool = False) -> Verified:
    """Make sure that a directory is complete, by headers and configs alone.

    Args:
        place: what a merge, a route, an export or somebody else's command has written.
        trust_remote_code: whether custom code may be run to build a model's class.

    Returns:
        What was found.

    Raises:
        UserError: it is none of them, or naming the file or tensor that is missing, left over or damaged.
    """
    if not place.is_dir():
        raise UserError(f"{place}: no such directory")
    if is_routed(place):
        return _verify_routed(place)
    if (place / "config.json").exists():
        found = verify_model(place, trust_remote_code=trust_remote_code)
        found.notes.extend(check_tokenizer(place, trust_remote_code=trust_remote_code))
        return found
    if (place / "adapter_config.json").exists():
        return verify_adapter_directory(place, trust_remote_code=trust_remote_code)
    raise UserError(f"{place}: holds no model (config.json), no adapter (adapter_config.json) and no routed model")


def _verify_routed(place: Path) -> Verified:
    config = RoutedConfig.read(place)
    router = place / ROUTER_NAME
    if not router.is_file():
        raise UserError(f"{router}: missing; route again")
    adapters = [verify_adapter_directory(place / ADAPTERS / expert.name) for expert in config.experts]
    for expert in config.experts:
        if expert.biases and not bias_file(place, expert.name).is_file():
            raise UserError(f"{bias_file(place, expert.name)}: missing; route again")
    heads = [_verify_head(place, expert) for expert in config.experts if expert.head_labels is not None]
    tensors = len(open_safetensors(router).keys()) + sum(adapter.tensors for adapter in adapters) + sum(heads)
    notes = list(dict.fromkeys(note for adapter in adapters for note in adapter.notes))
    by = f"its router and {len(adapters)} adapters" + (f", {len(heads)} with heads" if heads else "")
    return Verified("routed", tensors, by, notes)


def _verify_head(place: Path, expert: RoutedExpert) -> int:
    """Make sure that an expert's head has as many classes as labels; returns how many tensors it has."""
    file = head_file(place, expert.name)
    if not file.is_file():
        raise UserError(f"{file}: missing; route again")
    tensors, classes = open_safetensors(file), len(expert.head_labels or ())
    shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - no mapping
    if not any(shape[:1] == [classes] for shape in shapes.values()):
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UserError(f"{file}: {found}, but {expert.name} has {classes} labels in routed_config.json; route again")
    return len(shapes)
