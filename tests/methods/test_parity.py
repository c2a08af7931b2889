"""The published code's outputs, from its inputs: tests/data/parity/README.md says what the files hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mergekit.merge_methods import TensorGroup, merge_state_dicts
from safetensors.torch import load_file
from torch import Tensor

import neuron_methods
from neuron_methods.methods.contract import MergeSettings, PlannedTensor
from neuron_methods.methods.neuro_merging import NeuroMerging, PreparedNeuroMerging
from tests import oracle

DATA = Path(__file__).parent.parent / "data" / "parity"
EXPECTED = json.loads((DATA / "expected.json").read_text())

neuron_methods.register()


@dataclass
class Case:
    name: str
    base: dict[str, Tensor]
    experts: list[dict[str, Tensor]]
    delta: dict[str, Tensor]

    @property
    def expected(self) -> dict:
        return EXPECTED[self.name]


@pytest.fixture(params=sorted(EXPECTED), scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    tensors = load_file(DATA / f"{request.param}.safetensors")

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    count = EXPECTED[request.param]["experts"]
    return Case(request.param, under("base."), [under(f"expert{t}.") for t in range(count)], under("delta."))


def merge(case: Case, **parameters: object) -> dict[str, Tensor]:
    return merge_state_dicts(
        {"base": case.base, **dict(enumerate(case.experts))},
        "neuro_merging",
        base="base",
        parameters={"density": case.expected["density"], **parameters},
    )


def measure(case: Case, **parameters: object) -> tuple[PreparedNeuroMerging, list[PlannedTensor]]:
    count = len(case.experts)
    defaults = {p.name: p.default for p in NeuroMerging.spec.shared_parameters}
    shared = {**defaults, **parameters}
    of_experts = {
        "density": dict.fromkeys(range(count), case.expected["density"]),
        "weight": dict.fromkeys(range(count), 1.0),
    }
    tensors = [
        PlannedTensor(
            name,
            lambda name=name: (case.base[name], {t: expert[name] for t, expert in enumerate(case.experts)}),
            shared,
            of_experts,
        )
        for name in case.base
    ]
    prepared = NeuroMerging().prepare(tensors)
    prepared.measure(MergeSettings())
    return prepared, tensors


def differences(merged: dict[str, Tensor], base: dict[str, Tensor], delta: dict[str, Tensor]) -> Tensor:
    assert merged.keys() == base.keys() == delta.keys()
    return torch.cat([(merged[name] - base[name] - delta[name]).abs().flatten() for name in base])


def test_end_result_is_the_published_one(case: Case) -> None:
    difference = differences(merge(case, lambda_orthogonal=1.0), case.base, case.delta)
    assert (difference <= 1e-5).double().mean() >= 0.999
    assert difference.max() <= 2e-3


def test_thresholds_are_the_published_ones(case: Case) -> None:
    profile = measure(case)[0].profile
    assert [profile.experts[t].threshold for t in range(len(case.experts))] == case.expected["thresholds"]


def test_sigma_and_lambda_are_the_published_ones(case: Case) -> None:
    profile = measure(case)[0].profile
    sigmas = [profile.experts[t].sigma for t in range(len(case.experts))]
    assert sigmas == pytest.approx(case.expected["sigma"], rel=2e-6)
    assert profile.automatic_lambda("mean") == pytest.approx(case.expected["lambda_auto"], rel=2e-6)


def test_automatic_lambda_scales_the_published_update(case: Case) -> None:
    scaled = {name: delta * case.expected["lambda_auto"] for name, delta in case.delta.items()}
    difference = differences(merge(case), case.base, scaled)
    assert (difference <= 1e-5).double().mean() >= 0.999
    assert difference.max() <= 2e-3


def test_points_of_the_full_mode_are_the_published_ones(case: Case) -> None:
    """Half of the published ψ of a point goes with λ₁, the other half with λ₂ (Fang et al., merging_methods.py)."""
    merged = merge(case, lambda_parallel=0.4, lambda_orthogonal=2.7, lambda_points="mean")
    points = [name for name, base in case.base.items() if base.ndim < 2]
    assert points
    for name in points:
        half = case.delta[name] / 2
        torch.testing.assert_close(merged[name], case.base[name] + 0.4 * half + 2.7 * half, rtol=0, atol=1e-5)


def test_the_update_is_orthogonal_to_every_base_row(case: Case) -> None:
    merged = merge(case, lambda_orthogonal=1.0)
    for name, base in case.base.items():
        if base.ndim == 2:
            cosine = torch.nn.functional.cosine_similarity(merged[name] - base, base, dim=1)
            assert cosine.abs().max() < 1e-4, name


def test_the_oracle_agrees_with_the_published_code(case: Case) -> None:
    merged = oracle.merge_model(case.base, case.experts, density=case.expected["density"], lambda_orthogonal=1.0)
    difference = differences(merged, case.base, case.delta)
    assert (difference <= 1e-5).double().mean() >= 0.999
    assert difference.max() <= 2e-3


def test_a_merge_tensor_by_tensor_is_the_published_one_and_knows_its_energies(case: Case) -> None:
    prepared, tensors = measure(case, lambda_orthogonal=1.0)
    merged = {}
    for tensor in tensors:
        base, experts = tensor.load()
        group = TensorGroup.from_tensors(
            [base, *experts.values()], ids=["base", *experts], base_index=0, name=tensor.name
        )
        parameters = {**tensor.parameters, **tensor.expert_parameters}
        merged[tensor.name] = prepared.merge(group, parameters, torch.float32)
    difference = differences(merged, case.base, case.delta)
    assert (difference <= 1e-5).double().mean() >= 0.999
    assert prepared.total("orthogonal") > prepared.total("parallel") > 0
