"""A merge is prepared once: its plan is laid out and its files are read one time. It says which tensors it reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from neuron_methods.methods.contract import MergeSettings, PlannedTensor
from neuron_methods.methods.delegation import DelegatingMethod
from neuron_methods.methods.groups_file import NeuronGroups
from neuron_methods.methods.min_merging import MinMerging
from neuron_methods.methods.neuron_layout import NeuronLayout
from neuron_methods.methods.neuron_merge import NeuronMerge
from neuron_methods.methods.trim_profile import TrimProfile
from neuron_methods.neurons.profile_file import NeuronProfile
from neuron_methods.plugin.merging import merge_to_directory
from tests.support.checkpoints import save_family
from tests.support.plans import models, plan, write_groups, write_profile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("llama"), "llama-untied")


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was read, by its name, and how often a layout was made."""
    found: Counter[str] = Counter()

    def counting(owner: type, name: str, key: Any) -> None:
        original = getattr(owner, name)

        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            found[key(*arguments)] += 1
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, wrapper)

    counting(NeuronGroups, "read", lambda path: Path(path).name)
    counting(TrimProfile, "read", lambda path, *_: Path(path).name)
    counting(NeuronProfile, "load", lambda path: Path(path).name)
    counting(NeuronLayout, "__init__", lambda *_: "layout")
    return found


def merge(folder: Path, out: Path, method: str, own: list[dict[str, Any]], **shared: Any) -> None:
    models = [{"model": str(folder / f"expert-{e}"), "parameters": p} for e, p in zip("ab", own, strict=True)]
    content = {"merge_method": method, "base_model": str(folder / "base"), "models": models, "parameters": shared}
    merge_to_directory(yaml.safe_dump(content), out, progress=False)


@pytest.mark.parametrize("rest", ["linear", "neuro_merging"])
@pytest.mark.parametrize("within", ["task_arithmetic", "neuro_merging"])
def test_neuron_merge_reads_its_groups_once(
    folder: Path, tmp_path: Path, counts: Counter[str], within: str, rest: str
) -> None:
    config = transformers.AutoConfig.from_pretrained(folder / "base")
    groups = write_groups(tmp_path / "groups.json", config, ["general", "math", "code"])
    own = [{"group": "math"}, {"group": "code"}]
    merge(folder, tmp_path / "out", "neuron_merge", own, groups=groups, within=within, rest=rest)
    assert counts == {"groups.json": 1, "layout": 1}


def test_min_merging_reads_each_profile_once(folder: Path, tmp_path: Path, counts: Counter[str]) -> None:
    config = transformers.AutoConfig.from_pretrained(folder / "base")
    own = []
    for seed, name in enumerate(("a.safetensors", "b.safetensors")):
        profile = write_profile(tmp_path / name, config, {"text": 10}, seed)
        own.append({"profile": str(profile.path), "importance": "activation"})
    merge(folder, tmp_path / "out", "min_merging", own, rest="neuro_merging")
    assert counts == {"a.safetensors": 1, "b.safetensors": 1, "layout": 1}


def test_neuro_merging_reads_its_profile_once(folder: Path, tmp_path: Path, counts: Counter[str]) -> None:
    profile = tmp_path / "profile.json"
    content = {
        "merge_method": "neuro_merging",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / f"expert-{e}")} for e in "ab"],
    }
    merge_to_directory(yaml.safe_dump(content), tmp_path / "out", progress=False, profile_out=str(profile))
    merge(folder, tmp_path / "again", "neuro_merging", [{}, {}], profile=str(profile))
    assert counts == {"profile.json": 1}


READS: dict[str, tuple[DelegatingMethod, dict[str, Any], Callable[[str], bool]]] = {
    "neurons and rows": (MinMerging(), {}, lambda name: "proj" in name),
    "neurons alone": (MinMerging(), {"attention": "drop"}, lambda name: "mlp" in name),
    "also by the rest": (MinMerging(), {"attention": "drop", "rest": "neuro_merging"}, lambda n: "self_attn" not in n),
    "nothing": (NeuronMerge(), {}, lambda _: False),
    "within": (NeuronMerge(), {"within": "neuro_merging"}, lambda name: "mlp" in name),
    "everything": (NeuronMerge(), {"within": "neuro_merging", "rest": "neuro_merging"}, lambda _: True),
    "rest of fixed scale": (
        NeuronMerge(),
        {"rest": "neuro_merging", "rest_trim": "tensor", "rest_lambda_orthogonal": 1.0},
        lambda _: False,
    ),
}


@pytest.mark.parametrize("what", READS)
def test_a_pass_reads_what_it_says_and_preparing_reads_nothing(what: str, tmp_path: Path) -> None:
    method, shared, expected = READS[what]
    config, base, experts = models("llama-untied")
    own = None
    if isinstance(method, NeuronMerge):
        shared = {**shared, "groups": write_groups(tmp_path / "groups.json", config, ["general", "math", "code"])}
        own = {"expert-a": {"group": "math"}, "expert-b": {"group": "code"}}
    method, tensors = plan(method, config, base, experts, shared, own)
    read: set[str] = set()

    def recorded(tensor: PlannedTensor) -> PlannedTensor:
        return replace(tensor, load=lambda: read.add(tensor.name) or tensor.load())

    prepared = method.prepare([recorded(tensor) for tensor in tensors])
    assert read == set()
    prepared.measure(MergeSettings())
    assert read == prepared.reads() == set(filter(expected, base))
