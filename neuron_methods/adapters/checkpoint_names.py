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

from transformers import PretrainedConfig

from neuron_methods.models.skeleton import Skeleton


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
        for spelling in (name, self.skeleton.renamed([name])[name].path):
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

    def among(self, name: str, members: Collection[str]) -> str | None:
        """Find a parameter among paths in memory.

        Args:
            name: path of the parameter in a model in memory, of transformers 4 or 5, or name in the checkpoint.
            members: paths in memory, under this transformers.
        """
        spellings = [name, *filter(None, [self.path_of(name)])]
        if self.skeleton is not None:
            spellings.append(self.skeleton.renamed([name])[name].path)
        return next((found for found in (_among(spelling, members) for spelling in spellings) if found), None)

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
        return [(old, *new) for old, new in self.skeleton.renamed(self.stored).items()]


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
