"""No path of this machine leaves it, wherever in an output it stands and however it is spelled."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from safetensors.torch import load_file, save_file

from neuron_methods.cli import main
from neuron_methods.sharing.model_names import ModelNames, reduced_json, reduced_text, reduced_yaml
from tests.sharing.conftest import standin  # noqa: F401

#: Spellings of a path; `SECRET` may not be left of any.
PATHS = [
    "/home/SECRET/models/base",
    "/home/SECRET/my SECRET models/base",
    "/home/SECRET",
    "/Users/SECRET/it's/base",
    '/mnt/SECRET "x"/base',
    "~/SECRET/base",
    "~SECRET/models/base",
    "../SECRET/base",
    "../../SECRET models/base",
    "C:\\\\Users\\\\SECRET\\\\base".replace("\\\\", "\\"),
    "C:/Users/SECRET/my models/base",
    "\\\\server\\SECRET\\base",
    "file:///home/SECRET/base",
    "file:/SECRET/my models/base",
    "/data/SECRET#1/base",
    "/data/SECRET: a/base",
]
SPELLINGS = ["{}", '"{}"', "'{}'"]


@pytest.mark.parametrize("path", PATHS)
def test_no_spelling_of_a_path_is_left_in_yaml_json_and_text(path):
    source = yaml.safe_dump({"merge_method": "linear", "models": [{"model": path}, {"model": "org/model"}]})
    quoted = source.replace(yaml.safe_dump(path).splitlines()[0], json.dumps(path))
    for text in (source, quoted, f"# {path}\n" * ("#" not in path and "'" not in path and '"' not in path) + source):
        names = ModelNames(MergeConfiguration.model_validate(yaml.safe_load(text)))
        reduced = reduced_yaml(text, names)
        assert "SECRET" not in reduced
        assert yaml.safe_load(reduced)["models"][1]["model"] == "org/model"
    content = {"_name_or_path": path, "nested": [{"x": path}], path: 1}
    assert "SECRET" not in json.dumps(reduced_json(content))


def test_what_is_no_path_stays():
    for text in ("see https://example.org/a/b", "1/2 or 3/4", "org/model", "</s> [/INST]", "km/h and m/s", "data:a/b"):
        assert reduced_text(text) == text
        assert reduced_json(text) == text


def test_nothing_of_a_pushed_merge_names_this_machine(standin, checkpoints, tmp_path, monkeypatch):  # noqa: F811
    home = tmp_path / "SECRET user" / "it's here"
    shutil.copytree(checkpoints("llama-tied"), home)
    monkeypatch.chdir(home)
    models = [{"model": str(home / name)} for name in ("expert-a", "expert-b")]
    source = {"merge_method": "task_arithmetic", "base_model": str(home / "base"), "models": models}
    text = f"# made in {home}/x\n" + yaml.safe_dump({**source, "parameters": {"weight": 0.5}})
    (home / "merge.yml").write_text(text)
    done = CliRunner().invoke(main, ["merge", "merge.yml", "out", "--quiet"])
    assert done.exit_code == 0, done.output
    out = home / "out"
    for name in ("config.json", "generation_config.json"):
        content = json.loads((out / name).read_text())
        content |= {"_name_or_path": str(home / "base"), "nested": {"a": [f"--data {home}/x.json"]}}
        (out / name).write_text(json.dumps(content))
    with (out / "README.md").open("a") as card:
        card.write(f"\nTrained from {home}/expert-a on a machine.\n")
    save_file(
        load_file(out / "model.safetensors"), out / "model.safetensors", {"format": "pt", "from": str(home / "x")}
    )
    done = CliRunner().invoke(main, ["push", str(out), "alice/model", "--quiet"])
    assert done.exit_code == 0, done.output
    for name, content in standin.files("alice/model").items():
        assert b"SECRET" not in content and str(tmp_path).encode() not in content, name
    place = tmp_path / "back.safetensors"
    place.write_bytes(standin.files("alice/model")["model.safetensors"])
    assert load_file(place).keys() == load_file(out / "model.safetensors").keys()
