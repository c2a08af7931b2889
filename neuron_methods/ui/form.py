"""What the page's form holds, in and out of a merge YAML; its parameters are those of the method's own spec."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import MISSING, BasePolicy, MergeMethod, ParameterScope, ParameterSpec

from neuron_methods.methods.parameters import OwnMethodSpec, OwnParameterSpec, Range
from neuron_methods.plugin.patches import register
from neuron_methods.plugin.recorded import recorded_head, with_head
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import listed
from neuron_methods.support.yaml_source import YamlSource

NAME = "the YAML"
_EXPECTED = "keys such as merge_method and models"
_OF_FORM = ("merge_method", "base_model", "models", "dtype")
_ORDER = ("merge_method", "base_model", "models", "parameters", "dtype")
#: What says more than the form can show.
_BEYOND = ("slices", "modules")

Kind = Literal["number", "words", "text"]


@dataclass(frozen=True)
class Field:
    """A parameter of a method, as the form asks for it.

    Attributes:
        name: in the YAML.
        kind: a number, one of a few words, or what is written: a number or word, a text, one value for each expert.
        about: what it is, what it may be, and its default.
        default: as text; "" where there is none.
        words: that it may be.
        numbers: that it may be.
        each: whether experts may have a value each.
    """

    name: str
    kind: Kind
    about: str
    default: str
    words: tuple[str, ...] = ()
    numbers: Range | None = None
    each: bool = False

    @classmethod
    def of(cls, spec: ParameterSpec) -> Field:
        """Make the field of a parameter."""
        own = spec if isinstance(spec, OwnParameterSpec) else None
        words, numbers = (own.words, own.numbers) if own is not None else ((), None)
        each = spec.scope != ParameterScope.SHARED
        default = "" if spec.default is MISSING or spec.default is None else _shown(spec.default)
        switch = spec.value_type is bool
        if switch:
            words = ("true", "false")
        if own is None and not switch:
            numbers = Range()
        kind: Kind = "number" if numbers is not None else "words" if words else "text"
        may = [str(numbers)] * (numbers is not None) + list(words if numbers is not None or each else ())
        if each or (numbers is not None and words):
            kind = "text"
        told = [
            spec.description,
            " or ".join(may),
            f"default {default}" if default else "needed" if spec.required else None,
        ]
        return cls(spec.name, kind, "; ".join(filter(None, told)), default, words, numbers, each)


@dataclass(frozen=True)
class Form:
    """What stands in the form.

    Attributes:
        method: the name of the method.
        base: the base model.
        experts: as they are listed.
        dtype: of the output; "": that of the inputs.
        settings: (parameter, what stands in its field), of those that the YAML sets.
        beyond: parameters that the YAML sets in ways which the form has no room for.
    """

    method: str = ""
    base: str = ""
    experts: tuple[str, ...] = ()
    dtype: str = ""
    settings: tuple[tuple[str, str], ...] = ()
    beyond: frozenset[str] = frozenset()


def methods() -> dict[str, MergeMethod]:
    """List the methods that a merge can be made by, ours first, by their names in a YAML."""
    register()
    known = sorted(registry.registered_methods(), key=lambda m: not isinstance(m.spec, OwnMethodSpec))
    return {method.spec.name: method for method in known}


def fields_of(method: str) -> list[Field]:
    """List the fields of a method's parameters; none of a method that is not known."""
    found = methods().get(method)
    return [Field.of(parameter) for parameter in found.spec.parameters] if found else []


def about_method(method: str) -> str:
    """Say in Markdown what a method is after, and what it is given."""
    found = methods().get(method)
    if found is None:
        return ""
    spec = found.spec
    told = [
        f"[{spec.pretty_name or method}]({spec.reference_url})" if spec.reference_url else spec.pretty_name or method
    ]
    source = getattr(spec, "source", None)
    if isinstance(spec, OwnMethodSpec):
        told.append(f"after {source.name}" if source is not None else "ours")
    needs = {BasePolicy.REQUIRED: "needs a base", BasePolicy.IGNORED: "takes no base"}
    if spec.contract.base in needs:
        told.append(needs[spec.contract.base])
    return ", ".join(told) + "."


def read_form(text: str) -> Form:
    """Read the form out of a YAML.

    Raises:
        UserError: it is no YAML, or merges slices or modules, which the form has no room for.
    """
    content = _content(text)
    models = [entry for entry in _list(content.get("models")) if isinstance(entry, dict) and "model" in entry]
    base = content.get("base_model")
    settings: dict[str, str] = {}
    beyond: set[str] = set()
    shared = content.get("parameters") if isinstance(content.get("parameters"), dict) else {}
    own = [entry.get("parameters") if isinstance(entry.get("parameters"), dict) else {} for entry in models]
    for name in dict.fromkeys([*shared, *(key for parameters in own for key in parameters)]):
        values = [parameters.get(name, shared.get(name, "")) for parameters in own]
        if not any(name in parameters for parameters in own):
            values = [shared[name]]
        if any(isinstance(value, (list, dict)) or value is None for value in values):
            beyond.add(name)
        elif len({repr(value) for value in values}) == 1:
            settings[name] = _shown(values[0])
        else:
            settings[name] = ", ".join(map(_shown, values))
    return Form(
        method=str(content.get("merge_method") or ""),
        base=_model(base) if base else "",
        experts=tuple(_model(entry["model"]) for entry in models),
        dtype=str(content.get("dtype") or ""),
        settings=tuple(settings.items()),
        beyond=frozenset(beyond),
    )


def with_models(text: str, base: str, experts: Sequence[str], method: str, dtype: str) -> str:
    """Write base, experts, method and dtype into a YAML, and leave all else that still has a meaning.

    Raises:
        UserError: as `read_form`.
    """
    content = _content(text)
    before = {
        _model(entry["model"]): entry
        for entry in _list(content.get("models"))
        if isinstance(entry, dict) and "model" in entry
    }
    before_method = content.get("merge_method")
    changed: dict[str, Any] = {"merge_method": method} if method else {}
    if base:
        changed["base_model"] = base
    changed["models"] = [copy.deepcopy(before.get(expert, {"model": expert})) for expert in experts]
    if dtype:
        changed["dtype"] = dtype
    content = {key: value for key, value in content.items() if key not in _OF_FORM} | changed
    if method != before_method and method in methods():
        known = {field.name for field in fields_of(method)}
        _keep(content, known)
        for entry in content["models"]:
            _keep(entry, known)
    return _written(content, text)


def with_setting(text: str, name: str, value: str) -> str:
    """Write what stands in a parameter's field into a YAML; at its default it is left out.

    Raises:
        UserError: as `read_form`; or there are other than one value or one for each expert.
    """
    content = _content(text)
    field = next((f for f in fields_of(str(content.get("merge_method"))) if f.name == name), None)
    if field is None:
        raise UserError(f"{NAME}: its method has no parameter {name}")
    entries = [entry for entry in _list(content.get("models")) if isinstance(entry, dict)]
    values = [part.strip() for part in value.split(",")] if field.each else [value.strip()]
    if len(values) not in (1, len(entries)):
        raise UserError(f"{name}: {len(values)} values for {len(entries)} experts; give one value, or one for each")
    for holder in (content, *entries):
        parameters = holder.get("parameters")
        if isinstance(parameters, dict):
            parameters.pop(name, None)
    if len(values) > 1:
        for entry, one in zip(entries, values, strict=True):
            if one:
                _parameters(entry)[name] = _read(field, one)
    elif values[0] and _read(field, values[0]) != _read(field, field.default):
        _parameters(content)[name] = _read(field, values[0])
    for holder in (content, *entries):
        if holder.get("parameters") == {}:
            del holder["parameters"]
    return _written(content, text)


def _content(text: str) -> dict[str, Any]:
    content = YamlSource.parse(text, NAME, _EXPECTED).content if text.strip() else {}
    beyond = [key for key in _BEYOND if content.get(key)]
    if beyond:
        raise UserError(f"{NAME}: has {listed(beyond)}, for which the form has no room; edit it as text")
    return content


def _written(content: Mapping[str, Any], before: str) -> str:
    ordered = {key: content[key] for key in _ORDER if key in content} | content
    return with_head(yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=100), recorded_head(before))


def _keep(holder: dict[str, Any], known: set[str]) -> None:
    parameters = holder.get("parameters")
    if isinstance(parameters, dict):
        kept = {key: value for key, value in parameters.items() if key in known}
        holder["parameters"] = kept
        if not kept:
            del holder["parameters"]


def _parameters(holder: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(holder.get("parameters"), dict):
        holder["parameters"] = {}
    return holder["parameters"]


def _read(field: Field, text: str) -> Any:
    """A value as the YAML is to have it; what is wrong stays as it is written, and is refused with the YAML."""
    if field.words == ("true", "false") and text in field.words:
        return text == "true"
    if field.numbers is None:
        return text
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if re.fullmatch(r"-?\d+", text) else number


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _model(value: Any) -> str:
    """A model as a user writes it, out of what a YAML may have instead of a name."""
    if isinstance(value, dict):
        parts = [value.get("model"), value.get("lora")]
        if not isinstance(value.get("model"), dict):
            return _place(value)
        return "+".join(_place(part) for part in parts if part)
    return str(value)


def _place(value: Any) -> str:
    if isinstance(value, dict):
        revision = value.get("revision")
        return f"{value.get('path') or value.get('model')}" + (f"@{revision}" if revision else "")
    return str(value)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
