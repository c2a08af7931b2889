"""What is put into mergekit, seen from mergekit's side."""

import itertools
import os
import subprocess
import sys

import huggingface_hub
import mergekit.card
import mergekit.merge
import mergekit.plan
import pytest
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import registry
from mergekit.scripts import merge_raw_pytorch

from neuron_methods.plugin import registration

registration.register()


def everything_patched():
    return [
        mergekit.plan.MergePlanner._plan,
        merge_raw_pytorch.plan_flat_merge,
        LoaderCache.get,
        MergeConfiguration.referenced_models,
        mergekit.merge._get_donor_model,
        mergekit.card.is_hf,
    ]


def test_registering_again_changes_nothing():
    names = [method.spec.name for method in registry.registered_methods()]
    patched = everything_patched()
    registration.register()
    registration.patch_planner()
    registration.patch_raw_merge()
    registration.patch_loaders()
    registration.patch_configuration()
    registration.patch_merge()
    assert [method.spec.name for method in registry.registered_methods()] == names
    assert everything_patched() == patched


def test_our_methods_are_there_once():
    names = [method.spec.name for method in registry.registered_methods()]
    assert names.count("neuro_merging") == 1
    assert registry.get("neuro_merging").spec.reference_url == "https://arxiv.org/abs/2503.05320"


def test_registering_says_what_of_mergekit_could_not_be_extended():
    code = """
import mergekit.plan
del mergekit.plan.MergePlanner._plan
import neuron_methods
try:
    neuron_methods.register()
except RuntimeError as error:
    print(error)
"""
    environment = {**os.environ, "MERGEKIT_NEURON_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "mergekit could not be extended: neuron_methods.plugin.registration:patch_planner" in done.stdout


def test_names_cost_mergekit_no_import_of_transformers():
    code = """
import sys
from mergekit.merge_methods import registry
print(registry.get("neuron_merge").spec.name, "transformers" in sys.modules, "datasets" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["neuron_merge", "False", "False"]


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Directories, so that nobody looks for these models elsewhere."""
    monkeypatch.chdir(tmp_path)
    for name in ("zeta", "alpha", "mid"):
        (tmp_path / name).mkdir()


@pytest.mark.parametrize("order", list(itertools.permutations(["zeta", "alpha", "mid"])))
def test_models_come_in_the_order_of_the_yaml_the_base_first(models, order):
    configuration = MergeConfiguration.model_validate(
        {"merge_method": "ties", "base_model": order[2], "models": [{"model": model} for model in order]}
    )
    assert [str(model) for model in configuration.referenced_models()] == [order[2], order[0], order[1]]


def test_models_of_slices_and_modules_come_in_order(models):
    sources = [[{"model": m, "layer_range": [0, 1]} for m in pair] for pair in (["zeta", "alpha"], ["mid", "zeta"])]
    sliced = {"merge_method": "linear", "slices": [{"sources": pair} for pair in sources]}
    assert [str(m) for m in MergeConfiguration.model_validate(sliced).referenced_models()] == ["zeta", "alpha", "mid"]
    modules = {
        "b": {"models": [{"model": "zeta"}]},
        "a": {"slices": [{"sources": sources[0]}]},
    }
    moduled = {"merge_method": "linear", "modules": modules}
    assert [str(m) for m in MergeConfiguration.model_validate(moduled).referenced_models()] == ["zeta", "alpha"]


def test_the_card_asks_nobody_about_what_exists_here(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "repo_exists", lambda path, **_: asked.append(path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not mergekit.card.is_hf("a/b")
    assert not mergekit.card.is_hf("a")
    assert mergekit.card.is_hf("somebody/something")
    assert asked == []


@pytest.mark.parametrize(
    "module", ["methods.min_merging", "methods.neuro_merging", "plugin.registration", "kernels.elect"]
)
def test_any_module_of_ours_may_be_imported_before_mergekit(module):
    code = f"""
import neuron_methods.{module}
import neuron_methods
neuron_methods.register()
from mergekit.merge_methods import registry
print(registry.get("min_merging").spec.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "min_merging"), done.stderr
