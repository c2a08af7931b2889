"""Read a mergekit YAML and refuse what it cannot mean, before any model is looked at.

mergekit passes over a key it does not know, and what was meant by a misspelt one is then silently the default. Here
every key and every value of a parameter is checked while its place in the YAML is still known.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mergekit.common import dtype_from_name
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import BasePolicy, MergeMethodSpec, ParameterSpec
from mergekit.tokenizer.config import TokenEmbeddingConfig, TokenizerConfig
from pydantic import BaseModel, ValidationError

from neuron_methods.plugin.composite import configured
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import did_you_mean, first_line, shortened, unknown
from neuron_methods.support.yaml_source import YamlSource

_MOST_PADDING = 1 << 16


def read_configuration(source: str, name: str = "the configuration") -> MergeConfiguration:
    """Parse and validate a mergekit YAML.

    Args:
        source: text of the YAML.
        name: file name for messages.

    Raises:
        UserError: with the line number where the YAML is unreadable, or the key that is wrong.
    """
    content = YamlSource.parse(source, name, "keys such as merge_method and models").content
    _check_models(content, name)
    for place, keys, known in _keyed_places(content):
        for key in keys:
            if key not in known:
                misplaced = "model" in known and "parameters" in known and _is_parameter(content, key)
                raise UserError(
                    f"{name}: {place}{key} stands beside model; indent it under parameters:"
                    if misplaced
                    else f"{name}: {place}{unknown('key', key, known)}"
                )
    try:
        configuration = MergeConfiguration.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{name}: {_first_problem(error)}") from None
    except Exception as error:  # whatever mergekit's own validators make of foreign values
        raise UserError(f"{name}: {first_line(error)}") from None
    _check_names(configuration, name)
    _check_padding(configuration, name)
    _check_dtypes(configuration, name)
    spec = _spec(configuration, name)
    _check_inputs(spec, configuration, name)
    for place, parameters in _parameter_places(configuration):
        for key, setting in (parameters or {}).items():
            _check_parameter(spec, key, setting, f"{name}: {place}")
    return configuration


def _check_names(configuration: MergeConfiguration, name: str) -> None:
    """Refuse a model without a name, and a revision of a directory, which mergekit passes over."""
    for model in configuration.referenced_models():
        for part in (model.model, *([model.lora] if model.lora else [])):
            if not part.path.strip():
                raise UserError(f"{name}: model {shortened(str(model))}: empty, or nothing beside +; name a model")
            if part.revision and os.path.isdir(part.path):
                shown = shortened(part.path, quote=False)
                raise UserError(
                    f"{name}: model {shortened(str(model))}: {shown} is a directory, which has no revisions; leave "
                    f"@{shortened(part.revision, quote=False)} away"
                )


def _check_padding(configuration: MergeConfiguration, name: str) -> None:
    """Refuse a `pad_to_multiple_of` that would fill memory with rows of no token."""
    multiple = configuration.tokenizer.pad_to_multiple_of if configuration.tokenizer else None
    if multiple is not None and not 1 <= multiple <= _MOST_PADDING:
        raise UserError(f"{name}: tokenizer: pad_to_multiple_of: expected 1 to {_MOST_PADDING}, found {multiple}")


def _check_models(content: dict[str, Any], name: str) -> None:
    """Refuse entries of `models` that are no mapping, and take a directory of any name for what it is, in place."""
    models = content.get("models")
    for index, entry in enumerate(models if isinstance(models, list) else ()):
        if isinstance(entry, str):
            raise UserError(f"{name}: models[{index}]: {entry} alone; write - model: {entry}")
    _take_paths(content)


def _take_paths(content: Any) -> None:
    """Write models whose directories have `+` or `@` in their names as mappings.

    In a plain name mergekit 0.1.5 reads the two as base+adapter and repository@revision, whatever exists.
    """
    for key, value in _items(content):
        if key in ("model", "base_model") and isinstance(value, str) and {"+", "@"} & {*value}:
            content[key] = _reference(value)
        else:
            _take_paths(value)


def _reference(text: str) -> str | dict[str, Any]:
    if os.path.exists(text):
        return {"model": {"path": text}}
    for index in (place for place, character in enumerate(text) if character == "+"):
        base, adapter = text[:index], text[index + 1 :]
        if os.path.exists(base) and os.path.exists(adapter):
            return {"model": {"path": base}, "lora": {"path": adapter}}
    return text


def _is_parameter(content: Mapping[str, Any], key: str) -> bool:
    method = next((m for m in registry.registered_methods() if m.spec.name == content.get("merge_method")), None)
    return method is not None and key in {parameter.name for parameter in method.spec.parameters}


def _keyed_places(content: dict[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Iterable[str]]]:
    """Every mapping of the YAML whose keys mergekit knows: (place for messages, mapping, known keys)."""
    yield "", content, MergeConfiguration.model_fields
    tokenizer = content.get("tokenizer")
    if isinstance(tokenizer, dict):
        yield "tokenizer: ", tokenizer, TokenizerConfig.model_fields
        yield from _keyed(tokenizer.get("tokens"), "tokenizer.tokens", TokenEmbeddingConfig)
    yield from _keyed_conditions(content.get("parameters"), "parameters")
    yield from _keyed_inputs(content, "")
    yield from _keyed(content.get("modules"), "modules", OutputModuleDefinition)
    for key, module in _items(content.get("modules")):
        if isinstance(module, dict):
            yield from _keyed_inputs(module, f"modules.{key}.")


def _keyed_inputs(holder: dict[str, Any], place: str) -> Iterator[tuple[str, Mapping[str, Any], Iterable[str]]]:
    yield from _keyed(holder.get("models"), f"{place}models", InputModelDefinition)
    yield from _keyed(holder.get("slices"), f"{place}slices", OutputSliceDefinition)
    for index, output in _items(holder.get("slices")):
        if isinstance(output, dict):
            yield from _keyed(output.get("sources"), f"{place}slices[{index}].sources", InputSliceDefinition)


def _keyed(
    values: Any, place: str, definition: type[BaseModel]
) -> Iterator[tuple[str, Mapping[str, Any], Iterable[str]]]:
    for index, value in _items(values):
        if isinstance(value, dict):
            here = f"{place}[{index}]"
            yield f"{here}: ", value, definition.model_fields
            yield from _keyed_conditions(value.get("parameters"), f"{here}.parameters")


def _keyed_conditions(parameters: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any], Iterable[str]]]:
    for key, setting in _items(parameters):
        for condition in setting if isinstance(setting, list) else [setting]:
            if isinstance(condition, dict):
                yield f"{place}.{key}: ", condition, ConditionalParameter.model_fields


def _items(values: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(values, dict):
        return values.items()
    return enumerate(values) if isinstance(values, list) else ()


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    if "parameters" in location[:-1]:  # what follows is a member of a union, which the user never wrote
        location = location[: location.index("parameters") + 2]
        return f"{'.'.join(location)}: expected a value, a list of values (gradient), or a list of {{value, filter}}"
    found = first.get("input")
    told = "" if first["type"] == "missing" else f", found {shortened(found)}"
    return f"{'.'.join(location) or 'the top level'}: {first['msg']}{told}"


def _check_dtypes(configuration: MergeConfiguration, name: str) -> None:
    for key in ("dtype", "out_dtype"):
        value = getattr(configuration, key)
        try:
            if value is None or dtype_from_name(value).is_floating_point:
                continue
        except RuntimeError:
            pass
        raise UserError(f"{name}: {key}: {value!r} is none of bfloat16, float16, float32, float64")


def _spec(configuration: MergeConfiguration, name: str) -> MergeMethodSpec:
    known = {method.spec.name: method for method in registry.registered_methods()}
    method = known.get(configuration.merge_method)
    if method is None:
        raise UserError(f"{name}: {unknown('merge_method', configuration.merge_method, sorted(known))}")
    try:
        return configured(method, configuration).spec
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def check_listed_once(configuration: MergeConfiguration, name: str) -> None:
    """Refuse a model that is listed twice, of which mergekit would take the last; adapters may be resolved or not.

    Raises:
        UserError: naming it.
    """
    groups = [configuration.models, *(module.models for module in (configuration.modules or {}).values())]
    for group in groups:
        listed = [str(entry.model) for entry in group or ()]
        twice = next((model for model in listed if listed.count(model) > 1), None)
        if twice is not None:
            raise UserError(f"{name}: model {twice} is listed twice; list it once, with the sum of the two weights")


def _check_inputs(spec: MergeMethodSpec, configuration: MergeConfiguration, name: str) -> None:
    check_listed_once(configuration, name)
    outputs = [
        *(configuration.slices or ()),
        *(s for m in (configuration.modules or {}).values() for s in m.slices or ()),
    ]
    has_base = configuration.base_model or (outputs and all(output.base_model for output in outputs))
    if spec.contract.base == BasePolicy.REQUIRED and not has_base:
        raise UserError(f"{name}: {spec.name} needs base_model: the model that the others were fine-tuned from")


def _check_parameter(spec: MergeMethodSpec, key: str, setting: Any, place: str) -> None:
    parameter: ParameterSpec | None = next((p for p in spec.parameters if p.name == key), None)
    if parameter is None:
        names = [p.name for p in spec.parameters]
        raise UserError(
            f"{place}: {spec.name} has no parameter {key!r}{did_you_mean(key, names)} "
            f"(it has: {', '.join(names) or 'none'})"
        )
    for value in _values(setting, f"{place}: {key}"):
        try:
            found = parameter.validate(value)
            # pydantic takes .nan, .inf and true for floats; no method has a use for them.
            if isinstance(found, float) and (isinstance(value, bool) or not math.isfinite(found)):
                raise UserError(f"{key} must be a finite number; got {value!r}")
            if key == "density" and isinstance(found, float) and not 0 <= found <= 1:
                raise UserError(f"{key} must be a number in [0, 1]; got {value!r}")
            if isinstance(found, str) and not found.strip():  # what mergekit has for: not given
                raise UserError(f"{key} must be a text, or be left out; got {value!r}")
        except OverflowError:
            raise UserError(f"{place}: {key} must be a finite number; got one that is too large") from None
        except ValidationError as error:
            raise UserError(f"{place}: {key}: {error.errors()[0]['msg']}; got {value!r}") from None
        except UserError as error:
            raise UserError(f"{place}: {error}") from None


def _values(setting: Any, place: str) -> Iterator[Any]:
    """The scalars that a parameter's gradients and filters are made of."""
    if isinstance(setting, ConditionalParameter):
        yield from _values(setting.value, place)
    elif isinstance(setting, list):
        if not setting:
            raise UserError(f"{place}: an empty list; give at least one value")
        for entry in setting:
            yield from _values(entry, place)
    else:
        yield setting


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
