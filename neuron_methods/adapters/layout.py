"""What an adapter's file does to each tensor of its base, found from names and shapes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_methods.adapters.completeness import refuse_half, refuse_incomplete
from neuron_methods.adapters.config import CONFIG_NAME, AdapterConfig
from neuron_methods.adapters.keys import AdaptedModule, sort_keys
from neuron_methods.adapters.loader import BaseCheckpoint
from neuron_methods.adapters.own_head import OwnHead, find_own_head
from neuron_methods.adapters.updates import Dora, Layout, LowRank, Replacement, Rows, Shift, Step, TensorUpdate
from neuron_methods.adapters.weights_file import AdapterWeights
from neuron_methods.support.errors import UserError, explained_by
from neuron_methods.support.text import listed

Shape = tuple[int, ...]

# Modules that are `Conv1D` of transformers, with weights (in, out), by model_type.
_TRANSPOSED = {
    "gpt2": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
    "imagegpt": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "decision_transformer": ("c_attn", "c_proj", "c_fc", "q_attn"),
}


class NeedsPeft(Exception):
    """The adapter cannot be formed tensor by tensor; the message says why."""


@dataclass(frozen=True)
class Located:
    """A parameter of a module in the base's checkpoint.

    Attributes:
        name: what the expert's tensor is called.
        origin: the base's tensor that holds it; another name where the base ties the two and stores one.
        shape: of the base's tensor.
    """

    name: str
    origin: str
    shape: Shape


@dataclass(frozen=True)
class AdapterLayout:
    """What an adapter does to its base.

    Attributes:
        updates: {name of a tensor: what is done to it}.
        untied: {tensor the base does not store: tensor it is tied to there}, for what the adapter unties.
        head: that it brings along.
    """

    updates: dict[str, TensorUpdate]
    untied: dict[str, str]
    head: OwnHead | None = None


@explained_by("adapters")
def lay_out(config: AdapterConfig, file: AdapterWeights, base: BaseCheckpoint) -> AdapterLayout:
    """Find what an adapter does to each tensor of its base. Of values, only those of possibly tied tensors are read.

    Args:
        config: its adapter_config.json.
        file: its weights.
        base: its base.

    Raises:
        UserError: the adapter does not fit the base, or its two files do not fit each other.
        NeedsPeft: it fits, but what it does cannot be told from names and shapes.
    """
    return _Builder(config, file, base).build()


class _Builder:
    def __init__(self, config: AdapterConfig, file: AdapterWeights, base: BaseCheckpoint) -> None:
        self.config, self.file, self.base, self.names = config, file, base, base.names
        self.steps: dict[str, list[Step]] = defaultdict(list)
        self.origins: dict[str, str] = {}
        self.untied: dict[str, str] = {}
        self.tied: dict[tuple[str, ...], dict[str, list[Step]]] = {}
        self.keeps_ties = bool(config.raw.get("ensure_weight_tying"))

    def build(self) -> AdapterLayout:
        modules, replaced = sort_keys(self.file.shapes)
        if not modules and not replaced:
            raise UserError(f"{self.file.where}: holds no tensors; save the adapter again")
        whole = list(replaced)
        head = self._own_head(replaced)
        replaced = {path: key for path, key in replaced.items() if head is None or path not in head.keys}
        self._refuse_missing(modules, replaced)
        refuse_incomplete(self.config, self.names.config, [module.path for module in modules], whole)
        for parameter, key in replaced.items():
            self._replace(self._find(parameter), key)
        for module in modules:
            self._adapt(module)
        for members, steps in self.tied.items():
            self._settle(members, steps)
        updates = {name: TensorUpdate(tuple(steps), self.origins[name]) for name, steps in self.steps.items()}
        return AdapterLayout(updates, self.untied, head)

    def _own_head(self, replaced: Mapping[str, str]) -> OwnHead | None:
        located = {path: self._locate(path) for path in replaced}
        misfits = {p: key for p, key in replaced.items() if not (at := located[p]) or at.shape != self.file.shapes[key]}
        return find_own_head(self.config, self.file, self.names.config, misfits) if misfits else None

    # --------------------------------------------------------------------------------- finding the base's tensors

    def _refuse_missing(self, modules: Sequence[AdaptedModule], replaced: Mapping[str, str]) -> None:
        wanted = [f"{m.path}.{(self._parameters_of(m) or ['weight'])[0]}" for m in modules] + list(replaced)
        wanted = list(dict.fromkeys(wanted))
        missing = [name for name in wanted if self._locate(name) is None]
        if not missing:
            return
        if any(self.names.is_converted(name) for name in missing):
            raise NeedsPeft(f"the base stores {missing[0]} in several tensors")
        paths = [name.removesuffix(".weight") for name in missing]
        if self.names.skeleton is not None and (packed := self.names.skeleton.modules.keys() & set(paths)):
            raise NeedsPeft(f"{min(packed)} carries factors, but has no weight of its own in the base")
        if len(missing) == len(wanted):
            example = next(iter(self.names.stored), "none")
            raise UserError(
                f"{self.file.where}: an adapter of another architecture: none of its {len(wanted)} modules is in "
                f"{self.base.where} (the first is {paths[0]}; the base has tensors such as {example}); merge it with "
                "the base it was trained on"
            )
        raise UserError(
            f"{self.file.where}: target modules missing in the base: {listed(paths)} "
            f"({len(missing)} of {len(wanted)} are not in {self.base.where}); merge "
            "it with the base it was trained on, head included"
        )

    def _locate(self, parameter: str) -> Located | None:
        found = self.names.find(parameter)
        if found is not None:
            return Located(found, found, self.base.shape(found))
        for member in self.names.tied_to(parameter):
            found = self.names.find(member)
            if found is not None:
                return Located(parameter, found, self.base.shape(found))
        return None

    def _find(self, parameter: str) -> Located:
        located = self._locate(parameter)
        if located is None:
            raise NeedsPeft(f"the base does not store {parameter} as one tensor")
        return located

    def _target(self, module: AdaptedModule, a: Shape, b: Shape) -> tuple[str, Located]:
        """(what the config's patterns are matched against, the tensor) that a module's factors belong to."""
        parameters = self._parameters_of(module)
        if not parameters:
            return module.path, self._find(f"{module.path}.weight")
        # The order in which peft nests several parameters of one module is not in the file; their shapes are.
        located = {name: self._find(name) for name in (f"{module.path}.{p}" for p in parameters)}
        fitting = {name: found for name, found in located.items() if _stacked_layout(a, b, found.shape)}
        if len(fitting) > 1:
            raise NeedsPeft(f"the factors of {module.path} fit more than one of its parameters")
        return next(iter((fitting or located).items()))

    def _parameters_of(self, module: AdaptedModule) -> list[str]:
        """Names of the parameters of a module that LoRA targets instead of the module."""
        targets = (target.rpartition(".") for target in self.config.target_parameters)
        return [name for owner, _, name in targets if f".{module.path}".endswith(f".{owner}")]

    # ----------------------------------------------------------------------------------------- tensors as a whole

    def _replace(self, located: Located, key: str) -> None:
        if self.file.shapes[key] != located.shape:
            raise self._mismatch(key, self.file.shapes[key], located)
        # With a targeted embedding's factors peft stores its own weights, too.
        if self._is_vocabulary(located) and _equal(self.file.tensor(key), self.base.tensor(located.origin)):
            return
        step, members = Replacement(self.file, key), self._one_with(located)
        if not members:
            self._add(located.name, located.origin, step)
            if located.name != located.origin:
                self.untied[located.name] = located.origin
        elif ".base_layer." in key or (self.keeps_ties and self._member(members, located) == members[0]):
            # Loaded into a parameter that is one with others, or given to all by peft.
            for member in members:
                self._steps_of(members, member).append(step)
        elif not self.keeps_ties:  # else the embedding brings the same values
            self._steps_of(members, self._member(members, located)).append(step)

    def _is_vocabulary(self, located: Located) -> bool:
        """Whether a tensor has a row per token, and so may be tied to others."""
        return len(located.shape) > 1 and located.shape[0] == self.names.vocabulary

    # ----------------------------------------------------------------------------------------------- LoRA modules

    def _adapt(self, module: AdaptedModule) -> None:
        keys = module.keys
        if "tokens" in keys:
            self._adapt_rows(module.path, keys["tokens"])
        if not keys.keys() - {"tokens"}:
            return
        refuse_half(self.file.where, [module])
        a, b = (keys[part] for part in module.factors)
        shape_a, shape_b = self.file.shapes[a], self.file.shapes[b]
        target, located = self._target(module, shape_a, shape_b)
        layout = self._layout(module, located)
        scaling = self._scaling(target, a, located.shape[0] if layout.startswith("experts") else 1)
        steps: list[Step] = [LowRank(self.file, a, b, scaling, layout, located.shape)]
        if "magnitude" in keys:
            axis = 1 if layout in ("transposed", "embedding") else 0
            if math.prod(self.file.shapes[keys["magnitude"]]) != located.shape[axis]:
                raise self._mismatch(keys["magnitude"], self.file.shapes[keys["magnitude"]], located)
            steps.append(Dora(self.file, keys["magnitude"], axis))
        self._add_tied(located, steps)
        if "bias" in keys:
            bias = self._locate(f"{module.path}.bias")
            if bias is None:
                raise UserError(
                    f"{self.file.where}: {keys['bias']} is a bias for a module without one in {self.base.where}, which "
                    "cannot be merged (by peft neither); train without lora_bias"
                )
            self._add(bias.name, bias.origin, Shift(self.file, keys["bias"], scaling))

    def _layout(self, module: AdaptedModule, located: Located) -> Layout:
        key, key_b = (module.keys[part] for part in module.factors)
        a, b, shape = self.file.shapes[key], self.file.shapes[key_b], located.shape
        if len(a) < 2 or len(b) < 2 or a[0] != b[1]:
            raise UserError(
                f"{self.file.where}: rank mismatch: {key} has shape {list(a)}, {key_b} has shape {list(b)}, and "
                f"{a[:1]} is not {b[1:2]}; save the adapter again"
            )
        formed = (b[0], *a[1:])
        layout: Layout | None = None
        if module.factors[0] == "embedding_A":
            formed = formed[::-1]
            layout = "embedding" if formed == shape else None
        elif len(a) > 2:
            layout = "convolution" if formed == shape and math.prod(b[2:]) == 1 else None
        elif len(shape) == 3:
            layout = _stacked_layout(a, b, shape)
        elif formed == shape == shape[::-1]:
            layout = "transposed" if self._is_transposed(module.path) else "linear"
        elif formed in (shape, shape[::-1]):
            layout = "linear" if formed == shape else "transposed"
        if layout is None:
            raise self._mismatch(key, formed, located)
        return layout

    def _is_transposed(self, path: str) -> bool:
        """Whether a square weight is kept (in, out).

        Where an adapter has modules of both kinds, its config tells only what the last of them was.
        """
        model_type = getattr(self.names.config, "model_type", None)
        leaves = _TRANSPOSED.get(model_type or "")
        return self.config.fan_in_fan_out if leaves is None else path.rpartition(".")[2] in leaves

    def _scaling(self, target: str, key: str, experts: int) -> float:
        rank, found = self.config.rank_of(target), self.file.shapes[key][0]
        if rank * experts != found:
            raise UserError(
                f"{self.file.where}: {key} has rank {found / experts:g}, but {CONFIG_NAME} says {rank} for {target}; "
                "the two files are not of one adapter"
            )
        return self.config.scaling_of(target)

    def _adapt_rows(self, path: str, key: str) -> None:
        located = self._find(f"{path}.weight")
        tokens = self.config.token_indices
        named = (indices for name, indices in tokens.items() if name and f".{path}".endswith(f".{name}"))
        indices = next(named, tokens.get("", ()))
        rows, shape = self.file.shapes[key], located.shape
        if rows != (len(indices), *shape[1:]) or any(not 0 <= index < shape[0] for index in indices):
            raise UserError(
                f"{self.file.where}: {key} has shape {list(rows)} for the {len(indices)} trainable_token_indices of "
                f"{CONFIG_NAME}, and {located.origin} of {self.base.where} is {list(shape)}; merge it with the base it "
                "was trained on"
            )
        self._add_tied(located, [Rows(self.file, key, indices)])

    # ---------------------------------------------------------------------------------------------------- results

    def _add(self, name: str, origin: str, *steps: Step) -> None:
        self.origins.setdefault(name, origin)
        self.steps[name].extend(steps)

    def _add_tied(self, located: Located, steps: Sequence[Step]) -> None:
        """Add steps to what one module computes with; the others that its tensor is tied to are settled at the end."""
        if members := self._one_with(located):
            self._steps_of(members, self._member(members, located)).extend(steps)
        else:
            self._add(located.origin, located.origin, *steps)

    def _one_with(self, located: Located) -> tuple[str, ...]:
        """Paths of the parameters that are one with a token embedding in memory, itself too; none if it is alone."""
        if not self._is_vocabulary(located):
            return ()
        group = self.names.tied_to(located.origin)
        stored = {member: self.names.find(member) for member in group}
        home = next((name for name in stored.values() if name is not None), None)
        # transformers does not tie what is stored with values of its own.
        members = tuple(m for m, name in stored.items() if name in (None, home) or self._copies(name, home))
        return members if any(stored[m] == located.origin for m in members) and len(members) > 1 else ()

    def _copies(self, name: str, home: str) -> bool:
        return self.base.shape(name) == self.base.shape(home) and _equal(self.base.tensor(name), self.base.tensor(home))

    def _member(self, members: Sequence[str], located: Located) -> str:
        found = self.names.among(located.name, members)
        if found is None:
            raise NeedsPeft(f"{located.name} is tied in the base under another name")
        return found

    def _steps_of(self, members: tuple[str, ...], member: str) -> list[Step]:
        return self.tied.setdefault(members, {m: [] for m in members})[member]

    def _settle(self, members: Sequence[str], steps: dict[str, list[Step]]) -> None:
        """Untie what an adapter changes differently.

        In memory peft applies its factors where a module computes, to no other that shares the module's weight; only
        `merge_and_unload` (peft 0.21) adds them to the one tensor, as often as there are modules with factors.
        """
        source, *others = members
        rows = [step for step in steps[source] if isinstance(step, Rows)]
        if rows and not any(isinstance(step, Rows) for member in others for step in steps[member]):
            for member in others:  # rows of tokens are those of all, unless they are named for each
                steps[member][:0] = rows  # below the member's own factors
        stored = {member: self.names.find(member) for member in members}
        keeper, home = next((member, name) for member, name in stored.items() if name is not None)
        for member, name in stored.items():
            if name is None and not _alike(steps[member], steps[keeper]):
                self.untied[member] = home
            if steps[member] and (name is not None or member in self.untied):
                self._add(name or member, name or home, *steps[member])

    def _mismatch(self, key: str, found: Shape, located: Located) -> UserError:
        where, stored, shape = self.file.where, located.origin, located.shape
        if self._is_vocabulary(located) and len(found) == len(shape) and found[1:] == shape[1:]:
            return UserError(
                f"{where}: trained on a resized vocabulary: {key} is for {found[0]} tokens, {stored} of "
                f"{self.base.where} has {shape[0]}; resize the base's embeddings as for the training, save it, and "
                "name it as the base"
            )
        return UserError(
            f"{where}: an adapter of another base size: {key} makes an update of shape {list(found)}, but {stored} of "
            f"{self.base.where} has {list(shape)}; merge it with the base it was trained on"
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other.dtype), other)


def _alike(some: Sequence[Step], others: Sequence[Step]) -> bool:
    return len(some) == len(others) and all(one.equals(other) for one, other in zip(some, others, strict=True))


def _stacked_layout(a: Shape, b: Shape, shape: Shape) -> Layout | None:
    """How a parameter keeps its weights, given factors of shapes (experts · r, in) and (out, r · experts)."""
    if len(a) != 2 or len(b) != 2 or len(shape) not in (2, 3):
        return None
    if len(shape) == 2:
        return "linear" if (b[0], a[1]) == shape else None
    if a[0] % shape[0]:
        return None
    if (b[0], a[1]) == shape[1:] == shape[:0:-1]:
        raise NeedsPeft("the experts' matrices are square, and shapes do not tell how they are kept")
    if (b[0], a[1]) == shape[1:]:
        return "experts"
    return "experts_transposed" if (a[1], b[0]) == shape[1:] else None
