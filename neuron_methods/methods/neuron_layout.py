"""Whose slices the tensors of a merge are: an MLP neuron's, an attention row's, or nobody's.

MLP neurons come from `neuron_methods.neurons`. A row of an attention projection, with its entry of the bias, is a unit
of its own. Everything else, embeddings, norms, heads and the bias of the down projection, belongs to no neuron.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from neuron_methods.methods.contract import PlannedTensor
from neuron_methods.neurons import NeuronMap, infer_neurons, layer_of, neuron_map
from neuron_methods.support.errors import UserError

_ATTENTION = re.compile(r"(^|[._])(self_?|cross_?|enc_?dec_?)?(attn|attention)[._]", re.IGNORECASE)
_NO_PROJECTION = re.compile(r"norm|(^|[._])ln_|relative_attention_bias|rotary|inv_freq|sinks", re.IGNORECASE)


@dataclass(frozen=True)
class Slices:
    """Which neurons a tensor's slices belong to.

    Attributes:
        block: the neurons, by one name: the MLP layer's key, or the name of the attention weight whose rows they are.
        layer: what `scope: layer` ranks together.
        kind: MLP neurons or attention rows.
        axis: the owned axis.
        copies: slices each neuron has along it.
        outgoing: whether the slices are the neurons' outgoing weights.
        neurons: how many neurons, where the config tells; None: as many as slices.
    """

    block: str
    layer: str
    kind: Literal["mlp", "attention"]
    axis: int
    copies: int = 1
    outgoing: bool = False
    neurons: int | None = None

    def check_shape(self, name: str, tensor: Tensor) -> None:
        """Raise UserError unless the tensor has one slice per neuron and copy."""
        found = tensor.shape[self.axis] if self.axis < tensor.ndim else 0
        if self.neurons is not None and found != self.copies * self.neurons:
            raise UserError(
                f"{name}: the config says {self.neurons} neurons, so axis {self.axis} should be "
                f"{self.copies * self.neurons} long, but the shape is {list(tensor.shape)}; do config and weights "
                "belong together?"
            )


class NeuronLayout:
    """Every tensor of a plan that belongs to neurons.

    Attributes:
        model: the model that the plan writes; None where only tensors are merged.
        neurons: its MLP neurons.
        slices: tensor name -> whose its slices are; tensors of nobody are missing.
    """

    def __init__(self, tensors: Sequence[PlannedTensor], method: str) -> None:
        """Sort the tensors of a plan; `method` is the name for messages.

        Raises:
            UserError: the model's family is unknown, or none of its MLP tensors is there.
        """
        self.model = next((tensor.model for tensor in tensors if tensor.model is not None), None)
        self.neurons = neuron_map(self.model.config) if self.model is not None else _inferred(tensors, method)
        names = {tensor.name for tensor in tensors}
        self.slices: dict[str, Slices] = {}
        rows = 0
        for name in names:
            owner = self.neurons.owner_of(name)
            if owner is not None:
                key = owner.layer.key
                outgoing, neurons = owner.role == "down", owner.layer.neurons
                self.slices[name] = Slices(key, key, "mlp", owner.axis, len(owner.roles), outgoing, neurons)
                rows = owner.axis if owner.role == "up" else rows
        if not self.slices:
            raise UserError(
                f"{method}: none of the {len(names)} tensors of this merge belongs to an MLP neuron of the model that "
                f"its config describes ({self.neurons.model_type}); do config and weights belong together?"
            )
        for name in names - set(self.slices):
            if _ATTENTION.search(name) and not _NO_PROJECTION.search(name):
                weight = name.removesuffix("bias") + "weight" if name.endswith(".bias") else name
                if weight in names and name.endswith((".weight", ".bias")):
                    # Families that store their MLP in_features × out_features (GPT-2) store attention likewise.
                    axis = rows if name == weight else 0
                    self.slices[name] = Slices(weight, layer_of(name), "attention", axis)

    def of_kind(self, tensors: Iterable[PlannedTensor], *kinds: str) -> list[PlannedTensor]:
        """List the tensors that belong to neurons of these kinds; without kinds, those that belong to none."""
        if not kinds:
            return [t for t in tensors if t.name not in self.slices]
        return [t for t in tensors if t.name in self.slices and self.slices[t.name].kind in kinds]


def _inferred(tensors: Sequence[PlannedTensor], method: str) -> NeuronMap:
    """The MLP neurons of a model of which only the tensors are known."""
    by_name = {tensor.name: tensor for tensor in tensors}

    def shape_of(name: str) -> Sequence[int]:
        base, _ = by_name[name].load()
        return base.shape if base is not None else (0, 0)

    try:
        return infer_neurons(by_name, shape_of)
    except UserError as error:
        raise UserError(f"{method}: {error}") from None
