"""Is a directory what it says it is: a whole model, an adapter or a routed model? Looked at before it is uploaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from neuron_methods.sharing.snippets import ROUTED_CONFIG
from neuron_methods.support.errors import UserError


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
    if (place / ROUTED_CONFIG).exists():
        _check_routed(place)
        return "routed"
    if (place / "adapter_config.json").exists() and not (place / "config.json").exists():
        _check_adapter(place)
        return "adapter"
    _check_model(place)
    return "model"


def _check_safetensors(place: Path) -> None:
    from neuron_methods.plugin.preflight import open_safetensors

    for file in sorted(place.rglob("*.safetensors")):
        open_safetensors(str(file))
    for index in sorted(place.rglob("*.safetensors.index.json")):
        for shard in set(_read(index).get("weight_map", {}).values()):
            open_safetensors(str(index.parent / shard))


def _check_routed(place: Path) -> None:
    from neuron_methods.routing.routed_files import ADAPTERS, ROUTER_NAME, RoutedConfig

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
    from neuron_methods.plugin.output import written_headers

    if not (place / "config.json").is_file():
        raise UserError(f"{place}: holds no model (config.json) and no adapter (adapter_config.json)")
    config = _read(place / "config.json")
    if not any((place / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        pickled = any(place.glob("pytorch_model*.bin"))
        raise UserError(
            f"{place}: its weights are a pickle, which nobody should have to load; merge again with safetensors"
            if pickled
            else f"{place}: no weights in it (model.safetensors or its index); merge again"
        )
    stored = set(written_headers(place))
    missing = [name for names in _required(place, config) if not stored.intersection(names) for name in names[:1]]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{place}: tensor {missing[0]}{more} is missing from its weights; merge again")


def _required(place: Path, config: dict[str, Any]) -> list[tuple[str, ...]]:
    """The names that each tensor its config promises may be stored under; [] for a class mergekit does not know."""
    import neuron_methods

    neuron_methods.register()
    from mergekit.architecture.json_definitions import NAME_TO_ARCH
    from transformers import AutoConfig

    known = [NAME_TO_ARCH[name] for name in config.get("architectures") or () if name in NAME_TO_ARCH]
    if not known:
        return []
    try:
        loaded = AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise UserError(f"{place / 'config.json'}: {str(error).splitlines()[0]}") from None
    # Of several definitions for one name the model fits one; a tensor is missing where all of them say so.
    wanted = []
    for definition in known[0]:
        weights = definition.all_weights(loaded)
        wanted.append([(w.name, *(w.aliases or ()), *(w.tied_names or ())) for w in weights if not w.optional])
    return min(wanted, key=len)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path}: cannot be read as JSON; merge again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds something else than a JSON object; merge again")
    return content
