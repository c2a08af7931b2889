"""The neurons of a model of which only the tensors are known: its family is the one whose names fit best."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any

from neuron_methods.neurons.families import FAMILIES, Family, Mlp, Stack
from neuron_methods.neurons.layers import NeuronMap
from neuron_methods.support.errors import UserError


def infer_neurons(names: Collection[str], shape_of: Callable[[str], Sequence[int]]) -> NeuronMap:
    """Find the MLP neurons of a model from its tensors alone.

    Families that store alike cannot be told apart and need not be: the first of them in the table stands for all.

    Raises:
        UserError: the names fit no family of the table.
    """
    best: NeuronMap | None = None
    most = 0
    tried: set[int] = set()
    for model_type, family in FAMILIES.items():
        if id(family) in tried:
            continue
        tried.add(id(family))
        config = _config_of(model_type, family, names, shape_of)
        if config is None:
            continue
        found = NeuronMap(config)
        covered = sum(found.owner_of(name) is not None for name in names)
        if covered > most:
            best, most = found, covered
    if best is None:
        shown = ", ".join(sorted(names)[:2])
        raise UserError(
            f"the names of these {len(names)} tensors ({shown}, …) fit no family in "
            "neuron_methods/neurons/families.py, so it is not known which of them make up a neuron"
        )
    return best


def _config_of(
    model_type: str, family: Family, names: Collection[str], shape_of: Callable[[str], Sequence[int]]
) -> Any | None:
    """What a config of the family would say for these tensors; None if no stack of the family is there."""
    config = SimpleNamespace(model_type=model_type, architectures=None)
    depths = []
    for stack in family.stacks:
        holder = config
        if stack.config:
            holder = SimpleNamespace()
            setattr(config, stack.config, holder)
        depths.append(_describe_stack(stack, family, holder, names, shape_of))
    return config if any(depths) else None


def _describe_stack(
    stack: Stack, family: Family, holder: Any, names: Collection[str], shape_of: Callable[[str], Sequence[int]]
) -> int:
    """Set the fields of `holder` that the table reads for a stack; returns its depth."""
    for spelling in stack.spellings:
        for _, prefix in family.prefixes:
            for mlp in spelling.mlps:
                place = f"{prefix}{spelling.layer}."
                depth = next(i for i in count() if not _is_there(place.replace("{i}", str(i)), mlp, names))
                if depth:
                    first = place.replace("{i}", "0")
                    width = shape_of(f"{first}{mlp.down}.weight")[0 if mlp.transposed else 1]
                    _set_fields(stack, spelling.mlps, mlp, holder, depth, width, f"{first}{mlp.up}.bias" in names)
                    return depth
    if not all(hasattr(holder, key) for key in (stack.depth, stack.width) if isinstance(key, str)):
        width = getattr(holder, stack.width, 0) if isinstance(stack.width, str) else 0
        _set_fields(stack, stack.spellings[0].mlps, stack.spellings[0].mlps[-1], holder, 0, width, False)
    return 0


def _is_there(place: str, mlp: Mlp, names: Collection[str]) -> bool:
    modules = filter(None, (mlp.gate, mlp.up, mlp.down))
    return all(f"{place}{module}.weight" in names for module in modules)


def _set_fields(stack: Stack, mlps: Sequence[Mlp], mlp: Mlp, holder: Any, depth: int, width: int, biased: bool) -> None:
    setattr(holder, stack.depth, depth)
    for other in mlps:
        if other.when is not None and depth:
            setattr(holder, other.when, other is mlp)
    if isinstance(mlp.bias, str):
        setattr(holder, mlp.bias, biased)
    if isinstance(stack.width, str):
        setattr(holder, stack.width, width)
        return
    # The widths that are computed from the config: whatever fields make the function say the width that is there.
    for fields in ({"n_inner": width}, {"intermediate_size": width}, {"intermediate_size": 2 * width}):
        vars(holder).update({"block_auto_adjust_ff_dim": False, **fields})
        try:
            if stack.width(holder) == width:
                return
        except (AttributeError, TypeError):
            continue
