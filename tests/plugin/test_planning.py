"""Our methods under mergekit's own entry points: its planners, its executor, its in-memory functions."""

from pathlib import Path

import pytest
import torch
import yaml
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.merge_methods.api import merge_state_dicts
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, SimpleLoaderCache, plan_flat_merge
from safetensors.torch import load_file, save_file

from neuron_methods.methods import trim_profile
from neuron_methods.plugin import patches
from neuron_methods.plugin.merging import merge_to_directory
from neuron_methods.plugin.planning import MeasureTask, PlannedMergeTask
from neuron_methods.support.errors import UserError
from tests.support.checkpoints import configuration, edit, read
from tests.support.merges import EXPERTS, same

patches.register()

QUIET = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False)


@pytest.fixture(autouse=True)
def fresh_loaders():
    LoaderCache.loaders.clear()
    SimpleLoaderCache().loaders.clear()
    yield
    LoaderCache.loaders.clear()
    SimpleLoaderCache().loaders.clear()


def parsed(source):
    return MergeConfiguration.model_validate(yaml.safe_load(source))


def ours(source=None, out="ours"):
    merge_to_directory(source or configuration(), out, progress=False)
    return read(Path(out))


def planned(source, options=QUIET):
    config = parsed(source)
    LoaderCache().setup(options)
    base = config.base_model.config()
    return MergePlanner(config, get_architecture_info(config, options), options=options, out_model_config=base)


VARIANTS = {
    "plain": {},
    "dtype": {"dtype": "bfloat16"},
    "dtypes": {"dtype": "bfloat16", "out_dtype": "float32"},
    "per tensor": {"parameters": {"trim": "tensor", "density": [0.1, 0.9]}},
    "sum": {"parameters": {"consensus": "sum", "lambda_parallel": 0.5}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_mergekits_run_gives_the_same_tensors(workspace, variant):
    workspace("llama-tied")
    source = configuration(**VARIANTS[variant])
    run_merge(parsed(source), "stock", QUIET)
    assert same(read(Path("stock")), ours(source))


def test_the_in_memory_planner_gives_the_same_tensors(workspace):
    workspace("llama-tied")
    source = configuration(dtype="bfloat16")
    executor = Executor(planned(source).plan_in_memory())
    tensors = {task.weight_info.name: tensor for task, tensor in executor.run(quiet=True)}
    assert same(tensors, ours(source))


def test_one_call_with_all_tensors_gives_the_same(workspace):
    folder = workspace("llama-tied")
    tensors = merge_state_dicts(
        {name: read(folder / name) for name in ("base", *EXPERTS)}, "neuro_merging", base="base"
    )
    for name, tensor in ours().items():
        torch.testing.assert_close(tensors[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_measuring_happens_once_and_before_everything_else(workspace, monkeypatch):
    workspace("llama-tied")
    order = []
    measure = trim_profile.measure_model
    monkeypatch.setattr(
        "neuron_methods.methods.neuro_merging.measure_model",
        lambda *arguments: order.append("measure") or measure(*arguments),
    )
    execute = PlannedMergeTask.execute
    monkeypatch.setattr(
        PlannedMergeTask, "execute", lambda self, **arguments: order.append("merge") or execute(self, **arguments)
    )
    run_merge(parsed(configuration()), "stock", QUIET)
    assert order == ["measure"] + ["merge"] * 20


def test_other_methods_are_planned_as_mergekit_plans_them(workspace):
    workspace("llama-tied")
    planner = planned(configuration("ties", parameters={"density": 0.5, "weight": 1}))
    assert not any(isinstance(task, MeasureTask) for task in Executor(planner.plan_to_disk("out")).universe.tasks)
    assert all(task.measure is None for _, task in planner._tensors if isinstance(task, PlannedMergeTask))


def test_what_the_method_refuses_is_refused_before_any_tensor_is_read(workspace):
    folder = workspace("llama-tied")
    for name in EXPERTS:
        file = folder / name / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-500] + b"\xff" * 500)  # NaN, if anyone looked
    with pytest.raises(UserError, match=r"density of expert-a varies"):
        planned(configuration(parameters={"density": [0.1, 0.9]})).plan_to_disk("out")
    with pytest.raises(UserError, match=r"trim varies over the tensors"):
        trim = [{"filter": "mlp", "value": "tensor"}, {"value": "model"}]
        planned(configuration(parameters={"trim": trim})).plan_to_disk("out")
    assert not Path("out").exists()


# --- mergekit-pytorch


def flat(out="flat", union=False, intersection=False, options=QUIET, **keys):
    paths = {name: f"{name}/model.safetensors" for name in ("base", *EXPERTS)}
    config = RawPyTorchMergeConfig.model_validate(
        {
            "merge_method": "neuro_merging",
            "base_model": paths["base"],
            "models": [{"model": paths[name]} for name in EXPERTS],
            **keys,
        }
    )
    Executor(plan_flat_merge(config, out, union, intersection, options)).execute()
    return load_file(f"{out}/model.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_mergekit_pytorch_gives_the_same_tensors(workspace, variant):
    if variant == "per tensor":  # a gradient needs layers
        keys = {"parameters": {"trim": "tensor", "density": [{"filter": "mlp", "value": 0.5}, {"value": 0.1}]}}
    else:
        keys = VARIANTS[variant]
    workspace("llama-tied")
    whole = ours(configuration(**keys))
    tensors = flat(**keys)
    assert tensors.keys() == whole.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == whole[name].dtype
        # Sums over all tensors are added up in another order.
        torch.testing.assert_close(tensor, whole[name], atol=1e-6, rtol=2**-7 if variant == "dtype" else 0, msg=name)


def test_mergekit_pytorch_takes_the_parameters_of_inner_methods(workspace):
    workspace("llama-tied")
    keys = {"merge_method": "min_merging", "parameters": {"rest": "ties", "rest_density": 0.3, "normalize": False}}
    whole = ours(configuration(**keys))
    flat_tensors = flat(**keys)
    assert same(flat_tensors, whole)
    SimpleLoaderCache().loaders.clear()
    keys["parameters"]["rest_density"] = 0.9
    assert not same(flat("denser", **keys), flat_tensors)


def test_mergekit_pytorch_in_another_order_of_names_gives_the_same_bytes(workspace, monkeypatch):
    workspace("llama-tied")
    first = flat("first")
    monkeypatch.setattr(
        "mergekit.scripts.merge_raw_pytorch.list", lambda names: sorted(names, reverse=True), raising=False
    )
    assert same(flat("second"), first)


def test_mergekit_pytorch_with_tensors_that_only_some_files_hold(workspace):
    folder = workspace("llama-tied")
    odd = torch.rand(3, 4)
    edit(folder / "base", lambda tensors: tensors.update(odd=odd))
    edit(folder / "expert-a", lambda tensors: tensors.update(odd=odd + 1))
    common = flat("common", intersection=True)
    assert "odd" not in common
    assert len(common) == 20
    parameters = {"density": 1.0, "consensus": "sum", "lambda_parallel": 1.0, "lambda_orthogonal": 1.0}
    SimpleLoaderCache().loaders.clear()
    union = flat("union", union=True, parameters=parameters)
    torch.testing.assert_close(union["odd"], odd + 1, atol=1e-5, rtol=0)


def test_mergekit_pytorch_trims_over_all_tensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zeros = {"large": torch.zeros(4, 5), "small": torch.zeros(4, 5)}
    expert = {"large": torch.linspace(1, 2, 20).reshape(4, 5), "small": torch.linspace(0.1, 0.2, 20).reshape(4, 5)}
    for name, tensors in (("base", zeros), ("expert", expert)):
        save_file(tensors, f"{name}.safetensors")
    config = {
        "merge_method": "neuro_merging",
        "base_model": "base.safetensors",
        "models": [{"model": "expert.safetensors"}],
        "parameters": {"density": 0.5, "lambda_orthogonal": 1.0},
    }
    Executor(plan_flat_merge(RawPyTorchMergeConfig.model_validate(config), "out", False, False, QUIET)).execute()
    merged = load_file("out/model.safetensors")
    torch.testing.assert_close(merged["large"], expert["large"])
    assert int((merged["small"] != 0).sum()) == 1  # the threshold itself, ⌊n/2⌋-th of n, is kept


def test_quiet_is_quiet(workspace, capfd):
    workspace("llama-tied")
    run_merge(parsed(configuration()), "stock", QUIET)
    assert "Measuring" not in capfd.readouterr().err
    flat()
    assert "Measuring" not in capfd.readouterr().err
    flat("loud", options=MergeOptions())
    assert "Measuring trim thresholds" in capfd.readouterr().err
