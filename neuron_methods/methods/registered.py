"""The methods of this package, under their names in mergekit's registry."""

from __future__ import annotations


def register_methods() -> None:
    """Put our methods into mergekit's registry in this process. Idempotent."""
    from mergekit.merge_methods import registry

    from neuron_methods.methods.min_merging import MinMerging
    from neuron_methods.methods.neuro_merging import NeuroMerging
    from neuron_methods.methods.neuron_merge import NeuronMerge
    from neuron_methods.methods.neuron_response import NeuronResponse

    known = {method.spec.name for method in registry.registered_methods()}
    for method_class in (NeuronResponse, NeuroMerging, MinMerging, NeuronMerge):
        if method_class.spec.name not in known:
            registry.register(method_class())
