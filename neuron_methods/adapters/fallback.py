"""Adapters that cannot be formed tensor by tensor: peft merges the one expert into a temporary directory."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import warnings
from typing import Any

import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from torch import Tensor

from neuron_methods.adapters.config import AdapterConfig, refuse_unknown
from neuron_methods.adapters.live import merge_in_memory
from neuron_methods.adapters.loader import AdapterLoader, BaseCheckpoint
from neuron_methods.adapters.updates import Replacement, TensorUpdate
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import is_disk_full
from neuron_methods.support.memory import check_memory
from neuron_methods.support.quiet import quiet_transformers
from neuron_methods.support.text import first_line


class MergedTensors:
    """The tensors of a model that peft has merged, as a source for `Replacement`."""

    def __init__(self, directory: str) -> None:
        self._loader = LazyTensorLoader.from_disk(directory, lazy_unpickle=False)
        self.names = self._loader.index.tensor_paths

    def tensor(self, key: str) -> Tensor:
        """Read one tensor."""
        return self._loader.get_tensor(key)


def merge_with_peft(
    config: AdapterConfig,
    directory: str,
    base: BaseCheckpoint,
    base_path: str,
    base_revision: str | None,
    reason: str,
    trust_remote_code: bool = False,
) -> AdapterLoader:
    """Merge one expert with peft, in float32, and read the tensors it has changed from there.

    Args:
        config: the adapter's.
        directory: the adapter's local directory.
        base: the base's checkpoint.
        base_path: directory or repository to load the base from.
        base_revision: of the repository.
        reason: why it has to be, for the notes.
        trust_remote_code: passed to transformers.

    Raises:
        UserError: peft cannot merge adapters of this type, or not this one.
    """
    refuse_unmergeable(config)
    # peft merges in the model's memory, one layer's update at a time.
    entries = sum(base.header(name).entries for name in base.loader.index.tensor_paths)
    advice = "merge the adapter into its base elsewhere, and name the merged model"
    check_memory(5 * entries, f"{config.where}: peft has to merge it in float32, which", advice)
    merged = tempfile.mkdtemp(prefix="mergekit-neuron-adapter-")
    atexit.register(shutil.rmtree, merged, ignore_errors=True)
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _merge(directory, base, base_path, base_revision, merged, trust_remote_code)
    except Exception as error:  # whatever peft makes of a foreign config
        if is_disk_full(error):
            raise
        shutil.rmtree(merged, ignore_errors=True)
        raise UserError(
            f"{config.where}: peft cannot merge this {config.peft_type} adapter into {base.where} "
            f"({first_line(error)}); leave it out, or merge it with the base and the versions it was trained with"
        ) from None
    return _changed_tensors(config, base, MergedTensors(merged), reason)


def refuse_unmergeable(config: AdapterConfig) -> None:
    """Refuse the types of adapters that change no weights, by name.

    Raises:
        UserError: peft has no way to merge adapters of this type.
    """
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    refuse_unknown(config)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType[config.peft_type])
    if not hasattr(tuner, "merge_and_unload"):
        raise UserError(
            f"{config.where}: adapters of type {config.peft_type} change no weights, so there is nothing to merge; "
            "use LoRA or another type that peft can merge"
        )
    if config.raw.get("layer_replication"):
        raise UserError(f"{config.where}: layer_replication gives the base more layers; it cannot be merged")


def _merge(
    directory: str, base: BaseCheckpoint, base_path: str, revision: str | None, out: str, trust_remote_code: bool
) -> None:
    import transformers
    from mergekit.common import get_auto_cls
    from peft import PeftModel

    architecture = (base.names.config.architectures or [""])[0]
    model_class: Any = getattr(transformers, architecture, None) or get_auto_cls(architecture)
    model = model_class.from_pretrained(
        base_path, revision=revision, dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    adapted = PeftModel.from_pretrained(model, directory)
    merge_in_memory(adapted).save_pretrained(out)


def _changed_tensors(config: AdapterConfig, base: BaseCheckpoint, merged: MergedTensors, reason: str) -> AdapterLoader:
    updates: dict[str, TensorUpdate] = {}
    untied: dict[str, str] = {}
    for name in merged.names:
        origin = name
        if name not in base.loader.index.tensor_paths:
            origin = _tied(base, name)
            if origin in merged.names and torch.equal(merged.tensor(origin), merged.tensor(name)):
                continue
            untied[name] = origin
        if not _same(base.tensor(origin), merged.tensor(name)):
            updates[name] = TensorUpdate((Replacement(merged, name),), origin)
    return AdapterLoader(base, updates, untied, config.where, by_peft=reason)


def _tied(base: BaseCheckpoint, name: str) -> str:
    stored = (base.names.find(member) for member in base.names.tied_to(name))
    origin = next((found for found in stored if found is not None), None)
    if origin is None:
        raise UserError(f"{base.where}: merged with its adapter it has a tensor {name} that the base does not have")
    return origin


def _same(base: Tensor, merged: Tensor) -> bool:
    return base.shape == merged.shape and torch.equal(base.to(merged.dtype), merged)
