"""Searching a merge's parameters on validation data.

`tune` is the whole of it, as `mergekit-neuron tune` runs it. `Recipe` and `Bench` try points of one's own choice in
memory, `find_parts` and `Parts` recombine what enters linearly.
"""

from neuron_methods.evaluation.tuning.bench import Bench
from neuron_methods.evaluation.tuning.objective import objective
from neuron_methods.evaluation.tuning.parts import NotAffine, Parts, find_parts
from neuron_methods.evaluation.tuning.recipe import Recipe
from neuron_methods.evaluation.tuning.search import Parameter, Point, make_strategy, parse_search
from neuron_methods.evaluation.tuning.study import TuneResult, TuneSettings, tune
from neuron_methods.evaluation.tuning.trace import Trial

__all__ = [
    "Bench",
    "NotAffine",
    "Parameter",
    "Parts",
    "Point",
    "Recipe",
    "Trial",
    "TuneResult",
    "TuneSettings",
    "find_parts",
    "make_strategy",
    "objective",
    "parse_search",
    "tune",
]
