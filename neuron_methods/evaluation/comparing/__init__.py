"""Several methods on the same models and tasks, each with the same budget of tuning: which one for these models?

`compare` is the whole of it, as `mergekit-neuron compare` runs it.
"""

from neuron_methods.evaluation.comparing.contenders import Contender, contenders
from neuron_methods.evaluation.comparing.rows import Rows, best_point
from neuron_methods.evaluation.comparing.statistics import Spread, paired_difference, spread
from neuron_methods.evaluation.comparing.study import CompareSettings, Comparison, compare

__all__ = [
    "CompareSettings",
    "Comparison",
    "Contender",
    "Rows",
    "Spread",
    "best_point",
    "compare",
    "contenders",
    "paired_difference",
    "spread",
]
