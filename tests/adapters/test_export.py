"""Merges that come out as adapters: merged into the base by peft, they are the full merge to the reported error."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from torch import Tensor

from neuron_methods.adapters.export import AdapterSummary
from neuron_methods.adapters.kept import Precision
from neuron_methods.plugin.adapter_output import AdapterOutput, adapter_precision
from neuron_methods.plugin.merging import merge_to_directory
from neuron_methods.support.errors import UserError
from neuron_methods.support.targets import MARK
from tests.adapters import cases
from tests.adapters.cases import lora, save_base, tensors, train

EXACT = Precision(rank=None)


def content(method: str, model: object, base: Path, **top: Any) -> str:
    parameters = {"weight": 0.7, **({"density": 0.5} if method == "neuro_merging" else {})}
    models = [{"model": str(model), "parameters": parameters}]
    return yaml.safe_dump({"merge_method": method, "base_model": str(base), "models": models, **top})


def as_adapter(source: str, out: Path, precision: Precision | None = None, **options: Any) -> AdapterSummary:
    return merge_to_directory(source, out, output=AdapterOutput(precision), progress=False, **options).adapter


def in_full(source: str, out: Path) -> dict[str, Tensor]:
    merge_to_directory(source, out, progress=False)
    return tensors(out)


def merged_by_peft(base: Path, adapter: Path, out: Path) -> dict[str, Tensor]:
    return tensors(cases.merge(base, adapter, out))


@pytest.mark.parametrize(("kind", "method"), [("adapter", "neuro_merging"), ("full", "task_arithmetic")])
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-dora",
        "llama-tied-embedding",
        "llama-tied-head-saved",
        "llama-tied-embedding-saved",
        "llama-norms-saved",
        "llama-bias-all",
        "t5",
        "t5-gated",
        "vit",
        "vit-dora",
        "clip-vision",
        "clip",
        "gpt2",
        "experts",
        "ia3",
    ],
)
def test_at_full_rank_nothing_is_lost(name: str, kind: str, method: str, tmp_path: Path, made) -> None:
    saved = made(name)
    source = content(method, saved if kind == "adapter" else saved.merged, saved.base)
    expected = in_full(source, tmp_path / "full")
    summary = as_adapter(source, tmp_path / "adapter", precision=EXACT)
    assert not summary.warnings
    found = merged_by_peft(saved.base, tmp_path / "adapter", tmp_path / "merged")
    assert set(found) == set(expected)
    for parameter, tensor in expected.items():
        torch.testing.assert_close(
            found[parameter], tensor, rtol=2e-6, atol=2e-6, msg=lambda m, p=parameter: f"{p}: {m}"
        )
    stored = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert stored == {"adapter_config.json", "adapter_model.safetensors", "README.md", "mergekit_config.yml", MARK}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and two full experts: every tensor has moved."""
    root = tmp_path_factory.mktemp("experts")
    base = save_base(cases.llama(), root / "base")
    for seed in (1, 2):
        model = cases.load(base)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(root / f"expert{seed}")
    return {"base": base, "one": root / "expert1", "two": root / "expert2"}


def two(experts: dict[str, Path], method: str = "task_arithmetic") -> str:
    models = [{"model": str(experts[name]), "parameters": {"weight": 0.5}} for name in ("one", "two")]
    return yaml.safe_dump({"merge_method": method, "base_model": str(experts["base"]), "models": models})


@pytest.mark.parametrize("precision", [Precision(rank=3), Precision(rank=None, energy=0.8), Precision(5, 0.6)])
def test_the_error_is_the_one_reported(precision: Precision, experts, tmp_path: Path) -> None:
    expected = in_full(two(experts), tmp_path / "full")
    summary = as_adapter(two(experts), tmp_path / "adapter", precision=precision)
    found = merged_by_peft(experts["base"], tmp_path / "adapter", tmp_path / "merged")
    base = tensors(experts["base"])
    by_kind: dict[str, list[str]] = {}
    for name, tensor in expected.items():
        if tensor.ndim > 1:
            by_kind.setdefault(name.split(".")[-2], []).append(name)
        else:
            torch.testing.assert_close(found[name], tensor)  # stored whole
    assert {kind.kind for kind in summary.kinds} == set(by_kind)
    for kind in summary.kinds:
        names = by_kind[kind.kind]
        missed = sum(float((found[n] - expected[n]).double().square().sum()) for n in names)
        update = sum(float((expected[n] - base[n]).double().square().sum()) for n in names)
        assert kind.error_norm == pytest.approx(math.sqrt(missed), rel=1e-3)
        assert kind.energy_kept == pytest.approx(1 - missed / update, rel=1e-3)
        assert len(kind.ranks) == len(names)
        if precision.energy is None:
            assert set(kind.ranks) == {precision.rank}
        elif precision.rank is None:
            assert kind.energy_kept >= precision.energy - 1e-6
            assert max(kind.ranks) < 16  # else energy would not be what decides
        else:
            assert max(kind.ranks) <= precision.rank


def test_ranks_per_module_where_energy_asks_for_them(experts, tmp_path: Path) -> None:
    as_adapter(two(experts), tmp_path / "adapter", precision=Precision(None, 0.8))
    config = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    assert config.rank_pattern
    assert config.rank_pattern == config.alpha_pattern
    assert config.r == config.lora_alpha
    model = peft.PeftModel.from_pretrained(cases.load(experts["base"]), tmp_path / "adapter")
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len({layer.r["default"] for layer in layers}) > 1
    assert {layer.scaling["default"] for layer in layers} == {1.0}


def test_config_names_base_and_revision(experts, tmp_path: Path) -> None:
    as_adapter(two(experts), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(experts["base"])
    assert config["revision"] is None
    assert config["task_type"] == "CAUSAL_LM"
    assert sorted(config["target_modules"]) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
    )
    revised = two(experts).replace(f"base_model: {experts['base']}", f"base_model: {experts['base']}@main")
    with pytest.raises(UserError, match="is a directory, which has no revisions; leave @main away"):
        as_adapter(revised, tmp_path / "revised")


def test_the_adapter_computes_what_the_merge_does_without_being_merged(experts, tmp_path: Path) -> None:
    merge_to_directory(two(experts), tmp_path / "full", progress=False)
    as_adapter(two(experts), tmp_path / "adapter", precision=EXACT)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    tokens = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens).logits, cases.load(tmp_path / "full").eval()(tokens).logits, rtol=1e-4, atol=1e-4
        )


def test_what_is_lost_is_said(experts, tmp_path: Path) -> None:
    summary = as_adapter(two(experts), tmp_path / "poor", precision=Precision(rank=1))
    (warning,) = summary.warnings
    assert "less than 90 %" in warning
    assert "q_proj" in warning
    assert "warning: less than 90 %" in str(summary)
    kept = as_adapter(two(experts), tmp_path / "good", precision=Precision(None, 0.95))
    assert not kept.warnings
    assert "q_proj: 2 matrices, rank" in str(kept)
    assert "% of the energy, error norm" in str(kept)


def test_dtype_of_the_factors(experts, tmp_path: Path) -> None:
    as_adapter(two(experts), tmp_path / "adapter", precision=adapter_precision(4, None, "bfloat16"))
    assert {tensor.dtype for tensor in tensors(tmp_path / "adapter").values()} == {torch.bfloat16}


def test_precision_of_the_options() -> None:
    assert adapter_precision(None, None, None) == Precision(64, None, torch.float32, asked=False)
    assert adapter_precision(8, None, "float16") == Precision(8, None, torch.float16)
    assert adapter_precision(None, 0.9, None) == Precision(None, 0.9, torch.float32)
    assert adapter_precision(8, 0.9, None) == Precision(8, 0.9, torch.float32)


def test_only_touched_modules_are_in_the_adapter(tmp_path: Path) -> None:
    base = save_base(cases.llama(), tmp_path / "base", torch.bfloat16)
    first = lora(target_modules=["q_proj"], layers_to_transform=[1])()
    adapters = [train(base, first, tmp_path / "a"), train(base, lora(target_modules=["up_proj"])(), tmp_path / "b", 1)]
    models = [{"model": str(adapter), "parameters": {"weight": 1.0}} for adapter in adapters]
    source = yaml.safe_dump({"merge_method": "task_arithmetic", "base_model": str(base), "models": models})
    summary = as_adapter(source, tmp_path / "out", precision=Precision(rank=4))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["model.layers.1.self_attn.q_proj", "up_proj"]
    assert all(kind.energy_kept > 1 - 1e-6 for kind in summary.kinds)
    factors = tensors(tmp_path / "out")
    for adapter in adapters:
        for key, value in tensors(adapter).items():
            if "lora_A" in key:
                other = key.replace("lora_A", "lora_B")
                expected = tensors(adapter)[other] @ value * (6 / 4)
                torch.testing.assert_close(factors[other] @ factors[key], expected, rtol=1e-3, atol=1e-6)
    assert len(factors) == 2 * 3


def test_a_base_is_found_where_all_models_are_its_adapters(tmp_path: Path, made) -> None:
    models = [{"model": str(made("llama").adapter), "parameters": {"weight": 1.0}}]
    source = yaml.safe_dump({"merge_method": "linear", "models": models})
    as_adapter(source, tmp_path / "out", precision=EXACT)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(made("llama").base)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("base_model"), "an adapter needs a base; name it as base_model"),
        (lambda c: c.update(tokenizer={"source": "base"}), "an adapter cannot change the vocabulary"),
        (lambda c: [m["parameters"].update(weight=0.0) for m in c["models"]], "the merge changes nothing"),
    ],
)
def test_refused(change, says: str, experts, tmp_path: Path) -> None:
    configuration = yaml.safe_load(two(experts, "linear" if "needs a base" in says else "task_arithmetic"))
    change(configuration)
    with pytest.raises(UserError, match=says):
        as_adapter(yaml.safe_dump(configuration), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_another_number_of_layers_is_refused(experts, tmp_path: Path) -> None:
    sources = [[{"model": str(experts["one"]), "layer_range": r}] for r in ([0, 2], [1, 2])]
    configuration = {
        "merge_method": "passthrough",
        "base_model": str(experts["base"]),
        "slices": [{"sources": source} for source in sources],
    }
    with pytest.raises(UserError, match=r"layers|is not in the base"):
        as_adapter(yaml.safe_dump(configuration), tmp_path / "out")


def test_a_parameter_of_the_model_itself_has_no_place(tmp_path: Path, made) -> None:
    """CLIP's logit_scale: said in the summary."""
    saved = made("clip")
    expert = Path(shutil.copytree(saved.merged, tmp_path / "expert"))
    model = transformers.CLIPModel.from_pretrained(expert)
    with torch.no_grad():
        model.logit_scale.add_(1.0)
    model.save_pretrained(expert)
    summary = as_adapter(content("task_arithmetic", expert, saved.base), tmp_path / "adapter", precision=EXACT)
    assert summary.left_out == ["logit_scale"]
    assert "peft has no place for it: logit_scale" in summary.warnings[0]


def test_an_existing_output_is_left_alone_unless_forced(experts, tmp_path: Path) -> None:
    as_adapter(two(experts), tmp_path / "adapter", precision=Precision(rank=1))
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        as_adapter(two(experts), tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before
    as_adapter(two(experts), tmp_path / "adapter", precision=Precision(rank=2), force=True)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() != before


@pytest.mark.parametrize("model", [cases.clip_vision, cases.gpt_oss])
def test_a_module_stored_whole_for_a_parameter_of_its_own_is_named_without_its_children(model, tmp_path: Path) -> None:
    base = save_base(model(), tmp_path / "base")
    moved = cases.load(base)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    moved.save_pretrained(tmp_path / "moved")
    source = content("task_arithmetic", tmp_path / "moved", base)
    expected = in_full(source, tmp_path / "full")
    as_adapter(source, tmp_path / "adapter", precision=EXACT)
    found = merged_by_peft(base, tmp_path / "adapter", tmp_path / "merged")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-6, atol=2e-6, msg=lambda m, p=name: f"{p}: {m}")
