"""A merged update as a LoRA adapter that peft loads: matrices factored, the rest stored as it is."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from neuron_methods.adapters.kept import Kept, Precision, kept_of
from neuron_methods.adapters.placement import (
    FACTORED,
    Place,
    layout_shape,
    place_parameter,
    saved_modules,
    target_names,
    task_type,
)
from neuron_methods.adapters.weights_file import SAFETENSORS_NAME
from neuron_methods.methods.contract import LowRankUpdate
from neuron_methods.models.headers import Header
from neuron_methods.models.skeleton import Skeleton
from neuron_methods.support.documents import read_object
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import listed

# Below this share of an update's energy, the adapter is another model than the merge.
ENERGY_WARNING = 0.9


@dataclass
class KindSummary:
    """What factoring did to the modules of one kind.

    Attributes:
        kind: last part of their paths.
        ranks: one per matrix.
        energy: Σ ‖ΔW‖².
        error: Σ ‖ΔW − B·A‖².
        answered: per matrix that a method has in factors itself: share of its responses, squared, that they keep.
    """

    kind: str
    ranks: list[int] = field(default_factory=list)
    energy: float = 0.0
    error: float = 0.0
    answered: list[float] = field(default_factory=list)

    @property
    def energy_kept(self) -> float:
        """Share of the energy that the factors keep."""
        return 1.0 - self.error / self.energy if self.energy > 0 else 1.0

    @property
    def answers_kept(self) -> float:
        """Mean share of the responses, squared, that the factors keep, of the matrices that have one."""
        return sum(self.answered) / max(len(self.answered), 1)

    @property
    def error_norm(self) -> float:
        """Frobenius norm of what the factors of all modules miss together."""
        return math.sqrt(self.error)

    def __str__(self) -> str:
        low, high = min(self.ranks), max(self.ranks)
        ranks = f"rank {low}" if low == high else f"rank {low} to {high}"
        responses = f"{100 * self.answers_kept:.2f} % of the responses' energy, " if self.answered else ""
        return (
            f"{self.kind}: {len(self.ranks)} matrices, {ranks}, {responses}{100 * self.energy_kept:.2f} % of the "
            f"energy, error norm {self.error_norm:.4g}"
        )


@dataclass
class AdapterSummary:
    """What an adapter keeps of a merged update.

    Attributes:
        kinds: per kind of module, in the order of the model.
        whole: paths of the modules stored whole.
        biases: number of biases stored.
        left_out: parameters that changed and that peft has no place for.
        notes: what the user should know.
        bytes: size of the tensors written.
    """

    kinds: list[KindSummary]
    whole: list[str]
    biases: int
    left_out: list[str]
    notes: list[str] = field(default_factory=list)
    bytes: int = 0

    @property
    def warnings(self) -> list[str]:
        """Where the adapter is not the merge."""
        lines = []
        # Where a method weighs directions by what they answer, those that it lets go may well be long.
        kept = [(k.answers_kept, f"{k.kind} {{:.1f}} % of what is answered") for k in self.kinds if k.answered]
        kept += [(k.energy_kept, f"{k.kind} {{:.1f}} %") for k in self.kinds if not k.answered]
        poor = [told.format(100 * share) for share, told in kept if share < ENERGY_WARNING]
        if poor:
            lines.append(
                f"less than {100 * ENERGY_WARNING:.0f} % of the update's energy is kept in {', '.join(poor)}; ask for "
                "a higher rank, or for energy"
            )
        if self.left_out:
            lines.append(f"not in the adapter, as peft has no place for it: {', '.join(self.left_out)}")
        return lines

    def __str__(self) -> str:
        lines = [str(kind) for kind in self.kinds]
        if self.whole:
            lines.append(f"stored whole: {listed(self.whole)}")
        if self.biases:
            lines.append(f"stored biases: {self.biases}")
        lines += self.notes
        lines += [f"warning: {line}" for line in self.warnings]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Factored:
    place: Place
    a: Tensor
    b: Tensor
    rank: int


class AdapterBuilder:
    """Takes what is kept of the merged tensors, one by one, and writes an adapter of it.

    Args:
        places: {tensor: place} of all that may come.
        precision: how to factor.
        allow_nonfinite: store tensors that hold NaN or Inf; no matrix that does can be factored.
        unchanged: paths in memory of what keeps the base's values, whatever becomes of what it is tied to.

    Attributes:
        written: {key in the adapter's file: header} of what `write` has written.
    """

    def __init__(
        self,
        places: Mapping[str, Place],
        precision: Precision,
        allow_nonfinite: bool = False,
        unchanged: Collection[str] = (),
    ) -> None:
        self.places = dict(places)
        self.unchanged = unchanged
        self.precision = precision
        self.allow_nonfinite = allow_nonfinite
        self.written: dict[str, Header] = {}
        self._factored: dict[str, _Factored] = {}
        self._kinds: dict[str, KindSummary] = {}
        self._whole: dict[str, Tensor] = {}
        self._biases: dict[str, Tensor] = {}
        self._left_out: list[str] = []

    def bytes_of(self, name: str, shape: Sequence[int]) -> int:
        """Tell how many bytes a tensor takes in the adapter, at most; at least, where ranks go by energy or factors.

        Args:
            name: as in `places`.
            shape: of the tensor.
        """
        place, entries = self.places[name], math.prod(shape)
        if not place.module:
            entries = 0
        elif place.kind in FACTORED:
            *_, outputs, inputs = layout_shape(torch.empty(tuple(shape), device="meta"), place.kind).shape
            least = 1 if self.precision.energy is not None else min(outputs, inputs)
            rank = min(self.precision.rank or least, outputs, inputs)
            entries = entries // (outputs * inputs) * rank * (outputs + inputs)
        return entries * self.precision.dtype.itemsize

    def look(self, name: str, base: Tensor, merged: Tensor, low_rank: LowRankUpdate | None = None) -> Kept | None:
        """Find what to keep of a tensor; see `kept.kept_of`."""
        place, nonfinite = self.places[name], self.allow_nonfinite
        return kept_of(name, place, self.precision, base, merged, low_rank, allow_nonfinite=nonfinite)

    def take(self, name: str, kept: Kept) -> None:
        """Take what is kept of one tensor; kinds are summed up in the order in which tensors come."""
        place = self.places[name]
        if not kept.tensors:
            self._left_out.append(place.path)
        elif "whole" in kept.tensors:
            (self._biases if place.kind == "bias" else self._whole)[place.path] = kept.tensors["whole"]
        else:
            rank = int(kept.figures["rank"])
            self._factored[place.path] = _Factored(place, kept.tensors["a"], kept.tensors["b"], rank)
            kind = self._kinds.setdefault(module_kind(place.path), KindSummary(module_kind(place.path)))
            kind.ranks.append(rank)
            kind.energy += kept.figures["energy"]
            kind.error += kept.figures["error"]
            kind.answered += [kept.figures["answered"]] if "answered" in kept.figures else []

    def write(
        self,
        directory: Path,
        skeleton: Skeleton,
        read_base: Callable[[str], Tensor],
        architecture: str,
        **config: Any,
    ) -> AdapterSummary:
        """Write adapter_config.json and adapter_model.safetensors.

        Args:
            directory: exists.
            skeleton: of the base.
            read_base: reads the base's parameter at a path in memory; for the rest of modules stored whole.
            architecture: class name of the base.
            **config: further fields of peft's `LoraConfig`: the base's name and revision.

        Raises:
            UserError: nothing has changed, or no matrix has.
        """
        if not self._factored:
            changed = "no matrix" if self._whole or self._biases else "nothing"
            raise UserError(f"the merge changes {changed}, and peft loads no such adapter; write it as a model instead")
        whole = saved_modules({path.rpartition(".")[0] for path in self._whole}, skeleton)
        shared = self._shared(skeleton)
        everywhere = {**self._factored, **shared}
        tensors = _factor_tensors(skeleton, everywhere)
        for path in (path for parameters in whole.values() for path in parameters):
            tensors[path] = self._whole[path] if path in self._whole else read_base(path)
        wrapped = {factored.place.module for factored in everywhere.values()}
        for path, bias in self._biases.items():
            module = path.rpartition(".")[0]
            tensors[f"{module}.base_layer.bias" if module in wrapped else path] = bias
        converted = {
            f"base_model.model.{path}": tensor.to(self.precision.dtype).contiguous() for path, tensor in tensors.items()
        }
        self.written = {key: Header.of(tensor) for key, tensor in converted.items()}
        save_file(converted, directory / SAFETENSORS_NAME, metadata={"format": "pt"})
        self._config(skeleton, everywhere, list(whole), architecture, config).save_pretrained(directory)
        _sort_modules(directory / "adapter_config.json")
        order = {name: position for position, name in enumerate(skeleton.parameters)}
        by_kind = {
            f.place.path: module_kind(f.place.path)
            for f in sorted(self._factored.values(), key=lambda f: order[f.place.path])
        }
        return AdapterSummary(
            kinds=[self._kinds[kind] for kind in dict.fromkeys(by_kind.values())],
            whole=list(whole),
            biases=len(self._biases),
            left_out=self._left_out,
            notes=_notes(shared.values()),
            bytes=sum(tensor.nbytes for tensor in converted.values()),
        )

    def _shared(self, skeleton: Skeleton) -> dict[str, _Factored]:
        """Factors of what changes with a tensor that it is tied to: peft applies factors to a module, not to a weight.

        Returns:
            {path in memory: factors}, of the modules that compute with an embedding of which the merge has made one.
        """
        settled = {place.path for place in self.places.values()} | set(self.unchanged)
        found = {}
        for factored in self._factored.values():
            for path in skeleton.tied_to(factored.place.path):
                there = place_parameter(skeleton, path)
                if path in settled or there.kind not in ("linear", "embedding"):
                    continue
                a, b = factored.a, factored.b
                if (there.kind == "embedding") != (factored.place.kind == "embedding"):
                    a, b = b.T, a.T
                found[path] = _Factored(there, a.clone(), b.clone(), factored.rank)
        return found

    def _config(
        self,
        skeleton: Skeleton,
        factored: Mapping[str, _Factored],
        whole: list[str],
        architecture: str,
        config: Mapping[str, Any],
    ) -> Any:
        from peft import LoraConfig

        modules = [f.place.module for f in factored.values() if f.place.parameter == "weight"]
        parameters = [f.place.path for f in factored.values() if f.place.parameter != "weight"]
        ranks = {f.place.module if f.place.parameter == "weight" else f.place.path: f.rank for f in factored.values()}
        ((default, _),) = Counter(ranks.values()).most_common(1)
        rank_pattern = {path: rank for path, rank in ranks.items() if rank != default}
        return LoraConfig(
            r=default,
            lora_alpha=default,  # a scaling of 1 in every module
            rank_pattern=rank_pattern,
            alpha_pattern=dict(rank_pattern),
            target_modules=target_names(modules, skeleton.modules),
            target_parameters=sorted(parameters) or None,
            modules_to_save=whole or None,
            bias="all" if self._biases else "none",
            fan_in_fan_out=any(f.place.kind == "transposed" for f in factored.values()),
            task_type=task_type(architecture),
            inference_mode=True,
            **config,
        )


def _factor_tensors(skeleton: Skeleton, factors: Mapping[str, _Factored]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    of_module: dict[str, list[_Factored]] = defaultdict(list)
    for path in skeleton.parameters:
        if path in factors:
            of_module[factors[path].place.module].append(factors[path])
    for module, factored in of_module.items():
        # peft wraps the parameters of one module one after the other, so that the last is outermost.
        for depth, one in enumerate(reversed(factored)):
            prefix = f"{module}{'.base_layer' * depth}"
            if one.place.kind == "embedding":
                tensors[f"{prefix}.lora_embedding_A"], tensors[f"{prefix}.lora_embedding_B"] = one.a, one.b
            else:
                tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = one.a, one.b
    return tensors


def _sort_modules(file: Path) -> None:
    """Put what peft 0.21 writes from a set into an order, so that the same adapter has the same bytes in every run."""
    content = read_object(file)
    if isinstance(content.get("target_modules"), list):
        content["target_modules"].sort()
    file.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def _notes(shared: Iterable[_Factored]) -> list[str]:
    return [
        f"{factored.place.path} is tied in the base, and has the factors of what it is tied to, as peft computes with "
        "them in one module each; merge_and_unload (peft 0.21) would add both to the one weight: merge it by a YAML"
        for factored in shared
    ]


def module_kind(path: str) -> str:
    """Name the kind of module a parameter belongs to, for summaries: the last part of the module's path."""
    return path.removesuffix(".weight").rpartition(".")[2]
