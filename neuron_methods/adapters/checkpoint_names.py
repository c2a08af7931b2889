"""From the names modules have in memory to the names of a checkpoint's tensors.

An adapter's keys are paths of modules in memory, at the time it was trained. A checkpoint may spell them otherwise:
transformers 5 renames modules of ViT, CLIP and others as it loads them, adapters trained under transformers 4 carry the
old paths, and a model with a head puts a prefix before what the body alone stores without one. In nearly all cases the
names agree as they stand; only where they do not is the architecture's class asked, through a model of it on torch's
meta device, which holds no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

import torch
from transformers import PretrainedConfig


class StoredNames:
    """Finds the tensors of one checkpoint by the names of the modules that hold them.

    Args:
        stored: names of the tensors in the checkpoint.
        config: reads the checkpoint's config; called only where the names do not agree as they stand.
    """

    def __init__(self, stored: Collection[str], config: Callable[[], PretrainedConfig]) -> None:
        self.stored = stored
        self._read_config = config

    def find(self, name: str) -> str | None:
        """Find the name in the checkpoint of a parameter.

        Args:
            name: path of the parameter in a model in memory, of transformers 4 or 5.

        Returns:
            None where the checkpoint has no such tensor, be it that it stores it in another form.
        """
        direct = _among(name, self.stored)
        if direct is not None or self.skeleton is None:
            return direct
        for spelling in (name, self.skeleton.renamed([name])[0][0]):
            found = _among(spelling, self._in_memory)
            if found is not None:
                return self._in_memory[found]
        return None

    def is_converted(self, name: str) -> bool:
        """Tell whether a parameter is made of several tensors of the checkpoint as the model is loaded."""
        return _among(name, [new for _, new, converted in self._renamed if converted]) is not None

    def path_of(self, stored: str) -> str | None:
        """Give the path in memory, under this transformers, of a stored tensor; None where it is only a part there.

        Args:
            stored: name in the checkpoint.
        """
        return self._paths.get(stored)

    def tied_to(self, name: str) -> tuple[str, ...]:
        """List the paths in memory of all parameters that are one with this one, itself too; none if it stands alone.

        Args:
            name: path in memory, or name in the checkpoint.
        """
        if self.skeleton is None:
            return ()
        for group in self.skeleton.ties:
            if _among(name, group) is not None or any(self.find(member) == name for member in group):
                return group
        return ()

    def is_output(self, name: str) -> bool:
        """Tell whether a parameter is the weight of the model's output embeddings."""
        return self.skeleton is not None and self.skeleton.output == name

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens in the model's config, None where it has none."""
        return getattr(self.config.get_text_config(), "vocab_size", None)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The checkpoint's config."""
        return self._read_config()

    @cached_property
    def skeleton(self) -> Skeleton | None:
        """What the architecture's class knows; None for one that transformers does not have."""
        return Skeleton.of(self.config)

    @cached_property
    def _in_memory(self) -> dict[str, str]:
        """{name in memory: name in the checkpoint} of the tensors that are loaded as they are stored."""
        return {new: old for old, new, converted in self._renamed if not converted}

    @cached_property
    def _paths(self) -> dict[str, str]:
        return {old: new for old, new, converted in self._renamed if not converted}

    @cached_property
    def _renamed(self) -> list[tuple[str, str, bool]]:
        """(name in the checkpoint, name in memory, whether it is only a part of what is in memory)."""
        if self.skeleton is None:
            return []
        from transformers.core_model_loading import dot_natural_key

        # In this order, as some of transformers' renamings depend on what they have met before.
        ordered = sorted(self.stored, key=dot_natural_key)
        return [(old, *new) for old, new in zip(ordered, self.skeleton.renamed(ordered), strict=True)]


class Skeleton:
    """Names, modules and ties of an architecture of transformers, without weights.

    Attributes:
        parameters: paths of the parameters, tied ones included, in the order of the model.
        model: the model itself, on the meta device.
        modules: {path: module} of it.
        ties: paths of the parameters that are one, the source first.
        output: path of the output embeddings' weight, None for a model without a head.
    """

    def __init__(self, model: Any) -> None:
        self.parameters = {name: True for name, _ in model.named_parameters(remove_duplicate=False)}
        self._prefix = model.base_model_prefix
        self.model = model
        self.modules: dict[str, torch.nn.Module] = dict(model.named_modules())
        groups: dict[str, list[str]] = {}
        for tied, source in getattr(model, "all_tied_weights_keys", {}).items():
            groups.setdefault(source, [source]).append(tied)
        self.ties = [tuple(group) for group in groups.values()]
        self.output = _name_of_output(model)

    @classmethod
    def of(cls, config: PretrainedConfig) -> Skeleton | None:
        """Build the skeleton of a config's architecture; None where transformers cannot build it."""
        import transformers

        architectures = config.architectures or [""]
        model_class = getattr(transformers, architectures[0], None)
        if model_class is None:
            return None
        try:
            with torch.device("meta"):
                return cls(model_class(config))
        except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return None

    def renamed(self, names: Collection[str]) -> list[tuple[str, bool]]:
        """Tell what transformers calls tensors of a checkpoint once they are loaded.

        Args:
            names: as a checkpoint spells them.

        Returns:
            (name in memory, whether other tensors of the checkpoint go into the same parameter) of each.
        """
        # transformers 5 keeps these functions for peft, which does the same with them.
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        renamed = []
        for name in names:
            new, converter = rename_source_key(name, renamings, converters, self._prefix, self.parameters)
            renamed.append((new, converter is not None))
        return renamed


def _among(name: str, names: Collection[str]) -> str | None:
    """`name` as it is found in `names`: as it stands, without its first part, or with one more part before it."""
    if name in names:
        return name
    first, _, rest = name.partition(".")
    if rest in names and not first.isdigit():
        return rest
    prefixes = {other.partition(".")[0] for other in names}
    found = [f"{prefix}.{name}" for prefix in prefixes if f"{prefix}.{name}" in names]
    return found[0] if len(found) == 1 else None


def _name_of_output(model: Any) -> str | None:
    # By its module: a tied parameter is one object with several names.
    try:
        output = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return next((f"{name}.weight" for name, module in model.named_modules() if module is output), None)
