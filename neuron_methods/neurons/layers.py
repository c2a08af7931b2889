"""What a neuron is: the MLP neurons of every layer of a model, and the slices of tensors that each of them owns.

An MLP neuron is one unit between the up and the down projection. It owns its row of the gate and of the up
projection, its entries of their biases and its column of the down projection. The bias of the down projection belongs
to no neuron. Everything here follows from the model's config and the table in `families`; no weight is read.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import nn

from neuron_methods.neurons.families import FAMILIES, Family, Mlp, Stack
from neuron_methods.support.errors import UserError

if TYPE_CHECKING:  # the start-up hook imports this room along with mergekit: transformers would triple what that takes
    from transformers import PretrainedConfig, PreTrainedModel

Role = Literal["gate", "up", "bias", "down"]

# The first number in a path is that of its layer: "model.layers.3.mlp.up_proj" belongs to "model.layers.3".
_LAYER = re.compile(r"(.*?\.\d+)(\.|$)")
# Fields by which configs announce that a token passes through some of many MLPs.
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class OwnedSlice:
    """The slices of one tensor that belong to a layer's neurons, one each.

    Neuron n owns index ``offset + n`` along `axis` of `tensor`. The offset is 0 but for the `up` part of a fused
    gate and up projection, where the gate's rows come first.
    """

    tensor: str
    axis: int
    role: Role
    offset: int = 0


@dataclass(frozen=True)
class MlpLayer:
    """One MLP of a model.

    Attributes:
        key: its name in profiles and messages, the same for every head on the same body: "layers.3" (Llama),
            "encoder.block.2" (T5), "encoder.layer.0" (ViT), "vision_model.encoder.layers.0" (CLIP).
        index: the layer's index in its stack.
        neurons: how many it has.
        parts: what they own, as transformers stores it for the config's architecture.
        gated: whether an activated gate is multiplied onto the up projection.
        down: possible paths of the down projection's module in memory; its input is the neurons' activation.
        gate: possible paths of the gate's module in memory; empty if there is none. Of a fused module the first
            `neurons` output features are the gate.
    """

    key: str
    index: int
    neurons: int
    parts: tuple[OwnedSlice, ...]
    gated: bool
    down: tuple[str, ...]
    gate: tuple[str, ...]


@dataclass(frozen=True)
class Ownership:
    """Which neurons the slices of one tensor belong to: ``offset + n`` along `axis` to neuron n of `layer`.

    There is one (role, offset) in `roles`, or two where gate and up projection are fused.
    """

    layer: MlpLayer
    axis: int
    roles: tuple[tuple[Role, int], ...]

    @property
    def role(self) -> Role:
        """What the tensor is to its neurons; "up" for a fused gate and up projection."""
        return self.roles[-1][0]


class LayerModules(NamedTuple):
    """The modules of one MLP in memory; `gate` is None where there is none."""

    down: nn.Module
    gate: nn.Module | None


class NeuronMap:
    """All MLP layers of a model, and whose the slices of its tensors are.

    Attributes:
        model_type: the config's.
        layers: every MLP, stack by stack, in the order of the layers.
    """

    def __init__(self, config: PretrainedConfig, architecture: str | None = None) -> None:
        """See `neuron_map`."""
        self.model_type: str = config.model_type
        family = _family(config)
        if architecture is None:
            architecture = (getattr(config, "architectures", None) or [""])[0]
        self._owners: dict[str, Ownership] = {}
        self.layers: tuple[MlpLayer, ...] = tuple(
            layer
            for stack in family.stacks
            if not architecture.endswith(stack.absent_in)
            for layer in self._stack_layers(family, stack, architecture, config)
        )

    @property
    def neurons(self) -> dict[str, int]:
        """The number of neurons of each layer, by key."""
        return {layer.key: layer.neurons for layer in self.layers}

    def owner_of(self, tensor_name: str) -> Ownership | None:
        """Find the neurons that the slices of a tensor belong to, None if it is no neuron's.

        One dictionary look-up. Understands every spelling of the table, whatever the config's architecture.
        """
        return self._owners.get(tensor_name)

    def check_same(self, what: str, model: str, model_type: str, layers: Mapping[str, int]) -> None:
        """Raise UserError unless a file is of a model with these neurons: same family, layers and widths.

        Args:
            what: begins the message, and tells the file: "p.safetensors: this profile".
            model: what the file is of.
            model_type: likewise.
            layers: key -> number of neurons, likewise.
        """
        if model_type != self.model_type:
            raise UserError(
                f"{what} is of {model} (model_type {model_type!r}), the model at hand is a {self.model_type!r}"
            )
        for key in (*self.neurons, *layers):
            here, there = self.neurons.get(key, 0), layers.get(key, 0)
            if here != there:
                raise UserError(
                    f"{what} is of {model}, which has {there or 'no'} neurons in {key}; the model at hand has "
                    f"{here or 'none'}: of another model, or a layer is missing"
                )

    def _stack_layers(
        self, family: Family, stack: Stack, architecture: str, config: PretrainedConfig
    ) -> Iterator[MlpLayer]:
        """The layers of one stack; enters their tensors, in every spelling, into the reverse look-up."""
        config = getattr(config, stack.config) if stack.config else config
        depth = int(_field(config, stack.depth))
        width = stack.width(config) if callable(stack.width) else int(_field(config, stack.width))
        main = next(prefix for end, prefix in family.prefixes if architecture.endswith(end))
        prefixes = list(dict.fromkeys((main, *(prefix for _, prefix in family.prefixes))))
        spellings = [
            (prefix, spelling.layer, _mlp(spelling.mlps, config)) for spelling in stack.spellings for prefix in prefixes
        ]
        key = stack.spellings[0].layer
        for i in range(depth):
            places = [(prefix + path.replace("{i}", str(i)) + ".", mlp) for prefix, path, mlp in spellings]
            (place, mlp), *_ = places
            layer = MlpLayer(
                key=key.replace("{i}", str(i)),
                index=i,
                neurons=width,
                parts=_parts(place, mlp, width, config),
                gated=mlp.gated,
                down=tuple(place + mlp.down for place, mlp in places),
                gate=tuple(place + (mlp.gate or mlp.up) for place, mlp in places if mlp.gated),
            )
            for place, mlp in places:
                self._enter(layer, _parts(place, mlp, width, config))
            yield layer

    def _enter(self, layer: MlpLayer, parts: tuple[OwnedSlice, ...]) -> None:
        for (name, axis), slices in itertools.groupby(parts, lambda part: (part.tensor, part.axis)):
            self._owners[name] = Ownership(layer, axis, tuple((part.role, part.offset) for part in slices))


def neuron_map(config: PretrainedConfig, architecture: str | None = None) -> NeuronMap:
    """Find the MLP neurons of the model that `config` describes, and what they own.

    `architecture` is the name of the model's class, if it is not the first of the config's `architectures` (which a
    model built from a config in memory does not have).

    Raises:
        UserError: its family is not in the table, or its layers are mixtures of experts.
    """
    return NeuronMap(config, architecture)


def layer_of(path: str) -> str:
    """Name the layer that a module or tensor belongs to; one outside all layers (embedding, head) is one by itself."""
    found = _LAYER.match(path)
    return found[1] if found else path


def find_modules(model: PreTrainedModel, layer: MlpLayer) -> LayerModules:
    """Find the modules of `layer` in a model built from the config that `layer` was made from.

    Adapters of peft that were injected into the model keep the paths; pass ``peft_model.get_base_model()``.

    Raises:
        UserError: the model has no module at any of the paths.
    """
    down = _first_module(model, layer.down)
    gate = _first_module(model, layer.gate)
    if down is None or (layer.gated and gate is None):
        raise UserError(
            f"{type(model).__name__} has no module {layer.down[0]!r} or {layer.down[-1]!r}: the entry "
            f"{model.config.model_type!r} in neuron_methods/neurons/families.py does not fit this transformers"
        )
    return LayerModules(down, gate)


def _first_module(model: nn.Module, paths: tuple[str, ...]) -> nn.Module | None:
    for path in paths:
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    return None


def _parts(place: str, mlp: Mlp, width: int, config: PretrainedConfig) -> tuple[OwnedSlice, ...]:
    """What the neurons of an MLP own, its modules being found at `place`."""
    rows, columns = (1, 0) if mlp.transposed else (0, 1)
    if mlp.fused:
        readers: list[tuple[Role, str, int]] = [("gate", mlp.up, 0), ("up", mlp.up, width)]
    else:
        readers = [("gate", mlp.gate, 0)] if mlp.gate else []
        readers.append(("up", mlp.up, 0))
    biased = getattr(config, mlp.bias, False) if isinstance(mlp.bias, str) else mlp.bias
    parts = [OwnedSlice(f"{place}{module}.weight", rows, role, offset) for role, module, offset in readers]
    if biased:
        parts += [OwnedSlice(f"{place}{module}.bias", 0, "bias", offset) for _, module, offset in readers]
    return (*parts, OwnedSlice(f"{place}{mlp.down}.weight", columns, "down"))


def _mlp(mlps: tuple[Mlp, ...], config: PretrainedConfig) -> Mlp:
    return next(mlp for mlp in mlps if mlp.when is None or getattr(config, mlp.when, False))


def _field(config: PretrainedConfig, key: str) -> int:
    value = getattr(config, key, None)
    if value is None:
        raise UserError(f"the config of this {config.model_type!r} lacks {key!r}, which gives its layers or neurons")
    return value


def _family(config: PretrainedConfig) -> Family:
    """The entry for the config's model type."""
    model_type = config.model_type
    expert_count = next((key for key in _EXPERT_COUNTS if (getattr(config, key, None) or 0) > 1), None)
    if expert_count is not None:
        raise UserError(
            f"model_type {model_type!r}: its layers are mixtures of experts ({expert_count}: "
            f"{getattr(config, expert_count)}), whose neurons see only the tokens routed to them; "
            "neurons are defined here for dense MLPs alone"
        )
    family = FAMILIES.get(model_type)
    if family is None:
        raise UserError(
            f"model_type {model_type!r} has no entry in neuron_methods/neurons/families.py, so it is not known where "
            f"its MLP neurons are; add one to FAMILIES there (known: {', '.join(sorted(FAMILIES))})"
        )
    return family
