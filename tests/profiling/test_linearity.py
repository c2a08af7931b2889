"""How far outputs are from linear in weights: exact on small modules, whole on tiny models, by command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from neuron_methods.cli import main
from neuron_methods.plugin.updates import plan_updates
from neuron_methods.profiling import linearity
from neuron_methods.profiling.linearity import SAME_SIZE, TASK_ARITHMETIC, measure_linearity, relative_error
from neuron_methods.profiling.measured_model import LoadedModel, load_model
from neuron_methods.support.errors import UserError
from tests.support.accelerator import DEVICE, accelerator
from tests.support.checkpoints import FAMILIES, edit, read, save_family
from tests.support.plans import write_groups
from tests.support.routed import save_adapter
from tests.support.tiny import build_tokenizer

torch.set_num_threads(1)


class Product(nn.Module):
    """A gated MLP without nonlinearity: (gate x) · (up x), then down."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x) * self.up(x))


@pytest.fixture
def product() -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    mlp = Product()
    base = {name: p.detach().clone() for name, p in mlp.named_parameters()}
    return mlp, base, {name: torch.zeros_like(p) for name, p in base.items()}


def test_a_change_of_the_down_projection_alone_is_linear(product) -> None:
    mlp, base, update = product
    update["down.weight"] = torch.randn(4, 4)
    assert relative_error(mlp, base, update, torch.randn(9, 4)) < 1e-12


def test_doubling_two_factors_is_quadratic(product) -> None:
    mlp, base, update = product
    update["gate.weight"], update["up.weight"] = base["gate.weight"].clone(), base["up.weight"].clone()
    # f(α) = (1 + α)² f(0): the error is |(1 + α)² − 1 − 3α| / 3 = α (1 − α) / 3.
    expected = sum(a * (1 - a) / 3 for a in (0.25, 0.5, 0.75)) / 3
    assert relative_error(mlp, base, update, torch.randn(9, 4)) == pytest.approx(expected)


def test_no_change_has_no_error(product) -> None:
    mlp, base, update = product
    assert relative_error(mlp, base, update, torch.randn(9, 4)) is None


@pytest.mark.parametrize("kind", ["llama-tied", "t5-gated", "t5-ungated", "vit", "clip"])
def test_every_layer_and_variant_is_measured(kind: str, tmp_path: Path) -> None:
    planned = plan_updates(configuration(kind, tmp_path))
    report = measure_linearity(planned, tokens=32)
    expected = ["expert-a", "expert-b", TASK_ARITHMETIC, "merge by neuron_merge", SAME_SIZE]
    assert report.variants == expected
    assert set(report.errors) == set(report.sizes)
    assert len(report.errors) == {"llama-tied": 2, "vit": 2}.get(kind, 4)
    for layer, errors in report.errors.items():
        assert all(0 < errors[v] < 1 for v in expected), layer
        assert report.sizes[layer][SAME_SIZE] == pytest.approx(report.sizes[layer]["merge by neuron_merge"], rel=1e-6)


@pytest.mark.parametrize(
    "kind", ["llama-tied", "vit"]
)  # in one of which nobody's update has the biases of the second layer
def test_it_is_measured_where_the_model_is(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan_updates(configuration(kind, tmp_path))
    expected = measure_linearity(planned, tokens=8)

    @contextmanager
    def load_there(*args: Any, **options: Any) -> Iterator[LoadedModel]:
        with load_model(*args, **options) as loaded:
            loaded.model.to(DEVICE)
            yield loaded

    monkeypatch.setattr(linearity, "load_model", load_there)
    with torch.no_grad(), accelerator():
        found = measure_linearity(planned, tokens=8)
    assert found.errors == expected.errors and found.sizes == expected.sizes


def configuration(kind: str, folder: Path) -> str:
    save_family(folder, kind)
    groups = write_groups(folder / "groups.json", FAMILIES[kind].config(), ["general", "math", "code"])
    return yaml.safe_dump(
        {
            "merge_method": "neuron_merge",
            "base_model": str(folder / "base"),
            "models": [
                {"model": str(folder / "expert-a"), "parameters": {"group": "math"}},
                {"model": str(folder / "expert-b"), "parameters": {"group": "code", "weight": 0.5}},
            ],
            "parameters": {"groups": groups},
        }
    )


def test_updates_are_those_of_the_merge(tmp_path: Path) -> None:
    planned = plan_updates(configuration("llama-tied", tmp_path))
    found = planned.of("model.layers.0.mlp.up_proj.weight")
    base, expert = (read(tmp_path / e)["model.layers.0.mlp.up_proj.weight"] for e in ("base", "expert-b"))
    assert torch.equal(found.base, base)
    assert torch.allclose(found.experts["expert-b"], expert - base)
    assert found.weights == {"expert-a": 1.0, "expert-b": 0.5}
    assert torch.allclose(found.merged[2::3], 0.5 * found.experts["expert-b"][2::3], atol=1e-6)


def test_what_is_advised_about_nan_is_an_option_of_the_command_named(tmp_path: Path) -> None:
    (tmp_path / "merge.yaml").write_text(configuration("llama-tied", tmp_path))
    edit(tmp_path / "expert-a", lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(float("nan")))
    result = CliRunner().invoke(main, ["linearity", str(tmp_path / "merge.yaml")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "expert-a; use a sound checkpoint; mergekit-neuron merge --allow-nonfinite" in result.stderr


def test_experts_in_directories_of_one_name_stay_apart(tmp_path: Path) -> None:
    source = configuration("llama-tied", tmp_path)
    for expert in "ab":
        (tmp_path / expert).mkdir()
        (tmp_path / f"expert-{expert}").rename(tmp_path / expert / "full")
        source = source.replace(f"expert-{expert}", f"{expert}/full")
    found = plan_updates(source).of("model.layers.0.mlp.up_proj.weight")
    assert set(found.experts) == {"a/full", "b/full"}
    assert not torch.equal(found.experts["a/full"], found.experts["b/full"])


def test_the_command_reads_data_and_writes_json(tmp_path: Path) -> None:
    config = tmp_path / "merge.yaml"
    config.write_text(configuration("llama-tied", tmp_path))
    build_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "texts.txt").write_text("one red cat\ntwo green dog and three blue house\n")
    data = ["--data", f"words={tmp_path / 'texts.txt'}"]
    result = CliRunner().invoke(main, ["linearity", str(config), *data, "-o", str(tmp_path / "l.json")])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0] == "inputs: words, read by the base"
    content = json.loads((tmp_path / "l.json").read_text())
    assert set(content["errors"]) == {"layers.0", "layers.1"}
    assert content["mean"]["expert-a"] > 0


def test_the_base_may_be_an_adapter_by_itself(tmp_path: Path) -> None:
    """Measured as if it had been merged before; its config names the base relative to itself."""
    config = tmp_path / "merge.yaml"
    config.write_text(configuration("llama-tied", tmp_path))
    build_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "texts.txt").write_text("one red cat\ntwo green dog and three blue house\n")
    adapter = save_adapter(tmp_path / "base", "llama", tmp_path / "adapter", seed=1)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "../base"}))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    PeftModel.from_pretrained(loaded, adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    build_tokenizer().save_pretrained(tmp_path / "merged")
    reports = []
    for base in ("adapter", "merged"):
        source = config.read_text().replace(str(tmp_path / "base"), str(tmp_path / base))
        reports.append(measure_linearity(plan_updates(source), [f"words={tmp_path / 'texts.txt'}"]))
    alone, merged = reports
    for layer, errors in merged.errors.items():
        assert alone.errors[layer] == pytest.approx(errors, rel=1e-3)
        assert alone.sizes[layer] == pytest.approx(merged.sizes[layer], rel=1e-3)


def test_a_configuration_without_a_base_is_refused() -> None:
    with pytest.raises(UserError, match="no base_model"):
        plan_updates("merge_method: linear\nmodels: [{model: ./a, parameters: {weight: 1}}]\n")
