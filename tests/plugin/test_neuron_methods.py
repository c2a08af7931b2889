"""min_merging and neuron_merge as a user meets them: a YAML, mergekit's own way of running it, plain transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from neuron_methods import register
from neuron_methods.neurons import neuron_map
from neuron_methods.plugin.configuration import read_configuration
from neuron_methods.plugin.describe import describe_plan
from neuron_methods.plugin.merging import merge_to_directory, plan_merge
from neuron_methods.support.errors import UserError
from tests.adapters.cases import CASES, load, save_base, train
from tests.adapters.cases import merge as merge_by_peft
from tests.support.checkpoints import FAMILIES, StateDict, read, save_family
from tests.support.plans import neuron, write_groups

KINDS = ["llama-tied", "t5-gated", "t5-ungated", "vit", "clip"]
OPTIONS = {"quiet": True, "write_model_card": False, "copy_tokenizer": False}
NAMES = ["general", "math", "code"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    register()
    LoaderCache.loaders.clear()
    yield
    LoaderCache.loaders.clear()


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, save_family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("llama"), "llama-untied")


def content(method: str, base: Path, experts: dict[Any, dict[str, Any]], **parameters: Any) -> dict[str, Any]:
    models = [{"model": str(path), "parameters": own} for path, own in experts.items()]
    return {"merge_method": method, "base_model": str(base), "models": models, "parameters": parameters}


def stock(configuration: dict[str, Any], out: Path) -> StateDict:
    LoaderCache.loaders.clear()
    run_merge(MergeConfiguration.model_validate(configuration), str(out), MergeOptions(**OPTIONS))
    return read(out)


def both(folder: Path, tmp_path: Path, experts: tuple[str, str]) -> dict[str, dict[str, Any]]:
    config = transformers.AutoConfig.from_pretrained(folder / "base")
    groups = write_groups(tmp_path / "groups.json", config, NAMES)
    a, b = experts
    return {
        "min_merging": content("min_merging", folder / "base", {a: {"density": 0.4}, b: {"density": 0.7}}),
        "neuron_merge": content(
            "neuron_merge",
            folder / "base",
            {a: {"group": "math", "out_group": 0.3}, b: {"group": "code", "weight": 0.8}},
            groups=groups,
            rest="neuro_merging",
        ),
    }


@pytest.mark.parametrize("method", ["min_merging", "neuron_merge"])
def test_full_experts_merge_and_load(family: tuple[str, Path], method: str, tmp_path: Path) -> None:
    kind, folder = family
    experts = (str(folder / "expert-a"), str(folder / "expert-b"))
    merged = stock(both(folder, tmp_path, experts)[method], tmp_path / "out")
    base = read(folder / "base")
    assert merged.keys() == base.keys()
    assert all(merged[name].shape == tensor.shape for name, tensor in base.items())
    model = FAMILIES[kind].model_class.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        (logits, *_) = model(**FAMILIES[kind].inputs, return_dict=False)
    assert torch.isfinite(logits).all()
    changed = [layer for layer in neuron_map(model.config).layers if not _same(merged, base, layer)]
    assert len(changed) == len(neuron_map(model.config).layers)


def _same(merged: StateDict, base: StateDict, layer: Any) -> bool:
    return all(torch.equal(neuron(merged, layer, i), neuron(base, layer, i)) for i in range(layer.neurons))


@pytest.mark.parametrize("method", ["min_merging", "neuron_merge"])
@pytest.mark.parametrize("case", ["llama-patterns", "t5", "t5-gated", "vit"])
def test_adapter_experts_merge_like_what_peft_makes_of_them(case: str, method: str, tmp_path: Path) -> None:
    base = save_base(CASES[case].model(), tmp_path / "base")
    adapters, merged = [], []
    for seed in range(2):
        adapters.append(str(train(base, CASES[case].config(), tmp_path / f"adapter-{seed}", seed)))
        merged.append(str(merge_by_peft(base, Path(adapters[-1]), tmp_path / f"full-{seed}")))
    direct = stock(both(tmp_path, tmp_path, tuple(adapters))[method], tmp_path / "direct")
    through = stock(both(tmp_path, tmp_path, tuple(merged))[method], tmp_path / "through")
    assert direct.keys() == through.keys()
    for name, tensor in through.items():
        close = torch.isclose(direct[name], tensor, atol=2e-5)
        # The trimming of neuro_merging turns on single entries, which peft's rounding may decide.
        assert float((~close).float().mean()) <= 0.02, name
    load(tmp_path / "direct")


def test_our_command_verifies_the_result(llama: Path, tmp_path: Path) -> None:
    configuration = both(llama, tmp_path, (str(llama / "expert-a"), str(llama / "expert-b")))["min_merging"]
    source = yaml.safe_dump({**configuration, "dtype": "bfloat16"})
    summary = merge_to_directory(source, tmp_path / "out", progress=False)
    assert "complete and verified" in str(summary)
    assert {tensor.dtype for tensor in read(tmp_path / "out").values()} == {torch.bfloat16}


def test_parameters_of_inner_methods_are_written_as_usual(llama: Path, tmp_path: Path) -> None:
    experts = {str(llama / "expert-a"): {"weight": 0.3, "rest_density": 0.2}, str(llama / "expert-b"): {}}
    rest = [{"filter": "embed", "value": "base"}, {"filter": "lm_head", "value": "ties"}, {"value": "linear"}]
    configuration = content("min_merging", llama / "base", experts, rest=rest, normalize=False, rest_density=0.6)
    read_configuration(yaml.safe_dump(configuration))
    merged = stock(configuration, tmp_path / "out")
    base, a, b = (read(llama / name) for name in ("base", "expert-a", "expert-b"))
    assert torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    norm = "model.norm.weight"
    assert torch.allclose(merged[norm], 0.3 * a[norm] + b[norm], atol=1e-6)
    ties = content(
        "ties",
        llama / "base",
        {
            str(llama / "expert-a"): {"weight": 0.3, "density": 0.2},
            str(llama / "expert-b"): {"weight": 1, "density": 0.6},
        },
        normalize=False,
    )
    assert torch.allclose(merged["lm_head.weight"], stock(ties, tmp_path / "ties")["lm_head.weight"], atol=1e-6)


def test_rest_by_neuro_merging_measures_its_tensors_alone(llama: Path, tmp_path: Path) -> None:
    experts = {str(llama / f"expert-{e}"): {} for e in "ab"}
    configuration = content("min_merging", llama / "base", experts, rest="neuro_merging", rest_density=0.3)
    merged = stock(configuration, tmp_path / "out")
    from mergekit.merge_methods import merge_state_dicts

    names = ["model.embed_tokens.weight", "lm_head.weight"]
    names += [name for name in merged if "norm" in name]
    inputs = {e: {name: read(llama / e)[name] for name in names} for e in ("base", "expert-a", "expert-b")}
    expected = merge_state_dicts(inputs, "neuro_merging", base="base", parameters={"density": 0.3})
    for name in names:
        assert torch.allclose(merged[name], expected[name], atol=1e-5), name


def test_a_dry_run_shows_the_parameters_of_inner_methods(llama: Path, tmp_path: Path) -> None:
    del tmp_path
    experts = {str(llama / f"expert-{e}"): {} for e in "ab"}
    source = yaml.safe_dump(content("min_merging", llama / "base", experts, rest="ties", rest_density=0.25))
    text = describe_plan(plan_merge(source))
    assert "rest=ties" in text
    assert "rest_density=0.25" in text
    assert "None" not in text


def test_a_misspelt_parameter_of_an_inner_method_is_refused(llama: Path) -> None:
    source = yaml.safe_dump(content("min_merging", llama / "base", {str(llama / "expert-a"): {}}, rest_densty=0.25))
    with pytest.raises(UserError, match="no parameter 'rest_densty'"):
        read_configuration(source)
    source = yaml.safe_dump(content("min_merging", llama / "base", {str(llama / "expert-a"): {}}, rest="tie"))
    with pytest.raises(UserError, match="did you mean 'ties'"):
        read_configuration(source)


def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path: Path) -> None:
    import json

    folder = save_family(tmp_path, "llama-untied")
    for name in ("base", "expert-a", "expert-b"):
        path = folder / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 20}))
    experts = {str(folder / f"expert-{e}"): {} for e in "ab"}
    with pytest.raises(UserError, match="do config and weights belong together"):
        stock(content("min_merging", folder / "base", experts), tmp_path / "out")
