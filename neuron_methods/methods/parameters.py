"""Parameters of a method, declared in a line each: name, values, default, whose it is and what it is about.

A value that a parameter cannot take is refused with the parameter's name and what it may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
)
from pydantic import PlainValidator

from neuron_methods.support.errors import UserError
from neuron_methods.support.sources import Kin, OwnChoice, Source

Of = Literal["merge", "expert"]
# float32's largest number: tensors are multiplied by parameters in it.
_LARGEST = 3.4028234663852886e38


@dataclass(frozen=True)
class Range:
    """The numbers that a parameter takes: from `low`, without it if `low_open`, to `high`."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.low <= value <= self.high and not (self.low_open and value == self.low)

    def __str__(self) -> str:
        if (self.low, self.high) == (-math.inf, math.inf):
            return "a finite number"
        return f"a number in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class OwnParameterSpec(ParameterSpec):
    """What mergekit knows of a parameter, and what values it takes.

    Attributes:
        numbers: that it takes; None: it takes none.
        words: that it takes, beside numbers or alone; none and no numbers: any text.
    """

    numbers: Range | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class OwnMethodSpec(MergeMethodSpec):
    """What mergekit knows of a method, and what of it is whose.

    Attributes:
        source: what it is after; None where it is ours altogether.
        ours: what it does otherwise than its source, or where no source says what to do.
        kin: methods of others that resemble it.
    """

    source: Source | None = None
    ours: tuple[OwnChoice, ...] = ()
    kin: tuple[Kin, ...] = ()


def method_spec(
    name: str,
    pretty_name: str,
    source: Source | None,
    *parameters: ParameterSpec,
    ours: tuple[OwnChoice, ...],
    kin: tuple[Kin, ...] = (),
) -> OwnMethodSpec:
    """Describe a method of ours to mergekit: all of them take a base and at least one expert.

    `source`, `ours` and `kin` are as in `OwnMethodSpec`; users see the parameters in this order.
    """
    return OwnMethodSpec(
        name=name,
        pretty_name=pretty_name,
        reference_url=source.url if source is not None else None,
        source=source,
        ours=ours,
        kin=kin,
        parameters=parameters,
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
    )


def declared(
    name: str,
    validate: Callable[[Any], Any],
    default: Any,
    of: Of,
    about: str,
    *,
    numbers: Range | None = None,
    words: tuple[str, ...] = (),
) -> ParameterSpec:
    """Declare a parameter of the merge or of each expert; `validate` returns its value, or raises a `UserError`."""
    scope = ParameterScope.NON_BASE if of == "expert" else ParameterScope.SHARED
    value = Annotated[Any, PlainValidator(validate)]
    return OwnParameterSpec(name, value, scope, default, about, numbers=numbers, words=words)


def number(
    name: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    low_open: bool = False,
    words: tuple[str, ...] = (),
    whole: bool = False,
    default: float | str,
    of: Of = "merge",
    about: str,
) -> ParameterSpec:
    """Declare a number of float32 from `low` (without it, if `low_open`) to `high`, a `whole` one, or a few words."""
    numbers = Range(low, high, low_open)
    expected = " or ".join([str(numbers), *map(repr, words)])

    def validate(value: Any) -> float | str:
        if isinstance(value, str) and value in words:
            return value
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (OverflowError, TypeError, ValueError):
            found = math.nan
        if found not in numbers or (whole and found % 1):
            raise UserError(f"{name} must be {'whole, ' if whole else ''}{expected}; got {value!r}")
        if abs(found) > _LARGEST:
            raise UserError(f"{name} must be within what float32 holds, {_LARGEST:.3g} at most; got {value!r}")
        return found

    return declared(name, validate, default, of, about, numbers=numbers, words=words)


def choice(name: str, *values: str, of: Of = "merge", about: str) -> ParameterSpec:
    """Declare one of a few words; the first is the default."""

    def validate(value: Any) -> str:
        if value not in values:
            raise UserError(f"{name} must be one of {', '.join(values)}; got {value!r}")
        return value

    return declared(name, validate, values[0], of, about, words=values)


def text(name: str, *, of: Of = "merge", about: str) -> ParameterSpec:
    """Declare a text, such as the path of a file; without it, it is empty."""

    def validate(value: Any) -> str:
        if not isinstance(value, str):
            raise UserError(f"{name} must be a text; got {value!r}")
        return value

    return declared(name, validate, "", of, about)
