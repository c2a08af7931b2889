"""The YAML: defaults, paths, and one line naming place and key for everything that is wrong."""

import pytest
import yaml

from neuron_methods.routing.route_yaml import read_config
from neuron_methods.support.errors import UserError

TWO = """\
base_model: ./base
experts:
  - name: a
    adapter: ./one
    data: {source: a.jsonl}
  - name: b
    adapter: org/two
    data: {source: org/data, split: train}
"""


def read(tmp_path, text):
    path = tmp_path / "routed.yaml"
    path.write_text(text)
    return read_config(path)


def refused(tmp_path, text):
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path / "routed.yaml") in message
    return message.split("routed.yaml", 1)[1]


def test_defaults_and_paths_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "a.jsonl").write_text("{}\n")
    monkeypatch.chdir("/")
    config = read(tmp_path, TWO)
    assert config.base_model == str(tmp_path / "base")
    assert config.experts[0].data.source == str(tmp_path / "a.jsonl")
    assert config.experts[1].adapter == "org/two"  # left to the hub
    assert (config.router.in_domain_share, config.router.top_k, config.enhancement.enabled) == (0.95, 2, True)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("adapter: ./one", "adaptor: ./one"), ", line 4: experts[0].adaptor: unknown key; did you mean 'adapter'?"),
        (("base_model", "base_modell"), ", line 1: base_modell: unknown key; did you mean 'base_model'?"),
        (("    data: {source: a.jsonl}\n", ""), ", line 3: experts[0].data: missing"),
        (("name: b", "name: a"), "two are called 'a'"),
        (("name: b", "name: b.c"), ", line 6: experts[1].name: 'b.c' is no name"),
        (("source: a.jsonl", "source: a.jsonl, columns: {inputs: x}"), "experts[0].data.columns.inputs"),
        (
            ("base_model: ./base", "base_model: ./base\nbase_model: ./other"),
            ", line 2, column 1: key 'base_model' appears twice",
        ),
        (("experts:", "experts: ["), ": not readable as YAML"),
    ],
)
def test_refuses_what_it_cannot_mean(tmp_path, change, expected):
    assert expected in refused(tmp_path, TWO.replace(*change))


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"router": {"top_k": 3}}, "router.top_k: 3 of 2 experts cannot be chosen"),
        ({"router": {"in_domain_share": 0}}, "router.in_domain_share"),
        ({"enhancement": {"importance": "size"}}, "enhancement.importance"),
        ({"merging": {"redundant": "all"}}, "merging.redundant"),
    ],
)
def test_refuses_values(tmp_path, section, expected):
    assert expected in refused(tmp_path, TWO + yaml.safe_dump(section))


def test_one_expert_is_none_to_choose_from(tmp_path):
    one = TWO[: TWO.index("  - name: b")]
    assert "experts: a router needs two or more to choose from, found 1" in refused(tmp_path, one)


def test_a_file_that_is_not_there_and_one_that_says_nothing(tmp_path):
    with pytest.raises(UserError, match=r"no\.yaml: cannot be read"):
        read_config(tmp_path / "no.yaml")
    assert "expected the keys base_model and experts" in refused(tmp_path, "hello")
