"""From `base + adapter` in a merge's YAML to the loader that hands out its tensors."""

from __future__ import annotations

from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader

from neuron_methods.adapters.config import AdapterConfig
from neuron_methods.adapters.fallback import merge_with_peft, refuse_unmergeable
from neuron_methods.adapters.layout import NeedsPeft, lay_out
from neuron_methods.adapters.loader import AdapterLoader, BaseCheckpoint
from neuron_methods.adapters.patterns import check_patterns
from neuron_methods.adapters.weights_file import AdapterWeights, adapter_directory
from neuron_methods.support.errors import explained_by


@explained_by("adapters")
def open_adapter(
    model: ModelReference,
    base_loader: LazyTensorLoader,
    *,
    cache_dir: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> AdapterLoader:
    """Open a reference that has an adapter. Only headers are read, and values of tensors that may be tied.

    Args:
        model: with `lora`.
        base_loader: of the same reference without it.
        cache_dir: the hub's cache.
        allow_pickle: accept adapter_model.bin.
        trust_remote_code: passed to transformers where it has to be asked.

    Raises:
        UserError: no adapter there, files that are broken or do not fit each other or the base, or a type that cannot
            be merged.
    """
    assert model.lora is not None
    directory = adapter_directory(model.lora.path, model.lora.revision, cache_dir)
    config = AdapterConfig.read(directory, str(model.lora))
    refuse_unmergeable(config)
    file = AdapterWeights(directory, str(model.lora), allow_pickle)
    base = BaseCheckpoint(base_loader, str(model.model), lambda: model.config(trust_remote_code))
    check_patterns(config, _modules(base))
    reason = config.needs_peft()
    if reason is None:
        try:
            layout = lay_out(config, file, base)
        except NeedsPeft as error:
            reason = str(error)
        else:
            return AdapterLoader(base, layout.updates, layout.untied, str(model.lora), layout.head)
    path, revision = model.model.path, model.model.revision
    return merge_with_peft(config, directory, base, path, revision, reason, trust_remote_code)


def _modules(base: BaseCheckpoint) -> list[str]:
    """Paths of the base's modules: as transformers calls them, and as they are stored."""
    of_class = base.names.skeleton.modules if base.names.skeleton is not None else ()
    return [*of_class, *(name.rpartition(".")[0] for name in base.names.stored)]
