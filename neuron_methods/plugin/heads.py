"""What becomes of the heads of a merge's models: `mergekit-neuron merge --head`.

Experts for different tasks have heads of different sizes, or of the same size and for different labels, and no method
can merge those. Then the bodies are merged, as far as all models have them, and the head is one model's, or none is
written, or each expert's is kept in a file of its own. What lies outside of a class's `base_model` is the head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.architecture.base import ModelArchitecture
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from neuron_methods.models.model_files import HEADS
from neuron_methods.plugin.head_members import Member, class_name, find_member, named_member, own_head, path_of
from neuron_methods.plugin.preflight import MergePlan
from neuron_methods.plugin.session import MergeSession
from neuron_methods.plugin.stored_architecture import stored_architecture
from neuron_methods.plugin.structure import different_architectures
from neuron_methods.support.documents import read_object
from neuron_methods.support.errors import UserError, explained_by
from neuron_methods.support.files import write_json
from neuron_methods.support.finite import ADVICE, is_finite
from neuron_methods.support.local_names import local_names
from neuron_methods.support.text import listed

_WORDS = ("base", "drop", "keep")
# What a config says of a head that classifies.
_LABELS = ("id2label", "label2id", "num_labels", "problem_type")


class CopyHead(Task[Tensor]):
    """Load a tensor that is written as it is; with `check`, only if it is sound."""

    load: LoadTensor
    check: bool = True

    def arguments(self) -> dict[str, Task]:
        """Ask for the tensor."""
        return {"tensor": self.load}

    def group_label(self) -> str | None:
        """Stay with the file that holds it."""
        return self.load.group_label()

    def execute(self, tensor: Tensor) -> Tensor:
        """Pass it on; raises UserError where it holds NaN or Inf."""
        if self.check:
            _check_finite(self.load.model, self.load.tensor, tensor)
        return tensor


@dataclass
class Heads:
    """What becomes of the heads of one merge, whose bodies alone are merged.

    Attributes:
        base: that gives the output its config and body.
        owner: of the head and of what else is copied; the base where there is none to be written.
        kind: the output's class.
        architecture: of what is merged.
        merged: paths within the backbone of that.
        copied: names, as the owner stores them, of what is copied from it, and what they are called in the output.
        kept: {name of its file: expert} of the heads that are kept.
        notes: what the user should know.
        allow_nonfinite: keep heads with NaN or Inf.
    """

    base: Member
    owner: Member
    kind: str
    architecture: ModelArchitecture
    merged: Collection[str]
    copied: Mapping[str, str]
    kept: Mapping[str, Member] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    allow_nonfinite: bool = False

    def tasks(
        self, plan: MergePlan, dtype: str | None, session: MergeSession | None
    ) -> Iterable[tuple[WeightInfo, Task]]:
        """Plan the copies, and put them into the plan too.

        Args:
            plan: that tells what is written.
            dtype: of the output; None: each tensor as it is stored.
            session: of our command.
        """
        self.allow_nonfinite = session is not None and session.allow_nonfinite
        for stored, name in self.copied.items():
            header = self.owner.header(stored)
            written = dtype_from_name(dtype) if dtype and header.dtype.is_floating_point else header.dtype
            weight = WeightInfo(name=name, force_dtype=str(written).removeprefix("torch."))
            plan.tensors.append((weight, {self.owner.model: header}, header.entries * written.itemsize))
            yield (
                weight,
                CopyHead(load=LoadTensor(model=self.owner.model, tensor=stored), check=not self.allow_nonfinite),
            )

    def write(self, place: Path) -> None:
        """Let a written model's config.json say what class it is, and write the heads that are kept.

        Raises:
            UserError: a head that is kept holds NaN or Inf.
        """
        written = read_object(place / "config.json")
        if self.kind not in (self.base.kind, self.owner.kind):
            own = {key: value for key, value in written.items() if key not in _LABELS}
            write_json(place / "config.json", {**own, "architectures": [self.kind]}, indent=2)
        else:
            write_json(place / "config.json", self._config_of(self.owner, written), indent=2)
        for name, member in self.kept.items():
            (place / HEADS).mkdir(exist_ok=True)
            loader = LoaderCache().get(member.model)
            tensors = {}
            for stored in _unmerged(member, self.merged):
                tensor = loader.get_tensor(stored)
                if not self.allow_nonfinite:
                    _check_finite(member.model, stored, tensor)
                tensors[member.stored[stored].path] = tensor.contiguous()
            # Its labels go into the config: the order of several entries of metadata changes from run to run.
            save_file(tensors, place / HEADS / f"{name}.safetensors", {"format": "pt"})
            write_json(place / HEADS / f"{name}.json", self._config_of(member, written), indent=2)

    def _config_of(self, member: Member, written: Mapping[str, Any]) -> dict[str, Any]:
        """A member's config, with what the merge has changed of the base's: layers, vocabulary, dtype."""
        before, own = _plain(self.base.config), _plain(member.config)
        changed = {key: value for key, value in written.items() if before.get(key) != value and key not in _LABELS}
        return {**own, **changed, "architectures": [member.kind]}


def heads_of_merge(
    configuration: MergeConfiguration, options: MergeOptions, choice: str | None, name: str
) -> tuple[Heads | None, list[str]]:
    """Decide what becomes of the heads of a merge; its models must be open.

    Args:
        configuration: as read.
        options: mergekit's.
        choice: `base`, `drop`, `keep`, a model as the YAML names it, or its last part; None: heads are merged by the
            method where models are of one class, else the base's is kept; so is that of an adapter that is the first.
        name: of the YAML, for messages.

    Returns:
        (what becomes of them, None where the method merges them or there are none; notes on heads that are merged).

    Raises:
        UserError: the choice names no head that there is, or heads differ in shape and there is no choice.
    """
    models = configuration.referenced_models()
    base = configuration.base_model or models[0]
    architectures = {class_name(model, options) for model in models}
    if choice is None and len(architectures) == 1 and not _labels_differ(models, options):
        return None, []
    found = {model: find_member(model, options) for model in dict.fromkeys((base, *models))}
    strangers = [model for model, member in found.items() if member is None]
    members = {model: member for model, member in found.items() if member is not None}
    backbones = {type(member.skeleton.body.model) for member in members.values()}
    if choice is None and (strangers or (len(backbones) > 1 and options.allow_crimes)):
        return None, []
    if strangers:
        raise UserError(
            f"--head {choice}: {class_name(strangers[0], options)} of {strangers[0]} is not to be had from "
            "transformers, so nothing tells its head from its body; custom code needs --trust-remote-code"
        )
    if len(backbones) > 1:
        with explained_by("models"):
            raise UserError(different_architectures(configuration, options))
    if choice is None and len(architectures) == 1:
        labels = _compared(list(members.values()))
        # The config and definition of the checkpoint below know nothing of a head that an adapter brings along.
        if own_head(base) is None:
            return None, labels
    experts = [member for model, member in members.items() if model != configuration.base_model]
    heads = _decided(members[base], experts, choice, name, configuration.base_model is not None)
    builds = configuration.tokenizer or configuration.tokenizer_source
    for member, stored in [(heads.owner, n) for n in heads.copied] + [
        (m, n) for m in heads.kept.values() for n in m.head
    ]:
        if builds and member.stored[stored].path in member.skeleton.vocabulary:
            raise UserError(
                f"{name}: tokenizer: the head {stored} of {member.model} has a row per token, and one that is not "
                "merged keeps its rows; leave tokenizer out, or --head"
            )
    return heads, heads.notes


def _decided(base: Member, experts: list[Member], choice: str | None, name: str, has_base: bool) -> Heads:
    option = f"--head {choice}"
    everyone = [base, *(member for member in experts if member is not base)]
    with_head = [member for member in everyone if member.head]
    if not with_head:
        raise UserError(f"{option}: none of the models has a head: {base.model} is a {base.kind}; leave --head out")
    owner = base
    if choice == "base":
        if not has_base:
            raise UserError(f"{option}: {name} names no base_model; name one of its models")
        if not base.head:
            raise UserError(f"{option}: {base.model} is a {base.kind}, without a head; name an expert, drop or keep")
    elif choice is not None and choice not in _WORDS:
        owner = named_member(everyone, choice, _WORDS)
        if not owner.head:
            raise UserError(f"{option}: {owner.model} is a {owner.kind}, without a head; name another, drop or keep")
    files: dict[str, Member] = {}
    if choice == "keep":
        kept = [member for member in experts if member.head]
        if not kept:
            raise UserError(f"{option}: no expert has a head; --head base or drop")
        called = local_names(path_of(member) for member in kept)
        files = {called[path_of(member)]: member for member in kept}
    headless = choice in ("drop", "keep")
    kind = type(base.skeleton.body.model).__name__ if headless else owner.kind
    merged = set.intersection(*(set(member.body.values()) for member in everyone))
    # An adapter that brings its head along is of another class than the one its base is stored by.
    spelled = str if kind in base.config.architectures else _spelling(base, kind, headless)
    architecture = stored_architecture(
        base.config,
        base.skeleton.body,
        [stored for stored, path in base.body.items() if path in merged],
        [[stored for stored, path in m.body.items() if path in merged] for m in everyone if m is not base],
        spelled,
    )
    copied = {
        stored: spelled(stored) if owner is base and stored in base.body else stored
        for stored in _unmerged(owner, merged)
        if not headless or stored in base.body
    }
    heads = Heads(base, owner, kind, architecture, merged, copied, files)
    heads.notes += _told(heads, everyone, headless)
    return heads


def _told(heads: Heads, everyone: list[Member], headless: bool) -> list[str]:
    """What becomes of each head, and of what only some of the models have."""
    names = {id(member): name for name, member in heads.kept.items()}
    notes = []
    if headless:
        notes.append(f"bodies merged: a {heads.kind} without a head")
    elif heads.owner.head:
        notes.append(f"bodies merged: a {heads.kind} with the head of {heads.owner.shown}")
    else:
        notes.append(
            f"bodies merged: a {heads.kind}, without a head, as the base {heads.base.model}; --head gives it one"
        )
    if kept := [f"{HEADS}/{names[id(m)]}.safetensors of {m.shown}" for m in everyone if id(m) in names]:
        notes.append(f"heads kept: {listed(kept, len(kept))}")
    lost = [
        member
        for member in everyone
        if member.head and id(member) not in names and (headless or member is not heads.owner)
    ]
    if lost:
        notes.append(f"heads left out: {listed([member.shown for member in lost], len(lost))}")
    if rest := [stored for stored in heads.copied if stored in heads.owner.body]:
        notes.append(f"unchanged from {heads.owner.model}, as not all models store them: {listed(rest)}")
    for member in everyone:
        unread = sorted(set(LoaderCache().get(member.model).index.tensor_paths) - set(member.stored))
        unread += [n for n in _unmerged(member, heads.merged) if n in member.body and n not in heads.copied]
        if unread and id(member) not in names:
            notes.append(
                f"left out, as only some models store them or {heads.kind} does not read them: "
                f"{listed(unread)} of {member.model}"
            )
    return notes


def _unmerged(member: Member, merged: Collection[str]) -> list[str]:
    """The stored names of what a model's class reads and the merge does not make."""
    return [stored for stored in member.stored if member.body.get(stored) not in merged]


def _spelling(base: Member, kind: str, headless: bool) -> Callable[[str], str]:
    """How the output's class calls what the base stores; as it is, where its backbone has no plain prefix."""
    prefix = f"{base.skeleton.body.model.base_model_prefix}."
    stored = list(base.body)
    if headless and all(name.startswith(prefix) for name in stored):
        return lambda name: name.removeprefix(prefix)
    if not headless and not any(name.startswith(prefix) for name in stored):
        return lambda name: prefix + name
    return str


def _compared(members: list[Member]) -> list[str]:
    """Compare heads that the method is to merge; returns a note where they are for different labels."""
    first = members[0]
    for member in members[1:]:
        for stored in sorted(first.head, key=lambda name: not name.endswith("weight")):
            if stored not in member.stored or member.header(stored).shape == first.header(stored).shape:
                continue
            if stored not in first.skeleton.vocabulary:
                raise UserError(
                    f"{stored}: the heads differ in shape: {first.model} has {list(first.header(stored).shape)}, "
                    f"{member.model} has {list(member.header(stored).shape)}; say what becomes of them: --head base, "
                    "--head EXPERT (a model of the YAML), --head drop, or --head keep (each in a file of its own)"
                )
    named = [member for member in members if member.head and member.labels is not None]
    other = next((member for member in named if member.labels != named[0].labels), None)
    if other is None:
        return []
    return [
        f"heads for different labels are merged: {named[0].shown}, {other.shown}; --head keep, drop, base or EXPERT "
        "merges the bodies alone"
    ]


def _labels_differ(models: list[ModelReference], options: MergeOptions) -> bool:
    """Whether it is worth looking at heads at all."""
    if any(own_head(model) is not None for model in models):
        return True
    labels = [model.config(options.trust_remote_code).id2label for model in models]
    return any(found != labels[0] for found in labels)


def _plain(config: PretrainedConfig) -> dict[str, Any]:
    return json.loads(config.to_json_string())


def _check_finite(model: ModelReference, name: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise UserError(f"{name}: NaN or Inf in {model}; {ADVICE}")
