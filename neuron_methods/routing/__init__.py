"""MIN-Merging's routed model: experts stay adapters, a router looks at the input, layers are merged for it.

Liang, arXiv:2510.17890. `build_routed_model` makes one from a YAML (enhancement of every expert, router, out-of-domain
threshold), `NeuronRoutedModel` loads and runs it. `is_routed` tells whether a directory holds one.
"""

from typing import TYPE_CHECKING

from neuron_methods.support.exports import lazily

if TYPE_CHECKING:
    from neuron_methods.routing.build import build_routed_model
    from neuron_methods.routing.model import NeuronRoutedModel
    from neuron_methods.routing.routed_files import is_routed
    from neuron_methods.routing.routes import Routing

__all__ = ["NeuronRoutedModel", "Routing", "build_routed_model", "is_routed"]

# Imported on first use: who only asks whether a directory is routed needs no torch.
__getattr__ = lazily(
    __name__,
    {
        "NeuronRoutedModel": "neuron_methods.routing.model",
        "Routing": "neuron_methods.routing.routes",
        "build_routed_model": "neuron_methods.routing.build",
        "is_routed": "neuron_methods.routing.routed_files",
    },
)
