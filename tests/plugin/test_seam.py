"""What is put into mergekit, seen from mergekit's side; and a mergekit that it does not fit."""

import itertools
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import mergekit.card
import mergekit.merge
import mergekit.plan
import pytest
import transformers
from click.testing import CliRunner
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import registry
from mergekit.scripts import merge_raw_pytorch

from neuron_methods._autoload import CALLBACKS, Hook
from neuron_methods.cli import main
from neuron_methods.plugin import patches
from neuron_methods.plugin.seam import SEAM, check_fit
from neuron_methods.support.errors import UserError
from tests.support.checkpoints import configuration

patches.register()


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
    patches.register()
    patches.patch_planner()
    patches.patch_raw_merge()
    patches.patch_loaders()
    patches.patch_configuration()
    patches.patch_merge()
    assert [method.spec.name for method in registry.registered_methods()] == names
    assert everything_patched() == patched


def test_our_methods_are_there_once():
    names = [method.spec.name for method in registry.registered_methods()]
    assert names.count("neuro_merging") == 1
    assert registry.get("neuro_merging").spec.reference_url == "https://arxiv.org/abs/2503.05320"


# --- a mergekit that it does not fit

ENTRIES = [entry for entries in SEAM.values() for entry in entries]


@pytest.fixture(params=ENTRIES, ids=lambda entry: f"{entry.module}.{entry.name}")
def renamed(request, monkeypatch):
    """An entry of the table that this mergekit does not have."""
    holder, name, _ = request.param.find()
    if name in vars(holder):
        monkeypatch.delattr(holder, name)
    if name in getattr(holder, "__annotations__", {}):  # of what instances have
        monkeypatch.delitem(holder.__annotations__, name)
    return request.param


def test_the_table_fits_this_mergekit():
    check_fit(SEAM)
    assert all(entry.fits() for entry in ENTRIES)
    assert len({(entry.module, entry.name) for entry in ENTRIES}) == len(ENTRIES) > 20


def test_a_command_of_ours_ends_with_version_and_name_of_what_is_gone(renamed, workspace):
    workspace("llama-tied")
    Path("merge.yaml").write_text(configuration())
    result = CliRunner().invoke(main, ["merge", "merge.yaml", "out"])
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: mergekit {version('mergekit')} is not one that mergekit-neuron fits: {renamed}")
    assert not Path("out").exists()


def test_mergekit_itself_goes_on_with_one_line_that_says_so(renamed, monkeypatch, capfd):
    monkeypatch.delitem(sys.modules, "neuron_methods.cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    hook = Hook(CALLBACKS, own="neuron_methods.")
    hook.arm()  # all of mergekit has been imported
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: mergekit goes without mergekit-neuron, or a part of it: ")
    assert f"mergekit {version('mergekit')} " in line
    assert str(renamed) in line


def test_arguments_that_a_function_no_longer_takes_are_found(monkeypatch):
    monkeypatch.setattr(mergekit.merge, "_copy_tokenizer", lambda merge_config, out_dir, options: None)
    with pytest.raises(UserError, match=r"fits: mergekit.merge._copy_tokenizer\(merge_config, out_path, options\) is"):
        check_fit(SEAM)


UNFIT = """
import mergekit.tokenizer.build
from types import SimpleNamespace
mergekit.tokenizer.build.progress = SimpleNamespace(tqdm=mergekit.tokenizer.build.tqdm.tqdm)
del mergekit.tokenizer.build.tqdm  # no merge without `tokenizer` asks for it
from neuron_methods._autoload import arm
arm()
from mergekit.scripts.run_yaml import main
main(["merge.yaml", "out", "--quiet", "--no-write-model-card"])
"""


def test_a_run_of_mergekit_yaml_warns_and_merges(workspace):
    folder = workspace("llama-tied")
    Path("merge.yaml").write_text(configuration("linear"))
    environment = {**os.environ, "MERGEKIT_NEURON_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", UNFIT], env=environment, capture_output=True, text=True, check=True)
    assert (folder / "out" / "model.safetensors").exists()
    (line,) = [line for line in done.stderr.splitlines() if "mergekit-neuron" in line]
    assert "mergekit.tokenizer.build.tqdm is gone or has changed" in line


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


@pytest.mark.parametrize("module", ["methods.min_merging", "methods.neuro_merging", "plugin.seam", "kernels.elect"])
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


def test_no_word_of_definitions_that_mergekit_lacks_and_ours_fill(caplog):
    from mergekit.architecture import arch_info_for_config
    from transformers import PretrainedConfig

    patches.arm()
    with caplog.at_level("WARNING", "mergekit.architecture"):
        assert arch_info_for_config(PretrainedConfig(architectures=["NobodyKnowsForCausalLM"])) is None
    assert caplog.messages == []


def test_a_config_is_parsed_once_as_long_as_its_file_is_what_it_was(workspace, monkeypatch):
    workspace("llama-tied")
    for name in ("base", "expert-a"):  # as no test before
        file = Path(name, "config.json")
        file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 3e-06'))
    patches.arm()
    parsed, parse = [], transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(
        transformers.AutoConfig, "from_pretrained", lambda *args, **keys: parsed.append(args) or parse(*args, **keys)
    )
    base = ModelReference.parse("base")
    first = base.config()
    first.hidden_size = 7  # of the caller's own copy
    second, same = base.config(), ModelReference.parse("base").config()
    assert len(parsed) == 1
    assert second.to_dict() == same.to_dict() == parse("base").to_dict()
    assert ModelReference.parse("expert-a").config().name_or_path == "expert-a"
    assert len(parsed) == 2
    file = Path("base/config.json")
    file.write_text(file.read_text().replace('"rms_norm_eps": 3e-06', '"rms_norm_eps": 2e-06'))
    assert base.config().rms_norm_eps == 2e-6
    base.config(trust_remote_code=True)
    assert len(parsed) == 4
