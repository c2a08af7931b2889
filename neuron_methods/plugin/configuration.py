"""Read a mergekit YAML and refuse what cannot work, before mergekit or torch do anything."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import MergeMethodSpec
from pydantic import ValidationError

from neuron_methods.errors import UserError


def read_configuration(source: str, name: str = "the configuration") -> MergeConfiguration:
    """Parse and validate a mergekit YAML.

    Args:
        source: text of the YAML.
        name: file name for messages.

    Raises:
        UserError: with the line number where the YAML is unreadable, or the key that is wrong.
    """
    try:
        content = yaml.safe_load(source)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{name}{where}: not readable as YAML: {problem}") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}: expected keys such as merge_method and models, found {type(content).__name__}")
    unknown = sorted(set(map(str, content)) - set(MergeConfiguration.model_fields))
    if unknown:
        raise UserError(
            f"{name}: unknown key {unknown[0]!r}{_did_you_mean(unknown[0], MergeConfiguration.model_fields)}"
        )
    try:
        configuration = MergeConfiguration.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise UserError(f"{name}: {key}: {first['msg']}") from None
    except RuntimeError as error:  # mergekit's own validators raise it
        raise UserError(f"{name}: {error}") from None
    _check_method(configuration, name)
    return configuration


def _check_method(configuration: MergeConfiguration, name: str) -> None:
    known = {method.spec.name: method.spec for method in registry.registered_methods()}
    spec = known.get(configuration.merge_method)
    if spec is None:
        hint = _did_you_mean(configuration.merge_method, known)
        raise UserError(f"{name}: unknown merge_method {configuration.merge_method!r}{hint}")
    # mergekit ignores a parameter it does not know, and a misspelt one is silently the default.
    for place, parameters in _parameter_places(configuration):
        for key in parameters or {}:
            if key not in {p.name for p in spec.parameters}:
                raise UserError(f"{name}: {place}: {_unknown_parameter(key, spec)}")


def _unknown_parameter(key: str, spec: MergeMethodSpec) -> str:
    names = [p.name for p in spec.parameters]
    return f"{spec.name} has no parameter {key!r}{_did_you_mean(key, names)} (it has: {', '.join(names) or 'none'})"


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _parameter_places(configuration: MergeConfiguration) -> Iterator[tuple[str, dict[str, Any] | None]]:
    yield "parameters", configuration.parameters
    for model in configuration.models or ():
        yield f"model {model.model}", model.parameters
    places = [("slices", configuration.slices or ())]
    for key, module in (configuration.modules or {}).items():
        yield f"module {key}", module.parameters
        for model in module.models or ():
            yield f"module {key}, model {model.model}", model.parameters
        places.append((f"module {key}, slices", module.slices or ()))
    for place, slices in places:
        for index, output in enumerate(slices):
            yield f"{place}[{index}]", output.parameters
            for source in output.sources:
                yield f"{place}[{index}], model {source.model}", source.parameters


def check_models(configuration: MergeConfiguration, trust_remote_code: bool = False) -> None:
    """Make sure that every model of the configuration can be found and has a readable config.

    Raises:
        UserError: naming the model, what is missing and what to do.
    """
    for model in configuration.referenced_models():
        check_model(model, trust_remote_code)


def check_model(model: ModelReference, trust_remote_code: bool = False) -> None:
    """Make sure that one model can be found and has a readable config; see `check_models`."""
    path = model.model.path
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise UserError(f"model {path}: the directory has no config.json; is it a saved transformers model?")
    elif os.path.exists(path):
        raise UserError(f"model {path}: a file, not a directory; give the directory that holds config.json")
    elif looks_local(path):
        raise UserError(f"model {path}: no such directory")
    try:
        model.config(trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "config.json" if os.path.isdir(path) else "not a local directory, and not to be had from the Hub"
        raise UserError(f"model {path}: {where}: {reason}") from None


def looks_local(path: str) -> bool:
    """Whether a model path can only mean a local directory: no repository on the Hub is named like it."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/") or os.sep == "\\" in path
