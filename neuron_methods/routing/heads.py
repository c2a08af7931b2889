"""Heads of their own: every expert's classifier, and which of them answers for a sample.

A sample is answered by the head of the first expert of its routing; one that no expert claims, by the base's own. The
logits are as wide as all heads together: the chosen head's stand at its places, -Inf at all others'. So softmax over
all classes is softmax over those of the chosen head, the largest logit names expert and label at once, and a batch may
mix samples of heads of any sizes. This layout is ours, as is what becomes of a sample that nobody claims.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from neuron_methods.models.skeleton import Skeleton
from neuron_methods.routing.routed_files import RoutedConfig, RoutedExpert, head_file
from neuron_methods.routing.stored import read_tensors
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import file_in_place_after
from neuron_methods.support.text import listed, unknown

#: What the base's own head is called: no expert can bear the name.
BASE = "base model"
#: Attribute of a config that lists its heads: (name, first class, end of its classes).
ATTRIBUTE = "routed_heads"
_PLACEHOLDER = "LABEL_"  # transformers' names of classes that have none


@dataclass(frozen=True)
class Classes:
    """All classes of a routed model, counted over its heads.

    Attributes:
        heads: names of the experts that have one, in their order, and `BASE` last, if the base has one.
        labels: of each head, in the order of its outputs.
        of_expert: expert -> index of the head that answers for it, in the experts' order.
    """

    heads: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    of_expert: Mapping[str, int]

    @classmethod
    def of(cls, experts: Sequence[RoutedExpert], architecture: str, base: PretrainedConfig, where: str) -> Classes:
        """Count them.

        Args:
            experts: of the routed model.
            architecture: class that their heads are of.
            base: the base's config; its own head is one of them, if it is of that class.
            where: for messages.

        Raises:
            UserError: an expert has no head, and the base has none either.
        """
        with_head = [expert for expert in experts if expert.head_labels is not None]
        heads, labels = [e.name for e in with_head], [tuple(e.head_labels or ()) for e in with_head]
        if architecture in (base.architectures or [])[:1]:
            heads.append(BASE)
            labels.append(tuple(str(base.id2label[number]) for number in range(base.num_labels)))
        elif len(with_head) < len(experts):
            lacking = next(expert.name for expert in experts if expert.head_labels is None)
            raise UserError(
                f"{where}: expert {lacking}: it has no head of its own, and neither has the base, a "
                f"{(base.architectures or ['model'])[0]}; train it with its head in modules_to_save"
            )
        of_expert = {e.name: heads.index(e.name if e.head_labels is not None else BASE) for e in experts}
        return cls(tuple(heads), tuple(labels), of_expert)

    def chosen(self, weights: Tensor) -> Tensor:
        """Tell by which head each sample is answered, int64 (B,), from its experts' weights (B, E).

        One without experts is answered by the base's own, and there are none where it has none.
        """
        first = torch.tensor(list(self.of_expert.values()))[weights.argmax(dim=1).cpu()]
        return first if self.own is None else torch.where(weights.any(dim=1).cpu(), first, self.own)

    @property
    def spans(self) -> list[slice]:
        """Which classes are whose."""
        ends = list(accumulate(map(len, self.labels)))
        return [slice(end - len(labels), end) for end, labels in zip(ends, self.labels, strict=True)]

    @property
    def own(self) -> int | None:
        """Index of the base's own head; None where it has none."""
        return len(self.heads) - 1 if self.heads[-1] == BASE else None

    @property
    def names(self) -> list[str]:
        """Name all classes, by their labels; one that has no name of its own goes by its head."""
        return [
            f"{head}: {label}" if label.startswith(_PLACEHOLDER) else label
            for head, labels in zip(self.heads, self.labels, strict=True)
            for label in labels
        ]

    def config(self, base: PretrainedConfig) -> PretrainedConfig:
        """Make the config of a model of all these classes; of a label that several heads have, the first class counts.

        What heads there are stands in its attribute `ATTRIBUTE`.
        """
        config = _labelled(base, self.names)
        setattr(config, ATTRIBUTE, [(h, s.start, s.stop) for h, s in zip(self.heads, self.spans, strict=True)])
        return config

    def config_of(self, head: int, base: PretrainedConfig) -> PretrainedConfig:
        """Make the config of a model of one head alone."""
        return _labelled(base, self.labels[head])


def _labelled(base: PretrainedConfig, labels: Sequence[str]) -> PretrainedConfig:
    config = copy.deepcopy(base)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in reversed(list(enumerate(labels)))}
    return config


def shapes_of_head(model: type, base: PretrainedConfig, classes: int) -> dict[str, list[int]]:
    """Tell the tensors of the head that a class of transformers has for so many classes: {path in memory: shape}."""
    skeleton = Skeleton.build(model, _labelled(base, [str(number) for number in range(classes)]))
    return {path: list(t.shape) for path, t in skeleton.tensors.items() if skeleton.in_body(path) is None}


class HeadBank:
    """Stands in the place of a model's head, and lets each sample through its own.

    Attributes:
        classes: of all heads.
        tensors: name of an expert -> its head's, by their paths in memory.
    """

    def __init__(self, model: Any, classes: Classes, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put the heads into a model; its own stays where `classes` says that it has one, and is lost else."""
        self.classes, self.tensors = classes, {name: dict(of_head) for name, of_head in tensors.items()}
        # By itself the base answers by its own head. A context variable, as for the mixtures: two threads do not mix up
        # their samples. The dispatchers get its method: copying the model must not copy it.
        self._chosen: ContextVar[Tensor | int | None] = ContextVar("head", default=classes.own)
        children = [name for name, _ in model.named_children()]
        paths = shapes_of_head(type(model), model.config, 2)
        modules = sorted({path.partition(".")[0] for path in paths}, key=children.index)
        for name in modules:
            own = getattr(model, name)
            like = next(own.parameters())
            members = [
                own if head == BASE else _filled(model, name, len(labels), tensors[head]).to(like)
                for head, labels in zip(classes.heads, classes.labels, strict=True)
            ]
            is_last = name == modules[-1]
            setattr(model, name, _Dispatcher(members, classes.spans if is_last else None, self._chosen.get))

    @classmethod
    def load(cls, model: Any, config: RoutedConfig, directory: Path) -> HeadBank | None:
        """Read the heads of a routed model and put them into its base; None where its experts have none.

        Raises:
            UserError: a file is missing or damaged, or holds a head of another size than its labels say.
        """
        if config.architecture is None:
            return None
        classes = Classes.of(config.experts, config.architecture, model.config, str(directory))
        tensors = {
            name: read_tensors(head_file(directory, name), shapes_of_head(type(model), model.config, len(labels)))
            for name, labels in zip(classes.heads, classes.labels, strict=True)
            if name != BASE
        }
        return cls(model, classes, tensors)

    def configs(self, base: PretrainedConfig) -> dict[str, PretrainedConfig]:
        """Make the config of the model with each expert's head alone."""
        return {name: self.classes.config_of(head, base) for name, head in self.classes.of_expert.items()}

    def save(self, directory: Path) -> None:
        """Write each expert's head."""
        for name, tensors in self.tensors.items():
            place = head_file(directory, name)
            place.parent.mkdir(exist_ok=True)
            with file_in_place_after(place) as beside:
                save_file(tensors, beside, metadata={"format": "pt"})

    def fix(self, model: Any, name: str | None, where: str) -> None:
        """Leave one head in a copy of the model, which becomes a plain one of its class.

        Raises:
            UserError: no head is named, or one that is not there.
        """
        known = {**self.classes.of_expert, **({} if self.classes.own is None else {BASE: self.classes.own})}
        if name is None:
            raise UserError(f"{where}: several experts have a say in it; name one's: {', '.join(known)}")
        if name not in known:
            raise UserError(f"{where}: {unknown('expert', name, known)}")
        number = known[name]
        for child, module in list(model.named_children()):
            if isinstance(module, _Dispatcher):
                setattr(model, child, module.members[number])
        config = self.classes.config_of(number, model.config)
        model.config.id2label, model.config.label2id = config.id2label, config.label2id
        model.config.architectures = [type(model).__name__]
        model.num_labels = config.num_labels

    @contextmanager
    def using(self, chosen: Tensor | str) -> Iterator[None]:
        """Inside, the model answers by these heads.

        Args:
            chosen: int64 (B,), the index of each sample's head in `classes`: logits over all classes. The name of an
                expert, or `BASE`: by its head for every sample, and logits over the classes of that alone.
        """
        known = {**self.classes.of_expert, BASE: self.classes.own}
        token = self._chosen.set(known[chosen] if isinstance(chosen, str) else chosen.cpu())
        try:
            yield
        finally:
            self._chosen.reset(token)


class _Dispatcher(nn.Module):
    """One module of the head, once for every head."""

    def __init__(self, members: list[nn.Module], spans: list[slice] | None, chosen: Any) -> None:
        """With `spans` the outputs are laid out over all classes; else they are all of one size."""
        super().__init__()
        self.members, self.spans, self.chosen = nn.ModuleList(members), spans, chosen

    def forward(self, features: Tensor, *rest: Any, **named: Any) -> Tensor:
        chosen = self.chosen()
        if chosen is None:
            raise UserError("the base has no head of its own; call the routed model, or name a head")
        if isinstance(chosen, int):
            return self._of(chosen, features, *rest, **named)
        rows = chosen.expand(len(features)) if len(chosen) == 1 else chosen
        if len(rows) != len(features):
            problem = f"the routing is of {len(rows)} samples, but a batch of {len(features)} came through the model"
            raise UserError(problem)
        result: Tensor | None = None
        for head in rows.unique().tolist():
            mine = (rows == head).to(features.device)
            found = self._of(head, features[mine], *rest, **named)
            if result is None:
                width = found.shape[-1] if self.spans is None else self.spans[-1].stop
                result = found.new_full((len(features), *found.shape[1:-1], width), float("-inf"))
            result[mine, ..., slice(None) if self.spans is None else self.spans[head]] = found
        assert result is not None
        return result

    def _of(self, head: int, features: Tensor, *rest: Any, **named: Any) -> Tensor:
        member = self.members[head]
        like = next(member.parameters())
        return member(features.to(like.device, like.dtype), *rest, **named).to(features.device)


def _filled(model: Any, name: str, classes: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module of the head for so many classes, with its values."""
    labels = [str(number) for number in range(classes)]
    module = Skeleton.build(type(model), _labelled(model.config, labels)).model.get_submodule(name)
    values = {path.removeprefix(f"{name}."): value for path, value in tensors.items() if path.startswith(f"{name}.")}
    module.load_state_dict(values, assign=True)
    return module.requires_grad_(False).eval()


def check_labels(labels: list[str], classes: int, where: str) -> None:
    """Make sure that a head's labels are as many as its classes, and all different.

    Raises:
        UserError: they are not.
    """
    if len(labels) != classes:
        raise UserError(
            f"{where}: {len(labels)} labels, but the adapter's head has {classes} classes; name each of them"
        )
    if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise UserError(f"{where}: {listed(twice)} twice; give each class a name of its own")
