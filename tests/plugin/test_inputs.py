"""Models that cannot be opened, and what is said about each."""

import json
import os
import shutil

import pytest
import torch
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from neuron_methods.plugin.configuration import read_configuration
from neuron_methods.plugin.inputs import opened_models
from neuron_methods.plugin.patches import register
from neuron_methods.support.errors import UserError
from tests.support.checkpoints import build, configuration, edit, fine_tune, save

register()


def open_all(source=None, **options):
    with opened_models(read_configuration(source or configuration()), MergeOptions(**options)):
        return {str(model): len(loader.index.tensor_paths) for model, loader in LoaderCache.loaders.items()}


def refused(match, source=None, **options):
    with pytest.raises(UserError, match=match) as caught:
        open_all(source, **options)
    assert "\n" not in str(caught.value)
    assert LoaderCache.loaders == {}


def pickle(path):
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def test_sound_models_are_open_within_the_block_only(workspace):
    workspace("llama-tied")
    assert open_all() == {"base": 20, "expert-a": 20, "expert-b": 20}
    assert LoaderCache.loaders == {}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./none", r"model ./none: no such directory; check the path"),
        ("/none/at/all", "model /none/at/all: no such directory"),
        ("a/b/c", "model a/b/c: no such directory"),
        ("none/", "model none/: no such directory"),
        ("~/none", "model ~/none: no such directory; write the home directory out"),
        ("expert-a/config.json", "model expert-a/config.json: a file, not a directory"),
    ],
)
def test_a_path_that_is_no_model(workspace, path, message):
    workspace("llama-tied")
    refused(message, configuration(models=[{"model": path}]))


def test_config_missing(workspace):
    os.remove(workspace("llama-tied") / "expert-a" / "config.json")
    refused("model expert-a: the directory has no config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(model_type="nonsense"), "model expert-a: config.json: .*`nonsense`"),
        (lambda config: config.clear(), "model expert-a: config.json: Unrecognized model"),
        (lambda config: config.pop("architectures"), "model expert-a: its config.json names no architectures"),
    ],
)
def test_config_wrong(workspace, change, message):
    file = workspace("llama-tied") / "expert-a" / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    refused(message)


def test_config_unreadable(workspace):
    (workspace("llama-tied") / "expert-a" / "config.json").write_text("{")
    refused("expert-a/config.json: truncated, or not valid JSON; download or save the model again")


def test_weights_missing(workspace):
    os.remove(workspace("llama-tied") / "expert-b" / "model.safetensors")
    refused("model expert-b: no weights in it")


@pytest.mark.parametrize("keep", [0, 60, -100])
def test_weights_truncated(workspace, keep):
    file = workspace("llama-tied") / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(r"base/model.safetensors: not a complete safetensors file .*; download or save it again")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "expert-a/model.safetensors.index.json: truncated, or not valid JSON; download or save"),
        ("{}", "expert-a/model.safetensors.index.json: weight_map: missing"),
        (json.dumps({"weight_map": {"a": "gone.safetensors"}}), "expert-a/gone.safetensors: no such file"),
    ],
)
def test_index_damaged(workspace, index, message):
    folder = workspace("llama-tied") / "expert-a"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    refused(message)


def test_a_truncated_shard_is_found_before_it_is_needed(workspace):
    folder = workspace("llama-tied") / "expert-a"
    shutil.rmtree(folder)
    save(fine_tune(build("llama-tied"), 0), folder, max_shard_size="10KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert open_all()["expert-a"] == 20
    shards[-1].write_bytes(shards[-1].read_bytes()[:-8])
    refused(f"{shards[-1].name}: not a complete safetensors file")


def test_pickles_are_not_read_unasked(workspace):
    pickle(workspace("llama-tied") / "expert-a")
    refused("model expert-a: its weights are a pickle .*--lazy-unpickle")
    assert open_all(lazy_unpickle=True)["expert-a"] == 20


class Surprise:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("lazy", [False, True])
def test_no_pickle_executes_anything(workspace, lazy):
    folder = workspace("llama-tied")
    pickle(folder / "expert-a")
    torch.save({"a": Surprise()}, folder / "expert-a" / "pytorch_model.bin")
    refused(
        "pytorch_model.bin: cannot be read back as a pickle of tensors and nothing else"
        if lazy
        else "read only on request",
        lazy_unpickle=lazy,
    )
    assert not (folder / "executed").exists()


def test_safetensors_are_preferred_to_pickles(workspace):
    folder = workspace("llama-tied") / "expert-a"
    torch.save({"a": Surprise()}, folder / "pytorch_model.bin")
    assert open_all()["expert-a"] == 20


def test_a_model_that_changed_between_two_merges_is_read_anew(workspace):
    folder = workspace("llama-tied")
    open_all()
    edit(folder / "expert-a", lambda tensors: tensors.pop("model.norm.weight"))
    assert open_all()["expert-a"] == 19
