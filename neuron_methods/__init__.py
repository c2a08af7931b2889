"""Neuron-level model merging for mergekit.

Importing this package costs next to nothing: torch, transformers and mergekit load when something that needs
them is first used. `register()` makes the method names known to mergekit in the running process; after an
ordinary installation a start-up hook does so by itself (see `neuron_methods._autoload`).
"""

__version__ = "0.1.0"

# Public name -> module that defines it, imported on first use.
_EXPORTS = {
    "NeuronRoutedModel": "neuron_methods.routing.model",
    "UserError": "neuron_methods.support.errors",
    "merge_adapters": "neuron_methods.adapters.combine",
    "register": "neuron_methods.plugin.patches",
}

__all__ = ["NeuronRoutedModel", "UserError", "__version__", "merge_adapters", "register"]


def __getattr__(name: str) -> object:
    """Import a public name from its module on first use (PEP 562)."""
    module_name = _EXPORTS.get(name)
    if module_name is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(module_name), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
