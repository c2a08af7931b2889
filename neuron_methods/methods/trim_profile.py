"""Trim thresholds and σ of a whole merge: measured once by streaming, kept as a small JSON file.

Step 1 and the automatic scale of step 6 of NeuroMerging (arXiv:2503.05320, section 3) look at every entry of every
expert's task vector. Here the stream over the plan meets the search in `neuron_methods.kernels.trim`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from neuron_methods.kernels.devices import Crew
from neuron_methods.kernels.task_vectors import fill_task_vector
from neuron_methods.kernels.trim import ThresholdSearch, count_task_vectors
from neuron_methods.methods.contract import MergeSettings, PlannedTensor, nonfinite
from neuron_methods.support.documents import Given, read_json, validated
from neuron_methods.support.errors import UserError

FORMAT = "mergekit-neuron/trim-profile"
VERSION = 1
# The sample that brackets a threshold: runs of neighbouring entries, spread evenly over the model.
_RUN = 64
_RUNS = 8192
# Share of a tensor that is sampled at most: sorting a larger one costs more than the second pass it may save.
_SHARE = 1 / 16


class _ExpertEntry(Given):
    model: str
    density: float | str
    entries: Annotated[int, Field(ge=0)]
    threshold: Annotated[float, Field(ge=0)] | None
    sigma: Annotated[float, Field(ge=0, lt=1)]
    weights: str = ""
    voting: bool = True


class _TrimFile(Given):
    format: str
    version: int
    method: str
    trim: Literal["model", "tensor"]
    fingerprint: str
    base_weights: str = ""
    sigma: float | None
    lambda_orthogonal: float
    experts: list[_ExpertEntry]
    tensor_thresholds: dict[str, dict[str, Annotated[float, Field(ge=0)]]] = Field(default_factory=dict)


@dataclass(frozen=True)
class ExpertTrim:
    """What trimming does to one expert.

    Attributes:
        model: the expert as the YAML names it.
        density: share of entries kept; where it differs between tensors (`trim: tensor`), `varies-` and a hash of them.
        entries: number of entries of its task vector.
        threshold: smallest magnitude kept, None under `trim: tensor`.
        sigma: L1 norm of what trimming removes / L1 norm of the task vector.
        weights: digest of the expert's weights; "" where they are not in files.
    """

    model: str
    density: float | str
    entries: int
    threshold: float | None
    sigma: float
    weights: str = ""


@dataclass
class TrimProfile:
    """Thresholds and σ of all experts.

    Attributes:
        trim: `model` or `tensor`.
        experts: per expert id, empty where nothing had to be measured.
        voting: experts with a weight other than 0: σ is the largest of theirs.
        tensor_thresholds: under `trim: tensor`, {tensor name: {expert id: threshold}} as far as measured.
        fingerprint: of the names of the tensors measured.
        base_weights: digest of the base's weights; "" where they are not in files.
    """

    trim: str
    experts: dict[Hashable, ExpertTrim] = field(default_factory=dict)
    voting: list[Hashable] = field(default_factory=list)
    tensor_thresholds: dict[str, dict[Hashable, float]] = field(default_factory=dict)
    fingerprint: str = ""
    base_weights: str = ""

    @property
    def sigma(self) -> float | None:
        """σ = max_t σ_t over the voting experts; None where it was not measured."""
        return max((self.experts[e].sigma for e in self.voting), default=0.0) if self.experts else None

    def automatic_lambda(self, consensus: str) -> float:
        """Compute λ₂ without validation data: 1 / (1 − σ), or 1 where the experts' values are summed."""
        # σ rounds to 1 where trimming leaves less than float32 resolves.
        return 1.0 if consensus == "sum" else 1.0 / max(1.0 - (self.sigma or 0.0), 2.0**-24)

    def thresholds_for(self, name: str, experts: Mapping[Hashable, Tensor]) -> list[float] | None:
        """List the thresholds of a tensor's experts in their order, or None where they are still to be measured."""
        if self.trim == "model":
            return [self.experts[e].threshold or 0.0 for e in experts]
        known = self.tensor_thresholds.get(name)
        return [known[e] for e in experts] if known and known.keys() >= experts.keys() else None

    def to_json(self) -> str:
        """Write the profile as the text of a file."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "method": "neuro_merging",
            "trim": self.trim,
            "fingerprint": self.fingerprint,
            "base_weights": self.base_weights,
            "sigma": self.sigma,
            "lambda_orthogonal": self.automatic_lambda("mean"),
            "experts": [{**asdict(e), "voting": key in self.voting} for key, e in self.experts.items()],
        }
        if self.tensor_thresholds:
            names = {key: e.model for key, e in self.experts.items()}
            content["tensor_thresholds"] = {
                tensor: {names[key]: value for key, value in row.items()}
                for tensor, row in self.tensor_thresholds.items()
            }
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def read(cls, path: str, tensors: Sequence[PlannedTensor], experts: Sequence[Hashable]) -> TrimProfile:
        """Read what `--profile-out` wrote, and make sure that it is of this merge: its experts, its tensors that count.

        Who votes is up to the merge, whatever the weights were in the one that was measured.

        Raises:
            UserError: the file is missing, not a trim profile, of another version, or of another merge.
        """
        again = "write it again with --profile-out"
        content = read_json(path, "profile", format=FORMAT, version=VERSION, again=again)
        found = validated(content, _TrimFile, f"profile {path}", again)
        try:
            return cls._from_file(found, tensors, experts)
        except UserError as error:
            raise UserError(f"profile {path}: {error}; leave profile out, or {again}") from None

    @classmethod
    def _from_file(
        cls, content: _TrimFile, tensors: Sequence[PlannedTensor], experts: Sequence[Hashable]
    ) -> TrimProfile:
        profile = cls(tensors[0].parameters["trim"], fingerprint=fingerprint(tensors))
        if content.trim != profile.trim:
            raise UserError(f"measured with trim: {content.trim}, the merge asks for {profile.trim}")
        if content.fingerprint != profile.fingerprint:
            raise UserError("measured on other tensors than this merge writes")
        found = {entry.model: entry for entry in content.experts}
        profile.base_weights = content.base_weights
        _check_weights("the base", profile.base_weights, _weights_of(tensors, None))
        for expert in experts:
            entry = found.get(str(expert))
            if entry is None:
                raise UserError(f"no expert {expert} in it (found: {', '.join(found) or 'none'})")
            density = density_of(tensors, expert)
            if entry.density != density:
                raise UserError(f"{expert} was measured with density {entry.density}, the merge asks for {density}")
            if (entry.threshold is None) != (profile.trim == "tensor"):
                raise UserError(f"{expert}: threshold: found {entry.threshold} under trim: {profile.trim}")
            _check_weights(expert, entry.weights, _weights_of(tensors, expert))
            profile.experts[expert] = ExpertTrim(
                str(expert), density, entry.entries, entry.threshold, entry.sigma, entry.weights
            )
        by_name = {str(expert): expert for expert in experts}
        profile.tensor_thresholds = {
            tensor: {by_name[name]: float(value) for name, value in row.items() if name in by_name}
            for tensor, row in content.tensor_thresholds.items()
        }
        return profile


def fingerprint(tensors: Sequence[PlannedTensor]) -> str:
    """Hash the tensors' names, in any order, to a short text."""
    return hashlib.sha256("\n".join(sorted(t.name for t in tensors)).encode()).hexdigest()[:16]


def density_of(tensors: Sequence[PlannedTensor], expert: Hashable) -> float | str:
    """Find the density that an expert has in all tensors; `varies-` and a hash of them where it has several."""
    given = {t.name: t.expert_parameters["density"] for t in tensors}
    densities = {name: of_experts[expert] for name, of_experts in given.items() if expert in of_experts}
    if len(set(densities.values())) == 1:
        return next(iter(densities.values()))
    return "varies-" + hashlib.sha256(json.dumps(densities, sort_keys=True).encode()).hexdigest()[:8]


def _weights_of(tensors: Sequence[PlannedTensor], model: Hashable | None) -> str:
    """Digest of the weights of an expert, or by None of the base; "" where they are not in files."""
    facts = tensors[0].model
    return "" if facts is None or facts.state is None else facts.state(model)[1]


def _check_weights(model: Hashable, measured: str, now: str) -> None:
    if measured and now and measured != now:
        raise UserError(f"{model} has other weights now than when it was measured")


def measure_model(
    tensors: Sequence[PlannedTensor], experts: Sequence[Hashable], settings: MergeSettings
) -> TrimProfile:
    """Find one exact threshold and σ per expert over all tensors, in memory bounded by one tensor.

    Every tensor is there once, and every expert has one density.

    Raises:
        UserError: an input holds NaN or Inf.
    """
    searches = {expert: ThresholdSearch(float(density_of(tensors, expert))) for expert in experts}
    for expert, runs in _sample(tensors, experts, settings).items():
        searches[expert].bracket_from_sample(runs)
    still_open = dict(searches)
    label = "Measuring trim thresholds"
    mine = settings.share.mine([[tensor.name] for tensor in tensors])
    with Crew() as crew:
        while still_open:
            sums = {}
            for number, tensor in zip(
                mine, settings.progress(label, [tensors[number] for number in mine]), strict=True
            ):
                if tensor.untouched:
                    for expert in tensor.expert_parameters["density"].keys() & still_open.keys():
                        still_open[expert].count_zeros(tensor.entries or 0)
                    continue
                base, found = tensor.load()
                if base is not None and base.is_floating_point():
                    _count(tensor.name, base, found, still_open, settings, crew)
                    sums[number] = [search.take_sums() for search in still_open.values()]
            for of_tensor in settings.share.together(sums).values():
                for search, pair in zip(still_open.values(), of_tensor, strict=True):
                    search.add_sums(pair)
            for search in still_open.values():
                search.add_counts(settings.share.add_up)
            still_open = {e: s for e, s in still_open.items() if not s.finish()}
            label = "Measuring the last bits of the thresholds"  # the first pass did not bracket them tightly enough
    found_trims = {
        e: ExpertTrim(str(e), s.density, s.entries, s.threshold, s.sigma, _weights_of(tensors, e))
        for e, s in searches.items()
    }
    base = _weights_of(tensors, None)
    return TrimProfile("model", found_trims, fingerprint=fingerprint(tensors), base_weights=base)


def measure_tensors(
    tensors: Sequence[PlannedTensor], experts: Sequence[Hashable], settings: MergeSettings
) -> TrimProfile:
    """Find thresholds per tensor and expert, and each expert's σ over the whole model under them."""
    profile = TrimProfile("tensor", fingerprint=fingerprint(tensors), base_weights=_weights_of(tensors, None))
    sums = {expert: ThresholdSearch(density=1.0) for expert in experts}
    mine = settings.share.mine([[tensor.name] for tensor in tensors])
    measured: dict[int, dict[Hashable, ThresholdSearch]] = {}
    bar = settings.progress("Measuring trim thresholds", [tensors[number] for number in mine])
    with Crew() as crew:
        for number, tensor in zip(mine, bar, strict=True):
            densities = tensor.expert_parameters["density"]
            if tensor.untouched:
                measured[number] = {e: ThresholdSearch(density=1.0, entries=tensor.entries or 0) for e in densities}
                continue
            base, found = tensor.load()
            if base is not None and base.is_floating_point() and found:
                measured[number] = measure_tensor(tensor.name, base, found, densities, settings, crew)
    for number, searches in settings.share.together(measured).items():
        if not tensors[number].untouched:
            thresholds = {e: search.threshold or 0.0 for e, search in searches.items()}
            profile.tensor_thresholds[tensors[number].name] = thresholds
        for expert, search in searches.items():
            sums[expert].entries += search.entries
            sums[expert].total_l1 += search.total_l1
            sums[expert].removed_l1 += search.removed_l1
    profile.experts = {
        e: ExpertTrim(str(e), density_of(tensors, e), s.entries, None, s.sigma, _weights_of(tensors, e))
        for e, s in sums.items()
    }
    return profile


def measure_tensor(
    name: str,
    base: Tensor,
    experts: Mapping[Hashable, Tensor],
    densities: Mapping[Hashable, float],
    settings: MergeSettings,
    crew: Crew | None = None,
) -> dict[Hashable, ThresholdSearch]:
    """Search the thresholds of one tensor's experts to the end, in their order (`trim: tensor`)."""
    searches = {e: ThresholdSearch(densities[e]) for e in experts}
    starts = range(0, base.numel(), max(int(_RUN / _SHARE), base.numel() // _RUNS))
    for expert, tensor in experts.items():
        searches[expert].bracket_from_sample([_runs(base, tensor, starts, settings)])
    still_open = dict(searches)
    with Crew() if crew is None else nullcontext(crew) as counting:
        while still_open:
            _count(name, base, experts, still_open, settings, counting)
            still_open = {e: s for e, s in still_open.items() if not s.finish()}
    return searches


def _count(
    name: str,
    base: Tensor,
    experts: Mapping[Hashable, Tensor],
    searches: Mapping[Hashable, ThresholdSearch],
    settings: MergeSettings,
    crew: Crew,
) -> None:
    ids = [e for e in searches if e in experts]
    count_task_vectors(
        base, [experts[e] for e in ids], [searches[e] for e in ids], crew, clean=settings.allow_nonfinite
    )
    for expert in ids:
        if not math.isfinite(searches[expert].total_l1):
            raise nonfinite(name, base, expert)


def _sample(
    tensors: Sequence[PlannedTensor], experts: Sequence[Hashable], settings: MergeSettings
) -> dict[Hashable, list[Tensor]]:
    sizes = [_size(tensor) for tensor in tensors]
    spacing = max(int(_RUN / _SHARE), sum(sizes) // _RUNS)
    mine = {*settings.share.mine([[tensor.name] for tensor in tensors])}
    sampled: dict[int, dict[Hashable, Tensor]] = {}
    position = 0
    for number, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        starts = range(-position % spacing, size, spacing)
        position += size
        if not starts or number not in mine:
            continue
        if tensor.untouched:
            zeros = torch.zeros(len(starts), min(_RUN, size))
            sampled[number] = dict.fromkeys(tensor.expert_parameters["density"], zeros)
            continue
        base, found = tensor.load()
        sampled[number] = {expert: _runs(base, values, starts, settings) for expert, values in found.items()}
    runs: dict[Hashable, list[Tensor]] = {e: [] for e in experts}
    for of_tensor in settings.share.together(sampled).values():
        for expert, values in of_tensor.items():
            runs[expert].append(values)
    return runs


def _size(tensor: PlannedTensor) -> int:
    if tensor.entries is not None:
        return tensor.entries
    base, _ = tensor.load()
    return base.numel() if base is not None and base.is_floating_point() else 0


def _runs(base: Tensor, expert: Tensor, starts: range, settings: MergeSettings) -> Tensor:
    """|τ| of the runs that begin at `starts`, the last of them where the tensor's last run begins."""
    base, expert = base.reshape(-1), expert.reshape(-1)
    length = min(_RUN, len(base))
    first = torch.tensor(starts, dtype=torch.int64, device=base.device).clamp_(max=len(base) - length)
    index = first.unsqueeze(1) + torch.arange(length, device=base.device)
    origin = base[index].float()
    runs = fill_task_vector(torch.empty_like(origin), expert[index], origin, clean=settings.allow_nonfinite)
    return runs.abs_().cpu()
