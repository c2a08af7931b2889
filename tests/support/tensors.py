"""Small models in memory, and how the tests merge them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from mergekit.merge_methods import TensorGroup, get, merge_state_dicts, merge_tensors
from mergekit.merge_methods.dtype import promoted_dtype
from torch import Tensor

import neuron_methods
from neuron_methods.methods.contract import MergeSettings, planned_in_memory

neuron_methods.register()

StateDict = dict[str, Tensor]
# What leaves the update as it is, so that one step at a time can be looked at.
PLAIN = {"density": 1.0, "lambda_orthogonal": 1.0}


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values)


def merge(base: Tensor, *experts: Tensor, name: str = "weight", **parameters: object) -> Tensor:
    """One tensor merged by mergekit's in-memory API."""
    return merge_tensors([base, *experts], "neuro_merging", base_index=0, name=name, parameters=parameters)


def named(base: StateDict, experts: Sequence[StateDict]) -> dict[str, StateDict]:
    return {"base": base, **{f"expert-{index}": expert for index, expert in enumerate(experts)}}


def merge_models(base: StateDict, experts: Sequence[StateDict], **parameters: object) -> StateDict:
    return merge_state_dicts(named(base, experts), "neuro_merging", base="base", parameters=parameters)


def merge_models_with(
    settings: MergeSettings,
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    out_dtype: torch.dtype | None = None,
    **parameters: object,
) -> StateDict:
    """Merge with settings that mergekit's in-memory API has no words for."""
    method, models = get("neuro_merging"), named(base, experts)
    groups = [
        TensorGroup.from_tensors([m[name] for m in models.values()], ids=list(models), base_index=0, name=name)
        for name in base
    ]
    bound: Sequence[Mapping[str, object]] = method._bind_parameters(groups, parameters)
    prepared = method.prepare(planned_in_memory(groups, bound))
    prepared.measure(settings)
    pairs = zip(groups, bound, strict=True)
    return {str(g.metadata.name): prepared.merge(g, b, out_dtype or promoted_dtype(g)) for g, b in pairs}


def merge_with(
    settings: MergeSettings, base: Tensor, *experts: Tensor, name: str = "weight", **parameters: object
) -> Tensor:
    return merge_models_with(settings, {name: base}, [{name: expert} for expert in experts], **parameters)[name]


def with_updates(base: Tensor, *updates: Tensor, **parameters: object) -> Tensor:
    """What the merge adds to a zero base: every update is orthogonal there."""
    return merge(base, *(base + update for update in updates), **{**PLAIN, **parameters}) - base


def randoms(shape: tuple[int, ...], count: int, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for _ in range(count)]


def make_model(seed: int, dtype: torch.dtype = torch.float32) -> StateDict:
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (30, 12),
        "proj": (16, 12),
        "norm": (12,),
        "bias": (16,),
        "scale": (),
    }
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def make_experts(base: StateDict, count: int, seed: int = 100) -> list[StateDict]:
    """Updates of many sizes, a few of them large, as fine-tuning leaves them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: (weights.float() + 0.01 * torch.randn(weights.shape, generator=generator).pow(3)).to(weights.dtype)
            for name, weights in base.items()
        }
        for _ in range(count)
    ]


def assert_agree(found: StateDict, expected: StateDict, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        difference = (found[name].double() - expected[name].double()).abs()
        assert difference.numel() == 0 or difference.max() < tolerance, name
