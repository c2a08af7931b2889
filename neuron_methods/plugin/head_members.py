"""A model of a merge as its class has it: what it stores of its backbone and of its head."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from neuron_methods.adapters.loader import AdapterLoader
from neuron_methods.adapters.own_head import OwnHead
from neuron_methods.models.headers import Header, HeaderFiles
from neuron_methods.models.skeleton import Renamed, Skeleton, model_class
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import listed, unknown


@dataclass(frozen=True)
class Member:
    """A model of the merge as its class has it.

    Attributes:
        model: its reference.
        skeleton: of its class.
        config: its own; of an adapter that brings its head along, with the labels of that.
    """

    model: ModelReference
    skeleton: Skeleton
    config: PretrainedConfig

    @cached_property
    def stored(self) -> dict[str, Renamed]:
        """{stored name: what it becomes} of the tensors that the class reads."""
        renamed = self.skeleton.renamed(LoaderCache().get(self.model).index.tensor_paths)
        return {name: new for name, new in renamed.items() if new.path in self.skeleton.tensors}

    @cached_property
    def body(self) -> dict[str, str]:
        """{stored name: path within the backbone} of what lies there."""
        paths = {name: self.skeleton.in_body(new.path) for name, new in self.stored.items()}
        return {name: path for name, path in paths.items() if path is not None}

    @cached_property
    def head(self) -> list[str]:
        """The stored names of the head's tensors."""
        return [name for name in self.stored if name not in self.body]

    @property
    def kind(self) -> str:
        """The class."""
        return type(self.skeleton.model).__name__

    @property
    def labels(self) -> list[str] | None:
        """Names of the labels in their order; None where the config has none but those that transformers makes up."""
        names = [str(name) for _, name in sorted(self.config.id2label.items())] if self.config.id2label else []
        made_up = all(name == f"LABEL_{index}" for index, name in enumerate(names))
        return None if made_up else names

    @property
    def shown(self) -> str:
        """The model, and what it is for."""
        if not self.head:
            return f"{self.model} (no head)"
        return (
            f"{self.model} ({listed(self.labels) if self.labels else f'{self.config.num_labels} labels without names'})"
        )

    def header(self, name: str) -> Header:
        """Read the header of a stored tensor."""
        loader = LoaderCache().get(self.model)
        return loader.header(name) if isinstance(loader, AdapterLoader) else HeaderFiles().behind(loader, name)


def find_member(model: ModelReference, options: MergeOptions) -> Member | None:
    """Look up a model's class, as it was trained; None where that is not to be had."""
    own = own_head(model)
    config = own.config if own is not None else model.config(options.trust_remote_code)
    built = (
        own.model
        if own is not None
        else model_class(config, model.model.path, trust_remote_code=options.trust_remote_code)
    )
    return None if built is None else Member(model, Skeleton.build(built, config), config)


def own_head(model: ModelReference) -> OwnHead | None:
    """Find the head that an adapter brings along, its base having none or one of another size."""
    loader = LoaderCache().get(model)
    return loader.head if isinstance(loader, AdapterLoader) else None


def class_name(model: ModelReference, options: MergeOptions) -> str:
    """Name a model's class, as it was trained."""
    own = own_head(model)
    return own.model.__name__ if own is not None else model.config(options.trust_remote_code).architectures[0]


def named_member(members: Sequence[Member], choice: str, others: Iterable[str] = ()) -> Member:
    """Find the model that `--head` names, as the YAML does or by its last part.

    Args:
        members: of the merge.
        choice: the name.
        others: what else may be chosen.

    Raises:
        UserError: there is none, or several are called so.
    """
    for name_of in (lambda member: str(member.model), path_of, lambda member: Path(path_of(member)).name):
        fitting = [member for member in members if os.path.normpath(name_of(member)) == os.path.normpath(choice)]
        if len(fitting) > 1:
            models = listed([member.model for member in fitting])
            raise UserError(f"--head {choice}: {models} are called so; name one as the YAML does")
        if fitting:
            return fitting[0]
    raise UserError(f"--head: {unknown('choice', choice, [*others, *(str(member.model) for member in members)])}")


def path_of(member: Member) -> str:
    """Give the path or repository of a model; of an adapter, its own."""
    return str(member.model.lora or member.model.model)
