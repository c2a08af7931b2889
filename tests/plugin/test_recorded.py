"""What was chosen for the heads, in the comments of a YAML on record, and which files the YAML names."""

import pytest
import yaml

from neuron_methods.plugin.recorded import recorded_head, with_head
from neuron_methods.plugin.run import named_files

YAML = "merge_method: linear\nmodels: []\n"


@pytest.mark.parametrize("before", ["", "# Mine.\n", "# Mine.\n#\n"])
def test_what_is_said_is_found_and_replaced(before):
    said = with_head(before + YAML, "base")
    assert recorded_head(said) == "base"
    assert said.endswith(before + YAML)
    again = with_head(f"{before}{said}", "../models/digits")
    assert recorded_head(again) == "../models/digits"
    assert again.count("--head") == 1 and again.endswith(YAML)
    assert with_head(again, None) == with_head(again, "../models/digits") == again


def test_nothing_is_found_where_nothing_is_said():
    assert recorded_head(YAML) is recorded_head("") is recorded_head("# mergekit-neuron merge --head \n") is None
    assert recorded_head(f"{YAML}# mergekit-neuron merge --head base\n") is None


def test_a_choice_of_several_lines_adds_no_word_to_the_yaml():
    assert with_head(YAML, "base\nmerge_method: ties").count("\n") == YAML.count("\n") + 1


FILES = """
models:
- model: a
  parameters: {profile: a.safetensors, data: math, weight: 1}
- model: b
  parameters:
    rest_profile: [{filter: mlp, value: b.safetensors}, {value: c.safetensors}]
parameters: {groups: groups.json, rest: neuron_response, density: [0.1, 0.9]}
"""


def test_files_are_found_wherever_a_parameter_names_them():
    found = named_files(yaml.safe_load(FILES))
    assert found == {"a.safetensors", "b.safetensors", "c.safetensors", "groups.json"}
