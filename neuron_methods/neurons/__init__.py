"""Which tensors, axes and slices each MLP neuron of a model owns, for every family in the table `families`.

`neuron_map(config)` is the way in: its `layers` list the MLPs with their neurons, its `owner_of(tensor_name)` answers
for one tensor of a checkpoint, its module paths lead to the activations of a model in memory (`find_modules`).
"""

from neuron_methods.neurons.inference import infer_neurons
from neuron_methods.neurons.layers import (
    LayerModules,
    MlpLayer,
    NeuronMap,
    OwnedSlice,
    Ownership,
    find_modules,
    layer_of,
    neuron_map,
)

__all__ = [
    "LayerModules",
    "MlpLayer",
    "NeuronMap",
    "OwnedSlice",
    "Ownership",
    "find_modules",
    "infer_neurons",
    "layer_of",
    "neuron_map",
]
