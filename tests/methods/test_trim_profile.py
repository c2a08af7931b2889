"""Thresholds and σ over a whole merge: how they are measured, kept in a file and read again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import neuron_methods
from neuron_methods.methods import trim_profile
from neuron_methods.methods.contract import MergeSettings, PlannedTensor
from neuron_methods.methods.neuro_merging import NeuroMerging
from neuron_methods.methods.trim_profile import FORMAT, VERSION, TrimProfile, fingerprint
from neuron_methods.support.errors import UserError
from tests import oracle

neuron_methods.register()

StateDict = dict[str, Tensor]
SHARED: dict[str, Any] = {
    "trim": "model",
    "profile": "",
    "lambda_orthogonal": "auto",
    "lambda_points": "orthogonal",
    "consensus": "mean",
    "embeddings": "rows",
}


def make_models(count: int = 2, seed: int = 0) -> tuple[StateDict, dict[str, StateDict]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (40, 30), "other": (25, 16), "bias": (25,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = {
        "ab"[t]: {n: w + 0.01 * (t + 1) * torch.randn(w.shape, generator=generator).pow(3) for n, w in base.items()}
        for t in range(count)
    }
    return base, experts


class Plan:
    """The plan of a merge, and how often each of its tensors was read."""

    def __init__(
        self,
        base: StateDict,
        experts: Mapping[str, StateDict],
        *,
        density: float | Mapping[str, float] | Callable[[str], float] = 0.3,
        weight: float | Mapping[str, float] = 1.0,
        known_sizes: bool = False,
        **shared: Any,
    ) -> None:
        self.base, self.experts = base, experts
        self.loads: dict[str, int] = dict.fromkeys(base, 0)
        self.tensors = []
        for name in base:
            here = [e for e in experts if name in experts[e]]
            of_tensor = density(name) if callable(density) else density
            self.tensors.append(
                PlannedTensor(
                    name,
                    lambda name=name: self._load(name),
                    {**SHARED, **shared},
                    {
                        "density": {e: of_tensor[e] if isinstance(of_tensor, Mapping) else of_tensor for e in here},
                        "weight": {e: weight[e] if isinstance(weight, Mapping) else weight for e in here},
                    },
                    entries=base[name].numel() if known_sizes else None,
                )
            )

    def _load(self, name: str) -> tuple[Tensor, dict[str, Tensor]]:
        self.loads[name] += 1
        return self.base[name], {e: model[name] for e, model in self.experts.items() if name in model}

    def measure(self, settings: MergeSettings | None = None) -> TrimProfile:
        prepared = NeuroMerging().prepare(self.tensors)
        prepared.measure(settings or MergeSettings())
        return prepared.profile

    def updates(self, expert: str) -> list[Tensor]:
        model = self.experts[expert]
        return [oracle.task_vector(model[name], self.base[name]) for name in self.base if name in model]


def write(folder: Path, profile: TrimProfile) -> str:
    path = folder / "profile.json"
    path.write_text(profile.to_json(), encoding="utf-8")
    return str(path)


# Measuring


@pytest.mark.parametrize("density", [0.15, 1.0, {"a": 0.1, "b": 0.6}])
def test_thresholds_and_sigma_over_the_model(density: float | dict[str, float]) -> None:
    plan = Plan(*make_models(), density=density)
    profile = plan.measure()
    assert profile.trim == "model"
    for expert in "ab":
        share = density[expert] if isinstance(density, dict) else density
        found = profile.experts[expert]
        assert found.threshold == oracle.threshold(plan.updates(expert), share)
        assert found.sigma == pytest.approx(oracle.sigma(plan.updates(expert), found.threshold), rel=1e-6, abs=1e-9)
        assert (found.model, found.density, found.entries) == (expert, share, 40 * 30 + 25 * 16 + 25)
    sigma = max(profile.experts[expert].sigma for expert in "ab")
    assert profile.sigma == sigma
    assert profile.automatic_lambda("mean") == pytest.approx(1 / (1 - sigma))
    assert profile.automatic_lambda("sum") == 1.0


@pytest.mark.parametrize("density", [0.15, 1.0, lambda name: 0.5 if name == "matrix" else 0.1])
def test_thresholds_per_tensor_and_sigma_over_the_model(density: float | Callable[[str], float]) -> None:
    plan = Plan(*make_models(), density=density, trim="tensor")
    profile = plan.measure()
    for expert in "ab":
        removed = total = 0.0
        for name, update in zip(plan.base, plan.updates(expert), strict=True):
            expected = oracle.threshold([update], density(name) if callable(density) else density)
            assert profile.tensor_thresholds[name][expert] == expected
            removed += oracle.sigma([update], expected) * float(update.abs().sum())
            total += float(update.abs().sum())
        assert profile.experts[expert].sigma == pytest.approx(removed / total, rel=1e-6, abs=1e-9)
        assert profile.experts[expert].threshold is None
        assert profile.experts[expert].entries == 40 * 30 + 25 * 16 + 25


@pytest.mark.parametrize("known_sizes", [True, False])
def test_a_tensor_is_read_in_full_once(known_sizes: bool) -> None:
    """For its size where that is not known, for its part of the sample, and to be counted."""
    base, experts = make_models()
    base = {name: tensor.bfloat16() for name, tensor in base.items()}
    plan = Plan(
        base,
        {e: {name: tensor.bfloat16() for name, tensor in model.items()} for e, model in experts.items()},
        known_sizes=known_sizes,
    )
    plan.measure()
    assert max(plan.loads.values()) <= (2 if known_sizes else 3)


def test_experts_of_weight_zero_have_no_vote_on_sigma() -> None:
    models = make_models()
    profile = Plan(*models, density={"a": 0.1, "b": 0.9}, weight={"a": 0.0, "b": 1.0}).measure()
    assert profile.voting == ["b"]
    assert profile.sigma == profile.experts["b"].sigma < profile.experts["a"].sigma


def test_tensors_that_some_experts_lack() -> None:
    base, experts = make_models()
    del experts["a"]["other"]
    plan = Plan(base, experts)
    profile = plan.measure()
    for expert in "ab":
        assert profile.experts[expert].threshold == oracle.threshold(plan.updates(expert), 0.3)
    assert profile.experts["a"].entries == 40 * 30 + 25


def test_tensors_without_a_base_and_integers_are_not_counted() -> None:
    base, experts = make_models()
    expected = Plan(base, experts).measure().experts
    extra = {"ids": torch.arange(500)}
    plan = Plan({**base, **extra}, {e: {**model, **extra} for e, model in experts.items()})
    new = PlannedTensor(
        "new", lambda: (None, {"a": torch.ones(99)}), SHARED, {"density": {"a": 0.3}, "weight": {"a": 1.0}}
    )
    plan.tensors.append(new)
    found = plan.measure().experts
    assert {e: (t.threshold, t.sigma, t.entries) for e, t in found.items()} == {
        e: (t.threshold, t.sigma, t.entries) for e, t in expected.items()
    }


@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_tensors_that_repeat_are_not_counted(trim: str) -> None:
    base, experts = make_models()
    plan = Plan(base, experts, trim=trim)
    expected = plan.measure()
    first = plan.tensors[0]
    again = PlannedTensor("again", first.load, first.parameters, first.expert_parameters, repeats=lambda: True)
    plan.tensors.append(again)
    assert plan.measure() == expected


@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_untouched_tensors_are_counted_without_being_read(trim: str) -> None:
    base, experts = make_models()
    still = {"still": torch.randn(3000), "quiet": torch.randn(4000)}
    plan = Plan({**base, **still}, {e: {**model, **still} for e, model in experts.items()}, trim=trim, density=0.2)
    expected = plan.measure()
    names = list(plan.loads)
    plan.loads = dict.fromkeys(names, 0)
    plan.tensors = [
        PlannedTensor(t.name, t.load, t.parameters, t.expert_parameters, entries=still[t.name].numel(), untouched=True)
        if t.name in still
        else t
        for t in plan.tensors
    ]
    found = plan.measure()
    assert plan.loads["still"] == plan.loads["quiet"] == 0
    for expert in "ab":
        assert found.experts[expert].entries == expected.experts[expert].entries
        assert found.experts[expert].threshold == expected.experts[expert].threshold
        assert found.experts[expert].sigma == pytest.approx(expected.experts[expert].sigma, rel=1e-6)


def test_progress_is_told_what_is_being_measured() -> None:
    bars: list[tuple[str, int]] = []

    def progress(description: str, tensors: Sequence[PlannedTensor]):
        bars.append((description, len(tensors)))
        return iter(tensors)

    Plan(*make_models()).measure(MergeSettings(progress=progress))
    assert bars[0] == ("Measuring trim thresholds", 3)


def test_nothing_is_read_where_nothing_is_needed() -> None:
    for shared in ({"lambda_orthogonal": 0.5}, {"consensus": "sum"}):
        plan = Plan(*make_models(), trim="tensor", **shared)
        profile = plan.measure()
        assert NeuroMerging().prepare(plan.tensors).reads() == set()
        assert set(plan.loads.values()) == {0}
        assert profile.thresholds_for("matrix", {"a": plan.base["matrix"]}) is None


def test_nothing_left_to_divide_by() -> None:
    """σ rounds to 1 where trimming leaves less than float32 sums resolve."""
    profile = Plan(*make_models(1)).measure()
    profile.experts["a"] = trim_profile.ExpertTrim("a", 0.3, 1, 1.0, 1.0)
    assert math.isfinite(profile.automatic_lambda("mean"))


# The file


@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_a_profile_read_again_gives_the_same_merge(trim: str, tmp_path: Path) -> None:
    from mergekit.merge_methods import merge_state_dicts

    base, experts = make_models()
    parameters = {"density": {"a": 0.2, "b": 0.4}, "weight": 1.0, "trim": trim}
    models = {"base": base, **experts}
    expected = merge_state_dicts(models, "neuro_merging", base="base", parameters=parameters)
    profile = Plan(base, experts, density={"a": 0.2, "b": 0.4}, trim=trim).measure()
    path = write(tmp_path, profile)
    found = merge_state_dicts(models, "neuro_merging", base="base", parameters={**parameters, "profile": path})
    assert all(torch.equal(found[name], expected[name]) for name in base)
    plan = Plan(base, experts, density={"a": 0.2, "b": 0.4}, trim=trim, profile=path)
    assert plan.measure() == profile
    assert set(plan.loads.values()) == {0}


def test_a_profile_decides_and_is_not_measured_over(tmp_path: Path) -> None:
    from mergekit.merge_methods import merge_state_dicts

    base, experts = make_models(1)
    content = json.loads(Plan(base, experts).measure().to_json())
    content["experts"][0] |= {"threshold": 1e9, "sigma": 0.5}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(content))
    merged = merge_state_dicts(
        {"base": base, **experts}, "neuro_merging", base="base", parameters={"density": 0.3, "profile": str(path)}
    )
    assert all(torch.equal(merged[name], base[name]) for name in base)


def test_a_profile_holds_densities_that_vary_over_tensors(tmp_path: Path) -> None:
    models = make_models()

    def density(name: str) -> float:
        return 0.5 if name == "matrix" else 0.1

    path = write(tmp_path, Plan(*models, density=density, trim="tensor").measure())
    again = Plan(*models, density=density, trim="tensor", profile=path)
    assert again.measure().sigma is not None
    other = Plan(*models, density=lambda name: 0.1 if name == "matrix" else 0.5, trim="tensor", profile=path)
    with pytest.raises(UserError, match=r"a was measured with density varies-\w+, the merge asks for varies-\w+"):
        other.measure()


def test_weights_are_those_of_the_merge_and_not_of_the_measurement(tmp_path: Path) -> None:
    models = make_models()
    density = {"a": 0.1, "b": 0.9}
    path = write(tmp_path, Plan(*models, density=density, weight={"a": 0.0, "b": 1.0}).measure())
    profile = Plan(*models, density=density, profile=path).measure()
    assert profile.sigma == profile.experts["a"].sigma


def test_a_profile_of_more_experts_serves_a_merge_of_some(tmp_path: Path) -> None:
    base, experts = make_models()
    whole = Plan(base, experts).measure()
    path = write(tmp_path, whole)
    profile = Plan(base, {"b": experts["b"]}, profile=path).measure()
    assert profile.experts == {"b": whole.experts["b"]}
    assert profile.sigma == whole.experts["b"].sigma


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    profile = Plan(*make_models(), weight={"a": 0.0, "b": 1.0}).measure()
    content = json.loads(profile.to_json())
    assert (content["format"], content["version"], content["method"]) == (FORMAT, VERSION, "neuro_merging")
    assert [entry["model"] for entry in content["experts"]] == ["a", "b"]
    assert [entry["voting"] for entry in content["experts"]] == [False, True]
    assert content["sigma"] == profile.sigma
    assert content["lambda_orthogonal"] == profile.automatic_lambda("mean")


def test_fingerprints_follow_names_and_not_their_order() -> None:
    base, experts = make_models()
    plan = Plan(base, experts)
    assert fingerprint(plan.tensors) == fingerprint(plan.tensors[::-1])
    assert fingerprint(plan.tensors) != fingerprint(plan.tensors[1:])


def damage(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], str]:
    def changed(content: dict[str, Any]) -> str:
        change(content)
        return json.dumps(content)

    return changed


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "text": (lambda _: "sigma: 0.5", "not valid JSON"),
    "empty": (lambda _: "", "not valid JSON"),
    "cut off": (lambda content: json.dumps(content)[:-20], "not valid JSON"),
    "a list": (lambda content: json.dumps([content]), "expected a JSON object, found a list"),
    "another format": (
        damage(lambda c: c.update(format="mergekit-neuron/neuron-profile")),
        "not a file of the format 'mergekit-neuron/trim-profile'",
    ),
    "no format": (damage(lambda c: c.pop("format")), "not a file of the format 'mergekit-neuron/trim-profile'"),
    "a later version": (damage(lambda c: c.update(version=99)), "version 99, but this release reads version 1"),
    "no version": (damage(lambda c: c.pop("version")), "version None"),
    "no experts": (damage(lambda c: c.pop("experts")), r"experts: missing"),
    "experts of another kind": (damage(lambda c: c.update(experts=5)), r"experts: .* valid list, found 5"),
    "experts without names": (damage(lambda c: c.update(experts=["a", "b"])), r"experts\[0\]: "),
    "no trim": (damage(lambda c: c.pop("trim")), r"trim: missing"),
    "no fingerprint": (damage(lambda c: c.pop("fingerprint")), r"fingerprint: missing"),
    "no threshold": (damage(lambda c: c["experts"][1].pop("threshold")), r"experts\[1\].threshold: missing"),
    "threshold null": (
        damage(lambda c: c["experts"][1].update(threshold=None)),
        r"threshold: found None under trim: model",
    ),
    "threshold in words": (
        damage(lambda c: c["experts"][1].update(threshold="0.1")),
        r"experts\[1\].threshold: .*, found '0.1'",
    ),
    "threshold negative": (
        damage(lambda c: c["experts"][1].update(threshold=-1.0)),
        r"threshold: .* greater than or equal to 0, found -1.0",
    ),
    "threshold NaN": (damage(lambda c: c["experts"][1].update(threshold=math.nan)), r"threshold: .*finite.*found nan"),
    "threshold infinite": (
        damage(lambda c: c["experts"][1].update(threshold=math.inf)),
        r"threshold: .*finite.*found inf",
    ),
    "threshold true": (damage(lambda c: c["experts"][1].update(threshold=True)), r"threshold: .*found True"),
    "no sigma": (damage(lambda c: c["experts"][1].pop("sigma")), r"sigma: missing"),
    "sigma one": (damage(lambda c: c["experts"][1].update(sigma=1.0)), r"sigma: .*less than 1"),
    "no density": (damage(lambda c: c["experts"][1].pop("density")), r"density: missing"),
    "no entries": (damage(lambda c: c["experts"][1].pop("entries")), r"entries: missing"),
    "thresholds of tensors in a list": (
        damage(lambda c: c.update(tensor_thresholds=[1])),
        r"tensor_thresholds: .*found a list",
    ),
    "thresholds of a tensor in a list": (
        damage(lambda c: c.update(tensor_thresholds={"matrix": [1.0]})),
        r"tensor_thresholds.matrix: .*found a list",
    ),
    "another trim": (damage(lambda c: c.update(trim="tensor")), "measured with trim: tensor, the merge asks for model"),
    "other tensors": (damage(lambda c: c.update(fingerprint="0" * 16)), "measured on other tensors"),
    "another expert": (damage(lambda c: c["experts"][1].update(model="c")), r"no expert b in it \(found: a, c\)"),
    "no expert at all": (damage(lambda c: c.update(experts=[])), r"no expert a in it \(found: none\)"),
    "another density": (
        damage(lambda c: c["experts"][1].update(density=0.31)),
        "b was measured with density 0.31, the merge asks for 0.3",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_each_kind_of_wrong_file_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    models = make_models()
    change, message = DAMAGED[kind]
    path = tmp_path / "profile.json"
    path.write_text(change(json.loads(Plan(*models).measure().to_json())), encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        Plan(*models, profile=str(path)).measure()
    assert str(error.value).startswith(f"profile {path}: ")
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    models = make_models()
    with pytest.raises(UserError, match=r"missing\.json: cannot be read \(No such file or directory\); check the path"):
        Plan(*models, profile=str(tmp_path / "missing.json")).measure()
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        Plan(*models, profile=str(tmp_path)).measure()
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="not UTF-8"):
        Plan(*models, profile=str(binary)).measure()
