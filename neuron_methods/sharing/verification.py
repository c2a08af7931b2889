"""Is a directory what it says it is: a whole model, an adapter or a routed model? Looked at before it is uploaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neuron_methods.routing.routed_files import ADAPTERS, ROUTER_NAME, RoutedConfig, is_routed
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import read_object
from neuron_methods.support.text import first_line, listed


def verify_directory(place: Path) -> str:
    """Make sure that a directory is complete, as far as headers tell.

    Args:
        place: what a merge, a route or an export has written.

    Returns:
        `model`, `adapter` or `routed`.

    Raises:
        UserError: it is none of them, or naming the file or tensor that is missing or damaged.
    """
    if not place.is_dir():
        raise UserError(f"{place}: no such directory")
    _check_safetensors(place)
    if is_routed(place):
        _check_routed(place)
        return "routed"
    if (place / "adapter_config.json").exists() and not (place / "config.json").exists():
        _check_adapter(place)
        return "adapter"
    _check_model(place)
    return "model"


def _check_safetensors(place: Path) -> None:
    from neuron_methods.models.headers import open_safetensors

    for file in sorted(place.rglob("*.safetensors")):
        open_safetensors(str(file))
    for index in sorted(place.rglob("*.safetensors.index.json")):
        for shard in set(read_object(index, again="merge again").get("weight_map", {}).values()):
            open_safetensors(str(index.parent / shard))


def _check_routed(place: Path) -> None:
    config = RoutedConfig.read(place)
    if not (place / ROUTER_NAME).is_file():
        raise UserError(f"{place / ROUTER_NAME}: missing; route again")
    for expert in config.experts:
        _check_adapter(place / ADAPTERS / expert.name)


def _check_adapter(place: Path) -> None:
    from neuron_methods.adapters.config import AdapterConfig
    from neuron_methods.adapters.weights_file import AdapterWeights

    AdapterConfig.read(str(place), str(place))
    AdapterWeights(str(place))


def _check_model(place: Path) -> None:
    from neuron_methods.models.headers import stored_headers

    if not (place / "config.json").is_file():
        raise UserError(f"{place}: holds no model (config.json) and no adapter (adapter_config.json)")
    config = read_object(place / "config.json", again="merge again")
    if not any((place / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        pickled = any(place.glob("pytorch_model*.bin"))
        raise UserError(
            f"{place}: its weights are a pickle, which nobody should have to load; merge again with safetensors"
            if pickled
            else f"{place}: no weights in it (model.safetensors or its index); merge again"
        )
    stored = set(stored_headers(place))
    missing = [name for names in _required(place, config) if not stored.intersection(names) for name in names[:1]]
    if missing:
        raise UserError(f"{place}: missing from its weights: {listed(missing, 1)}; merge again")


def _required(place: Path, config: dict[str, Any]) -> list[tuple[str, ...]]:
    """The names that each tensor its config promises may be stored under; [] for a class mergekit does not know."""
    import neuron_methods

    neuron_methods.register()
    from transformers import AutoConfig

    from neuron_methods.plugin.seam import architecture_table

    table = architecture_table()
    known = [table[name] for name in config.get("architectures") or () if name in table]
    if not known:
        return []
    try:
        loaded = AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise UserError(f"{place / 'config.json'}: {first_line(error)}") from None
    # Of several definitions for one name the model fits one; a tensor is missing where all of them say so.
    wanted = [[w for w in definition.all_weights(loaded) if not w.optional] for definition in known[0]]
    return [(w.name, *(w.aliases or ()), *(w.tied_names or ())) for w in min(wanted, key=len)]
