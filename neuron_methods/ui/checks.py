"""What is said of the form as it is typed: what each model is, and whether the YAML can be read."""

from __future__ import annotations

import os

from neuron_methods.evaluation.models import ModelSpec
from neuron_methods.models.reference import ModelName, looks_local
from neuron_methods.plugin.configuration import read_configuration
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import one_line
from neuron_methods.ui.form import NAME
from neuron_methods.ui.places import Root
from neuron_methods.ui.showing import Finding


def look_at_model(root: Root, text: str, what: str, *, ask_hub: bool) -> Finding:
    """Say what a model is.

    Args:
        root: where paths start from.
        text: as it is typed.
        what: it stands for: "base".
        ask_hub: whether the Hub is asked about what is not here; while a name is typed, it is not.
    """
    text = text.strip()
    try:
        root.check_words(text, what)
        name = ModelName.parse(text)
        places = [place.path for place in (name.base, name.adapter) if place is not None]
        away = [path for path in places if not os.path.exists(path)]
        for path in filter(looks_local, away):
            raise UserError(f"{path}: no such directory")
        if away and not ask_hub:
            return Finding(None, f"{what}: {text}: not here; the Hub is asked when you leave the field")
        root.check_model(text, what)
        spec = ModelSpec.parse(text)
    except UserError as error:
        return Finding(False, f"{what}: {one_line(error)}")
    adapter = f", adapter on {spec.name.base.shown}" if spec.name.adapter is not None else ""
    return Finding(True, f"{what}: {spec.architecture}{adapter}")


def look_at_models(root: Root, base: str, experts: list[str], *, ask_hub: bool) -> list[Finding]:
    """Say what base and experts are, as far as they are named."""
    named = [("base", base), *((f"expert {number}", expert) for number, expert in enumerate(experts, 1))]
    return [look_at_model(root, text, what, ask_hub=ask_hub) for what, text in named if text.strip()]


def look_at_yaml(text: str) -> Finding:
    """Say whether a YAML can be read, and what it asks for; models are not looked at."""
    if not text.strip():
        return Finding(None, "empty; choose models and a method, or write it here")
    try:
        configuration = read_configuration(text, NAME)
    except UserError as error:
        return Finding(False, one_line(error))
    models = [model for model in configuration.referenced_models() if model != configuration.base_model]
    return Finding(True, f"reads as {configuration.merge_method} of {len(models)} model{'s' * (len(models) != 1)}")
