"""`merge_adapters` on a loaded PeftModel against the same merges by YAML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from torch import Tensor

import neuron_methods
from neuron_methods.plugin.merging import merge_to_directory
from neuron_methods.support.errors import UserError
from tests.adapters import cases
from tests.adapters.cases import lora, save_base, tensors, train

FULL = 1000  # rank: nothing is lost


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """A base and three adapters on different modules, by the kind of model."""
    known: dict[str, dict[str, Any]] = {}
    kinds: dict[str, tuple[Any, tuple[dict[str, Any], ...]]] = {
        "llama": (
            cases.llama,
            (
                {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}},
                {"target_modules": ["q_proj"], "use_rslora": True},
                {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
            ),
        ),
        "vit": (
            cases.vit,
            ({"target_modules": ["q_proj", "projection"]}, {"target_modules": ["fc1"]}, {"target_modules": ["q_proj"]}),
        ),
        "gpt2": (
            cases.gpt2,
            ({"target_modules": ["c_attn", "c_proj"]}, {"target_modules": ["c_attn"]}, {"target_modules": ["wte"]}),
        ),
    }

    def get(kind: str) -> dict[str, Any]:
        if kind not in known:
            root = tmp_path_factory.mktemp(kind)
            model, options = kinds[kind]
            base = save_base(model(), root / "base")
            adapters = [train(base, lora(**o)(), root / f"a{i}", seed=i) for i, o in enumerate(options)]
            known[kind] = {"base": base, "adapters": adapters}
        return known[kind]

    return get


def loaded(trained: dict[str, Any]) -> peft.PeftModel:
    model = peft.PeftModel.from_pretrained(cases.load(trained["base"]), trained["adapters"][0], adapter_name="a0")
    for index, adapter in enumerate(trained["adapters"][1:], start=1):
        model.load_adapter(adapter, adapter_name=f"a{index}")
    return model


def with_adapter(model: peft.PeftModel, name: str, out: Path) -> dict[str, Tensor]:
    model.set_adapter(name)
    cases.merge_in_memory(model, name).save_pretrained(out)
    return tensors(out)


def by_yaml(trained: dict[str, Any], method: str, out: Path, weights: list[float], **parameters: Any) -> Any:
    models = [
        {"model": f"{trained['base']}+{a}", "parameters": {"weight": w, **parameters}}
        for a, w in zip(trained["adapters"], weights, strict=True)
    ]
    content = {"merge_method": method, "models": models}
    if method != "linear":
        content["base_model"] = str(trained["base"])
    merge_to_directory(yaml.safe_dump(content), out, progress=False)
    return tensors(out)


@pytest.mark.parametrize("kind", ["llama", "vit", "gpt2"])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("neuro_merging", {"density": 0.4}),
        ("task_arithmetic", {}),
        ("linear", {}),
        ("ties", {"density": 1.0}),
        ("min_merging", {"density": 0.5}),
    ],
)
def test_as_the_same_merge_by_yaml(kind: str, method: str, parameters: dict[str, Any], trained, tmp_path: Path) -> None:
    weights = [0.7, 0.4, 0.9]
    expected = by_yaml(trained(kind), method, tmp_path / "yaml", weights, **parameters)
    model = loaded(trained(kind))
    summary = neuron_methods.merge_adapters(
        model, ["a0", "a1", "a2"], method, adapter_name="new", weights=weights, rank=FULL, **parameters
    )
    assert not summary.warnings
    found = with_adapter(model, "new", tmp_path / "out")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=5e-6, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_other_adapters_stay_as_they_are(trained) -> None:
    model = loaded(trained("llama"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    active = model.active_adapters
    neuron_methods.merge_adapters(model, ["a0", "a1"], "task_arithmetic")
    assert model.active_adapters == active
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name.split(".merged")[0] for name in after if ".merged" in name}
    model.set_adapter("merged")
    assert not any(isinstance(p, torch.Tensor) and bool(p.isnan().any()) for p in model.parameters())


def test_rank_defaults_to_what_the_adapters_have_together(trained) -> None:
    model = loaded(trained("llama"))
    summary = neuron_methods.merge_adapters(model, ["a0", "a1"], "task_arithmetic", weights=[0.5, 2.0])
    assert all(kind.energy_kept > 1 - 1e-6 for kind in summary.kinds)  # a sum of two updates has no more directions
    assert model.peft_config["merged"].r <= 8
    poor = neuron_methods.merge_adapters(model, ["a0", "a1"], "task_arithmetic", adapter_name="poor", rank=1)
    assert model.peft_config["poor"].r == 1
    assert poor.warnings
    rich = neuron_methods.merge_adapters(model, ["a0", "a1"], "task_arithmetic", adapter_name="rich", energy=0.8)
    assert all(kind.energy_kept >= 0.8 for kind in rich.kinds)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer) and "rich" in m.r]
    assert {layer.scaling["rich"] for layer in layers} == {1.0}


def test_parameters_by_adapter(trained, tmp_path: Path) -> None:
    model = loaded(trained("llama"))
    names = ["a0", "a1", "a2"]
    densities = dict(zip(names, (0.2, 0.5, 1.0), strict=True))
    neuron_methods.merge_adapters(model, names, "neuro_merging", rank=FULL, density=densities, weight=0.6)
    content = {
        "merge_method": "neuro_merging",
        "base_model": str(trained("llama")["base"]),
        "models": [
            {"model": f"{trained('llama')['base']}+{a}", "parameters": {"weight": 0.6, "density": densities[n]}}
            for n, a in zip(names, trained("llama")["adapters"], strict=True)
        ],
    }
    merge_to_directory(yaml.safe_dump(content), tmp_path / "yaml", progress=False)
    found = with_adapter(model, "merged", tmp_path / "out")
    for name, tensor in tensors(tmp_path / "yaml").items():
        torch.testing.assert_close(found[name], tensor, rtol=5e-6, atol=5e-6)


def test_the_new_adapter_can_be_saved_and_loaded(trained, tmp_path: Path) -> None:
    model = loaded(trained("llama"))
    neuron_methods.merge_adapters(model, ["a0", "a1", "a2"], density=0.5, rank=6)
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    again = peft.PeftModel.from_pretrained(cases.load(trained("llama")["base"]), tmp_path / "merged")
    model.set_adapter("merged")
    tokens = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"adapters": ["a0", "nobody"]}, "no adapter nobody; the model has: a0, a1, a2"),
        ({"adapters": []}, "no adapter named"),
        ({"adapter_name": "a1"}, "has an adapter 'a1' already"),
        ({"method": "tiess"}, "unknown method 'tiess'"),
        ({"densty": 0.5}, "has no parameter 'densty'"),
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"method": "slerp", "weights": [1.0, 1.0], "t": 0.5}, "has no parameter 'weights'"),
        ({"density": 7.0}, "density must be"),
    ],
)
def test_mistakes(call: dict[str, Any], says: str, trained) -> None:
    with pytest.raises(UserError, match=says):
        neuron_methods.merge_adapters(loaded(trained("llama")), **{"adapters": ["a0", "a1"], **call})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (lora(target_modules=["q_proj"], modules_to_save=["norm"])(), "stored whole"),
        (lora(target_modules=["q_proj"], bias="lora_only")(), "trains biases"),
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "of type IA3"),
    ],
)
def test_more_than_lora_layers(config: peft.PeftConfig, says: str, trained) -> None:
    model = peft.get_peft_model(cases.load(trained("llama")["base"]), config, adapter_name="a")
    with pytest.raises(UserError, match=says):
        neuron_methods.merge_adapters(model, ["a"])
