"""The frozen base: loading it, and what kind of model it is."""

from __future__ import annotations

from typing import Any

from neuron_methods.models.kinds import KindFacts, facts_of
from neuron_methods.models.loading import load_weights
from neuron_methods.models.reference import ModelName
from neuron_methods.routing.routed_files import CLASSIFIERS
from neuron_methods.support.errors import UserError


def load_base(
    reference: str, where: str, *, dtype: str = "auto", device_map: Any = None, architecture: str | None = None
) -> Any:
    """Load the base model, `where` in messages, in evaluation mode, all weights frozen.

    With an `architecture` it is loaded as that class; where its config names another one, its head has any values.

    Raises:
        UserError: it cannot be loaded, lacks weights, or is of no kind that can be routed.
    """
    name = ModelName.find(reference)
    if name.adapter is not None:
        raise UserError(f"{where}: {name.adapter} is an adapter; name the model that the experts were trained on")
    model = load_weights(name.base, where, dtype=dtype, architecture=architecture, device_map=device_map)
    routable_kind(model, where)
    return model


def routable_kind(model: Any, where: str = "the base model") -> KindFacts:
    """Look up what a model does, by its class.

    Raises:
        UserError: it neither generates text nor classifies images or texts.
    """
    return routable_class(type(model).__name__, model.config, where)


def routable_class(name: str, config: Any, where: str) -> KindFacts:
    """Look up what a class of models with this config does; errors as for `routable_kind`."""
    facts = facts_of(name, bool(config.is_encoder_decoder))
    kinds = ("causal", "text-to-text", *CLASSIFIERS)
    if facts is None or facts.kind not in kinds:
        raise UserError(f"{where}: {name} cannot be routed; {', '.join(kinds)} models can")
    return facts
