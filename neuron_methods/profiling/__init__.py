"""Neurons measured on data: statistics, exemplars, and the file that holds them.

`measure_profile` makes a profile, `NeuronProfile.load` reads one; see `profile_file` for what is in it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuron_methods.profiling.measuring import Settings, measure_profile
    from neuron_methods.profiling.profile_file import Exemplar, NeuronProfile

__all__ = ["Exemplar", "NeuronProfile", "Settings", "measure_profile"]

_EXPORTS = {
    "Exemplar": "neuron_methods.profiling.profile_file",
    "NeuronProfile": "neuron_methods.profiling.profile_file",
    "Settings": "neuron_methods.profiling.measuring",
    "measure_profile": "neuron_methods.profiling.measuring",
}


def __getattr__(name: str) -> Any:
    """Import on first use: who only reads a profile needs neither datasets nor accelerate."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)
