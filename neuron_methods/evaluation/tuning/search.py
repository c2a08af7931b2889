"""What is searched, ``NAME=LOW:HIGH:STEP`` and its kin, and in which order: grid, random, CMA-ES."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuron_methods.support.documents import parse_yaml
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import shortened

#: One setting of the searched parameters.
Point = dict[str, Any]

_SYNTAX = "NAME=LOW:HIGH:STEP, NAME=LOW:HIGH or NAME=VALUE,VALUE,..."
_MOST_POINTS = 100_000
_MOST_WORDS = 1000  # values of one parameter that are listed
_MOST_VALUES = 2**53  # of one parameter in steps; more cannot be told apart
_LARGEST = 1e30  # of a number that is searched; a weight of float32 times more is no number


@dataclass(frozen=True)
class Steps(Sequence[float]):
    """The values from `low` on in steps, made when they are asked for."""

    low: float
    step: float
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(self.count)))
        if not -self.count <= index < self.count:
            raise IndexError(index)
        digits = 10 - min(math.floor(math.log10(self.step)), 0)
        return round(self.low + index % self.count * self.step, digits)


@dataclass(frozen=True)
class Parameter:
    """One searched parameter: a list of values, or a range.

    Attributes:
        name: as the YAML has it; ``weight@EXPERT`` for one expert's.
        values: to choose from; None for a range without steps.
        low: lower end of a range.
        high: upper end.
    """

    name: str
    values: Sequence[Any] | None = None
    low: float | None = None
    high: float | None = None

    @property
    def is_range(self) -> bool:
        """Whether it was given as a range, which values in between belong to."""
        return self.low is not None

    def at(self, share: float) -> Any:
        """Give the value at a share, 0 to 1, of the way through a range; on a step, where there are steps."""
        if self.values is not None:
            return self.values[round(share * (len(self.values) - 1))]
        return round(self.low + share * (self.high - self.low), 6)

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values that stand for all in a check."""
        if self.low is None:
            return tuple(self.values)
        return (self.low, self.high if self.values is None else self.values[-1])


def parse_search(texts: Sequence[str]) -> list[Parameter]:
    """Read ``--search``.

    Raises:
        UserError: one is not readable or empty, or two name the same parameter.
    """
    parameters = [_parse(text) for text in texts]
    if not parameters:
        raise UserError(f"--search: name a parameter and where to look: {_SYNTAX}")
    names = [parameter.name for parameter in parameters]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--search {twice}: given twice; one range or list per parameter")
    return parameters


def _parse(text: str) -> Parameter:
    name, equals, given = text.partition("=")
    name, given = name.strip(), given.strip()
    if not equals or not name or not given:
        raise UserError(f"--search {text!r}: expected {_SYNTAX}")
    if "," not in given and given.count(":") in (1, 2):
        return _range(text, name, given.split(":"))
    shown = f"--search {shortened(text)}"
    if given.count(",") >= _MOST_WORDS:
        raise UserError(f"{shown}: {given.count(',') + 1} values; give fewer")
    values = [parse_yaml(part, shown) if part.strip() else None for part in given.split(",")]
    for value in values:
        if value is None or not isinstance(value, (str, int, float, bool)):
            raise UserError(f"{shown}: {shortened(value)} is no value; expected {_SYNTAX}")
        if isinstance(value, (int, float)) and not (abs(value) <= _LARGEST):
            raise UserError(f"{shown}: {shortened(value)}: expected a number no larger than {_LARGEST:g}")
    if len({key_of({"": value}) for value in values}) < len(values):
        raise UserError(f"{shown}: a value appears twice")
    return Parameter(name, tuple(values))


def _range(text: str, name: str, ends: list[str]) -> Parameter:
    try:
        low, high, *step = map(float, ends)
    except ValueError:
        raise UserError(f"--search {text!r}: a range is of numbers: {_SYNTAX}") from None
    if not all(abs(number) <= _LARGEST for number in (low, high, *step)):  # a NaN is not
        raise UserError(f"--search {text!r}: a range is of finite numbers, no larger than {_LARGEST:g}")
    if high < low or (step and step[0] <= 0) or (not step and high == low):
        raise UserError(f"--search {text!r}: an empty range; expected LOW below HIGH, and a STEP above 0")
    if not step:
        return Parameter(name, None, low, high)
    count = (high - low) / step[0] + 1e-9
    if count >= _MOST_VALUES:
        raise UserError(f"--search {text!r}: {count:.3g} values; give a larger step")
    return Parameter(name, Steps(low, step[0], math.floor(count) + 1), low, high)


def key_of(point: Mapping[str, Any]) -> str:
    """Tell points apart, whatever the order of their parameters; 1 and 1.0 are one value."""
    same = {k: float(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else v for k, v in point.items()}
    return json.dumps(same, sort_keys=True)


def show_point(point: Mapping[str, Any]) -> str:
    """Write a point in a line of text."""
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in point.items()
    )


class Strategy:
    """Proposes points, batch after batch, and hears what they were worth; here a list, all at once."""

    def __init__(self, points: list[Point]) -> None:
        self._points = points

    def batches(self) -> Iterator[list[Point]]:
        """Propose batches of points; `tell` is called between them."""
        yield self._points

    def tell(self, points: Sequence[Point], values: Sequence[float]) -> None:
        """Hear the objective of a batch's points."""


def _grid(parameters: Sequence[Parameter], budget: int) -> list[Point]:
    """Every combination, the first parameter slowest; no ranges without steps, no more points than the budget."""
    for parameter in parameters:
        if parameter.values is None:
            raise UserError(
                f"--search {parameter.name}: a grid needs steps: {parameter.low:g}:{parameter.high:g}:STEP "
                "(or --strategy random or cma)"
            )
    count = math.prod(len(parameter.values) for parameter in parameters)
    if count > budget:
        raise UserError(f"--budget {budget}: the grid has {count} points; take larger steps, or --strategy random")
    names = [parameter.name for parameter in parameters]
    combined = itertools.product(*(parameter.values for parameter in parameters))
    return [dict(zip(names, values, strict=True)) for values in combined]


class Drawn(Strategy):
    """Points drawn at random while they are tried, each once; fewer than the budget where there are no more."""

    def __init__(self, parameters: Sequence[Parameter], budget: int, seed: int) -> None:
        self._parameters, self._budget, self._seed = parameters, budget, seed

    def batches(self) -> Iterator[list[Point]]:
        """Propose up to a thousand points at a time: many that share parts of a merge, and no more than are needed."""
        points = self._points_at_random()
        while batch := list(itertools.islice(points, 1000)):
            yield batch

    def _points_at_random(self) -> Iterator[Point]:
        generator = random.Random(self._seed)
        known: set[str] = set()
        in_vain = 0  # draws since the last new point
        while len(known) < self._budget and in_vain < 50 * max(40, len(known)):
            point = {
                p.name: generator.choice(p.values) if p.values is not None else p.at(generator.random())
                for p in self._parameters
            }
            in_vain += 1
            if (key := key_of(point)) not in known:
                known.add(key)
                in_vain = 0
                yield point


class CmaEs(Strategy):
    """The covariance matrix adaptation evolution strategy of the library `cma` (Hansen, arXiv:1604.00772)."""

    def __init__(self, parameters: Sequence[Parameter], budget: int, seed: int) -> None:
        """Refuse parameters that are no ranges.

        Raises:
            UserError: one is a list, or the library is not installed.
        """
        for parameter in parameters:
            if not parameter.is_range:
                raise UserError(f"--search {parameter.name}: cma needs a range LOW:HIGH, not a list of values")
        try:
            import cma  # noqa: F401
        except ImportError:
            raise UserError("--strategy cma needs the package cma: pip install 'mergekit-neuron[tune]'") from None
        self._parameters, self._budget, self._seed = parameters, budget, seed

    def batches(self) -> Iterator[list[Point]]:
        """Propose one generation after the other, until the budget is spent or the search has converged."""
        import cma

        options = {"bounds": [0, 1], "seed": self._seed + 1, "verbose": -9, "verb_log": 0, "verb_disp": 0}
        # cma 4.5 fails in one dimension: a second one, which nothing depends on, does no harm.
        self._search = cma.CMAEvolutionStrategy([0.5] * max(len(self._parameters), 2), 0.25, options)
        left = self._budget
        while left > 0 and not self._search.stop():
            self._asked = self._search.ask()
            points = [
                {
                    parameter.name: parameter.at(float(share))
                    for parameter, share in zip(self._parameters, asked, strict=False)
                }
                for asked in self._asked
            ]
            if len(points) > left:  # a part of a generation tells the search nothing, but may hold the best point
                yield points[:left]
                return
            left -= len(points)
            yield points

    def tell(self, points: Sequence[Point], values: Sequence[float]) -> None:
        """Let the generation compete; the library minimises."""
        if len(values) == len(self._asked):
            self._search.tell(self._asked, [-value for value in values])


#: Points tried by strategies that could go on for ever, unless a budget is given.
DEFAULT_BUDGET = 40


def make_strategy(name: str, parameters: Sequence[Parameter], budget: int | None, seed: int) -> Strategy:
    """Make the strategy called ``grid``, ``random`` or ``cma``.

    Raises:
        UserError: it cannot search these parameters within the budget.
    """
    if name == "grid":
        return Strategy(_grid(parameters, _MOST_POINTS if budget is None else budget))
    if name not in ("random", "cma"):
        raise UserError(f"--strategy {name!r}: expected grid, random or cma")
    budget = DEFAULT_BUDGET if budget is None else budget
    return CmaEs(parameters, budget, seed) if name == "cma" else Drawn(parameters, budget, seed)
