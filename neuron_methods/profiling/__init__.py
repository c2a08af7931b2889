"""Neurons measured on data: statistics, exemplars, and the file that holds them.

`measure_profile` makes a profile, `NeuronProfile.load` reads one; see `profile_file` for what is in it.
`measure_inputs` makes a file of the inputs of a model's modules, which `methods.inputs_file` reads.
"""

from typing import TYPE_CHECKING

from neuron_methods.support.exports import lazily

if TYPE_CHECKING:
    from neuron_methods.neurons.profile_file import Exemplar, NeuronProfile
    from neuron_methods.profiling.inputs import InputSettings, measure_inputs
    from neuron_methods.profiling.measuring import Settings, measure_profile

__all__ = ["Exemplar", "InputSettings", "NeuronProfile", "Settings", "measure_inputs", "measure_profile"]

#: How `groups` classifies by activations unless it is told otherwise: the share of its top activations that makes a
#: neuron a domain's, and the share of the domain's tokens that it has to fire on.
THRESHOLD, MIN_FIRING = 0.6, 0.001

# Imported on first use: who only reads a profile needs neither datasets nor accelerate.
__getattr__ = lazily(
    __name__,
    {
        "Exemplar": "neuron_methods.neurons.profile_file",
        "InputSettings": "neuron_methods.profiling.inputs",
        "NeuronProfile": "neuron_methods.neurons.profile_file",
        "Settings": "neuron_methods.profiling.measuring",
        "measure_inputs": "neuron_methods.profiling.inputs",
        "measure_profile": "neuron_methods.profiling.measuring",
    },
)
