"""What models are called on cards and in what is uploaded."""

import yaml
from mergekit.config import MergeConfiguration

from neuron_methods.sharing.model_names import ModelNames, is_hub_id, reduced_json, reduced_yaml
from neuron_methods.support.local_names import local_names

SOURCE = """# experts from /home/me/secret/notes.txt, see https://example.org/a/b
merge_method: min_merging
base_model: /home/me/models/base   # trained here
models:
  - model: /home/me/models/math/full
    parameters:
      profile: "/home/me/profiles/math.safetensors"
      weight: 0.5
  - model: '../models/code/full'
  - model: org/base@main+/home/me/adapters/law
  - model: org/expert
dtype: bfloat16
"""


def test_local_paths_go_by_the_last_component_that_tells_them_apart():
    names = local_names(["/a/base", "experts/math/full", "experts/code/full", "./x/", "/y/x", "z\\x"])
    assert list(names.values()) == ["base", "math", "code", "x", "y", "z"]
    assert local_names(["/a/x", "/a//x"]) == {"/a/x": "x", "/a//x": "x-2"}
    assert local_names(["/", "~"]) == {"/": "model", "~": "model-2"}


def test_what_exists_here_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/model") and is_hub_id("gpt2")
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert not is_hub_id("org/model")
    for path in ("./model", "/model", "~/model", "a/b/c", "model/", "C:\\models\\x", "../x"):
        assert not is_hub_id(path), path


def test_a_record_of_the_merge_decides_where_the_directory_is_not_here():
    assert not is_hub_id("demo/base", known=[])
    assert is_hub_id("demo/base", known=["demo/base"])
    assert not is_hub_id("./demo", known=["./demo"])


def test_a_yaml_shows_no_path_and_means_the_same():
    names = ModelNames(MergeConfiguration.model_validate(yaml.safe_load(SOURCE)))
    assert names.hub == ["org/base", "org/expert"]
    reduced = reduced_yaml(SOURCE, names)
    assert "/home" not in reduced and "secret" not in reduced and ".." not in reduced
    assert reduced.splitlines()[0] == "# experts from notes.txt, see https://example.org/a/b"
    assert "base_model: ./base   # trained here" in reduced
    content = yaml.safe_load(reduced)
    assert [entry["model"] for entry in content["models"]] == [
        "./math",
        "./code",
        "org/base@main+./law",
        "org/expert",
    ]
    assert content["models"][0]["parameters"] == {"profile": "./math.safetensors", "weight": 0.5}
    again = ModelNames(MergeConfiguration.model_validate(content))
    assert reduced_yaml(reduced, again) == reduced


def test_relative_directories_do_not_pass_for_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "base").mkdir(parents=True)
    source = "merge_method: linear\nmodels:\n- model: demo/base\n- model: org/expert\n"
    configuration = MergeConfiguration.model_validate(yaml.safe_load(source))
    names = ModelNames(configuration)
    assert "model: ./base" in reduced_yaml(source, names)
    assert names.markdown(configuration.models[0].model) == "`base` (a local directory)"
    assert names.markdown(configuration.models[1].model) == "[org/expert](https://huggingface.co/org/expert)"


def test_json_loses_paths_and_nothing_else():
    content = {
        "_name_or_path": "/home/me/models/base",
        "base_model_name_or_path": "demo/base",
        "added": ["/", "a/b", "text with /home/me in it\n", 3, None, "~/x/y", "C:\\x\\y"],
    }
    assert reduced_json(content, {"demo/base": "base"}) == {
        "_name_or_path": "base",
        "base_model_name_or_path": "base",
        "added": ["/", "a/b", "text with /home/me in it\n", 3, None, "y", "y"],
    }
