"""A model without weights: the class that a config names, on torch's meta device, and what it makes of stored names.

The names that transformers 5 has in memory are not those of most checkpoints: it renames, stacks and splits tensors as
it loads them. Its own functions for that, which it keeps for peft, are called here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.initialization import no_init_weights

from neuron_methods.support.errors import UserError
from neuron_methods.support.quiet import quiet_transformers
from neuron_methods.support.text import first_line


def model_class(config: PretrainedConfig, place: str | Path = "", *, trust_remote_code: bool = False) -> Any:
    """Find the class that a config names first; None where it is not to be had.

    Args:
        config: of a checkpoint.
        place: its directory or repository, where custom code lies.
        trust_remote_code: whether custom code may be run.
    """
    architecture = (config.architectures or [""])[0]
    if trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        for paths in (getattr(config, "auto_map", None) or {}).values():
            for path in paths if isinstance(paths, (list, tuple)) else [paths]:
                if path and path.rpartition(".")[2] == architecture:
                    return get_class_from_dynamic_module(path, str(place))
    return getattr(transformers, architecture, None) if architecture else None


class Renamed(NamedTuple):
    """What a stored tensor becomes in memory.

    Attributes:
        path: of the tensor in memory; the first, where it is split into several.
        converted: whether other stored tensors go into it too, or it is split.
    """

    path: str
    converted: bool


class Skeleton:
    """Names, modules and ties of a model, without weights.

    Attributes:
        model: on the meta device.
        parameters: paths of the parameters, tied ones included, in the order of the model.
        tensors: {path: tensor on the meta device} of all that a checkpoint may hold, persistent buffers included.
        modules: {path: module}.
        ties: paths of the parameters that are one, the source first.
        output: path of the output embeddings' weight, None for a model without a head.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.parameters = {name: True for name, _ in model.named_parameters(remove_duplicate=False)}
        self.tensors: dict[str, torch.Tensor] = model.state_dict()
        self.modules: dict[str, torch.nn.Module] = dict(model.named_modules())
        groups: dict[str, list[str]] = {}
        for tied, source in getattr(model, "all_tied_weights_keys", {}).items():
            groups.setdefault(source, [source]).append(tied)
        self.ties = [tuple(group) for group in groups.values()]
        output = _embeddings(model, "get_output_embeddings")
        # By its module: a tied parameter is one object with several names.
        self.output = next((f"{name}.weight" for name, module in self.modules.items() if module is output), None)

    @classmethod
    def build(cls, model: Any, config: PretrainedConfig) -> Skeleton:
        """Build a class's skeleton.

        Args:
            model: class of transformers, or of custom code.
            config: its config.

        Raises:
            UserError: the class cannot be built from this config.
        """
        try:
            with quiet_transformers(), torch.device("meta"), no_init_weights():
                built = model(config)
            built.tie_weights()
        except Exception as error:  # whatever the class of a foreign config raises
            raise cannot_be_built(model, config, error) from error
        return cls(built)

    @classmethod
    def of(cls, config: PretrainedConfig) -> Skeleton | None:
        """Build the skeleton of a config's architecture; None where transformers has it not, or cannot build it."""
        model = model_class(config)
        try:
            return None if model is None else cls.build(model, config)
        except UserError:
            return None

    def renamed(self, names: Iterable[str]) -> dict[str, Renamed]:
        """Tell what transformers calls tensors of a checkpoint once they are loaded.

        Args:
            names: as a checkpoint spells them.

        Returns:
            {stored name: what it becomes}, in natural order; a path that is not in `tensors` is one the class does not
            read.
        """
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix, found = self.model.base_model_prefix, {}
        # In this order, as some of transformers' renamings depend on what they have met before.
        for name in sorted(names, key=dot_natural_key):
            path, pattern = rename_source_key(name, renamings, converters, prefix, self.tensors)
            if path not in self.tensors and name in self.tensors:
                path, pattern = rename_source_key(name, [], [], prefix, self.tensors)
            found[name] = Renamed(path, pattern is not None)
        return found

    @cached_property
    def vocabulary(self) -> set[str]:
        """Paths of the parameters whose first axis counts tokens: of the token embeddings and of the head."""
        return self._alike(_embeddings(self.model, f"get_{side}_embeddings") for side in ("input", "output"))

    @cached_property
    def token_embeddings(self) -> set[str]:
        """Paths of the tables of token embeddings, those of models within it too, and of what is tied to them."""
        # CLIP has none itself, but its text model has.
        models = [module for module in self.modules.values() if isinstance(module, transformers.PreTrainedModel)]
        tables = [_embeddings(model, "get_input_embeddings") for model in models]
        return self._alike(table for table in tables if isinstance(table, torch.nn.Embedding))

    def _alike(self, modules: Iterable[Any]) -> set[str]:
        """Paths of all parameters of some embeddings, under each of their names."""
        counted = {
            id(parameter)
            for module in modules
            if isinstance(module, (torch.nn.Embedding, torch.nn.Linear))
            for parameter in module.parameters()
        }
        named = self.model.named_parameters(remove_duplicate=False)
        return {name for name, parameter in named if id(parameter) in counted}

    @cached_property
    def statistics(self) -> set[str]:
        """Paths of what norms over a batch measure, and nobody learns: running means and variances, counts."""
        norms = ((path, m) for path, m in self.modules.items() if isinstance(m, torch.nn.modules.batchnorm._NormBase))
        return {f"{path}.{name}" for path, module in norms for name, _ in module.named_buffers(recurse=False)}

    @cached_property
    def body(self) -> Skeleton:
        """The class's own backbone, such as the `ViTModel` of a ViT that classifies; this one, if it is a backbone."""
        own = self.model.base_model
        return self if own is self.model else Skeleton(own)

    def in_body(self, path: str) -> str | None:
        """Give the path that a tensor of this class has within `body`; None for one of a head.

        Args:
            path: in `tensors`. Of tied parameters each stands for the first, and none of them is a head's if one lies
                within the backbone.
        """
        prefix = "" if self.body is self else f"{self.model.base_model_prefix}."
        alike = self.tied_to(path) or (path,)
        within = next((name.removeprefix(prefix) for name in alike if name.startswith(prefix)), None)
        return within and next(iter(self.body.tied_to(within)), within)

    def tied_to(self, path: str) -> tuple[str, ...]:
        """Paths of all parameters that are one with this one, itself included; empty if it stands alone."""
        return next((group for group in self.ties if path in group), ())


def cannot_be_built(model: Any, config: PretrainedConfig, error: Exception) -> UserError:
    """Make the error about a config that its class does not take; it names where the config was read from."""
    place = getattr(config, "name_or_path", "")
    where = f"{place}: " if isinstance(place, str) and place else ""
    return UserError(f"{where}{model.__name__} cannot be built from its config: {first_line(error)}")


def _embeddings(model: Any, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # which transformers raises for a model that reads no tokens
        return None


def unread(skeleton: Skeleton, names: Collection[str]) -> list[str]:
    """The stored names that a class does not read."""
    return [name for name, new in skeleton.renamed(names).items() if new.path not in skeleton.tensors]
