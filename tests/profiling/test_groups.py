"""Functional groups from profiles and from labels made elsewhere, by function and by command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from neuron_methods.cli import main
from neuron_methods.methods.groups_file import NeuronGroups
from neuron_methods.neurons.profile_file import NeuronProfile
from neuron_methods.profiling.grouping import classify, describe_groups, import_labels
from neuron_methods.support.errors import UserError
from tests.support.checkpoints import FAMILIES
from tests.support.plans import write_profile

LLAMA = FAMILIES["llama-untied"].config()


@pytest.fixture
def profile(tmp_path: Path) -> NeuronProfile:
    """Of each layer's neurons the first ten are driven by math, the next ten by code, four by both alike."""
    made = write_profile(tmp_path / "base.safetensors", LLAMA, {"math": 1000, "code": 1000})
    for layer in made.layers:
        for source, strong in (("math", slice(0, 10)), ("code", slice(10, 20))):
            values = torch.full((24, 3), 1.0)
            values[strong] = 5.0
            values[20:] = torch.tensor([9.0, 2.0, 1.0])
            made.tensors[f"{source}/{layer}/top_activation"] = values
            made.tensors[f"{source}/{layer}/firing_rate"] = torch.full((24,), 0.5)
    made.tensors["math/layers.1/firing_rate"][:3] = 0.0001
    made.save(tmp_path / "base.safetensors", 0, [])
    return made


def test_neurons_go_to_the_domain_that_drives_them(profile: NeuronProfile) -> None:
    groups = classify(profile, threshold=0.7, min_firing=0.001)
    assert groups.groups == ("general", "code", "math")
    assert groups.neurons_of("math", "layers.0").tolist() == list(range(10))
    assert groups.neurons_of("code", "layers.0").tolist() == list(range(10, 20))
    assert groups.neurons_of("general", "layers.0").tolist() == list(range(20, 24))


def test_neurons_that_hardly_fire_in_their_domain_are_general(profile: NeuronProfile) -> None:
    groups = classify(profile, threshold=0.7, min_firing=0.001)
    assert groups.neurons_of("math", "layers.1").tolist() == list(range(3, 10))
    assert len(classify(profile, 0.7, 0.0).neurons_of("math", "layers.1")) == 10


def test_a_domain_that_owns_no_neuron_is_still_a_group_for_its_expert(profile: NeuronProfile) -> None:
    groups = classify(profile, threshold=0.7, min_firing=0.9)
    assert groups.groups == ("general", "code", "math")
    assert list(describe_groups(groups))[-1].split() == ["all", "48", "0", "0"]
    groups.check_experts("groups.json", {"one": "math", "other": "code"})


def test_a_source_called_general_is_no_domain(tmp_path: Path) -> None:
    made = write_profile(tmp_path / "p.safetensors", LLAMA, {"math": 1000, "general": 1000})
    groups = classify(made, 0.5, 0.0)
    assert groups.groups == ("general", "math")
    assert groups.made_from["domains"] == ["math"]


def test_one_source_is_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one source per domain"):
        classify(write_profile(tmp_path / "p.safetensors", LLAMA, {"math": 3}), 0.5, 0.0)


def test_the_description_counts_neurons(profile: NeuronProfile) -> None:
    lines = list(describe_groups(classify(profile, 0.7, 0.001)))
    assert lines[0].split() == ["layer", "general", "code", "math"]
    assert lines[-1].split() == ["all", "11", "20", "17"]


LABELS = {
    "a.json": json.dumps({"layers.0": ["math", *["general"] * 22, "code"], "1": {"5": "math"}}),
    "b.json": json.dumps(
        [
            {"layer": 0, "neuron": 0, "group": "math"},
            {"layer": "layers.0", "neuron": 23, "group": "code"},
            {"layer": 1, "neuron": 5, "group": "math", "why": "sums"},
        ]
    ),
    "c.jsonl": '{"layer": 0, "neuron": 0, "group": "math"}\n\n{"layer": 0, "neuron": 23, "group": "code"}\n'
    '{"layer": 1, "neuron": 5, "group": "math"}\n',
    "d.csv": "layer,neuron,group\nlayers.0,0,math\nlayers.0,23,code\n1,5, math \n",
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_made_elsewhere_are_taken(profile: NeuronProfile, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(LABELS[name])
    groups = import_labels(profile, tmp_path / name)
    assert groups.groups == ("general", "code", "math")
    assert groups.neurons_of("math", "layers.0").tolist() == [0]
    assert groups.neurons_of("code", "layers.0").tolist() == [23]
    assert groups.neurons_of("math", "layers.1").tolist() == [5]
    assert len(groups.neurons_of("general", "layers.1")) == 23


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("l.csv", "layer,neuron\n0,1\n", "line 2: no 'group'"),
        (
            "l.csv",
            'layer,neuron,group\n0,1,"math\n0,2,code\n0,3,x"\n',
            "line 4: a quote of a line before it is not closed",
        ),
        ("l.csv", "layer,neuron,group\n7,1,math\n", "layer '7' is none of layers.0, layers.1"),
        ("l.csv", "layer,neuron,group\n0,24,math\n", "layers.0 has neurons 0 to 23, not '24'"),
        ("l.csv", "layer,neuron,group\n0,x,math\n", "not 'x'"),
        ("l.csv", "layer,neuron,group\n0,1,math\n0,1,code\n", "has a label already"),
        ("l.csv", "layer,neuron,group\n0,1,\n", "a group is a name"),
        ("l.csv", "layer,neuron,group\n", "no labels in it"),
        ("l.json", '{"layers.0": ["ma', "truncated, or not valid JSON"),
        ("l.json", '"math"', "expected"),
        ("l.json", '{"layers.0": 3}', "expected one group per neuron"),
        ("l.json", '{"layers.0": [3]}', "a group is a name"),
        ("l.jsonl", "[1]\n", "line 1: no 'layer'"),
        ("l.yaml", "", "read from .json, .jsonl and .csv"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    profile: NeuronProfile, name: str, text: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        import_labels(profile, tmp_path / name)
    assert problem in str(caught.value)


def test_the_command_writes_what_neuron_merge_reads(profile: NeuronProfile, tmp_path: Path) -> None:
    out = tmp_path / "groups.json"
    result = CliRunner().invoke(main, ["groups", str(profile.path), "-o", str(out), "--threshold", "0.7"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1].split() == ["all", "11", "20", "17"]
    assert NeuronGroups.read(out).groups == ("general", "code", "math")
    (tmp_path / "l.csv").write_text(LABELS["d.csv"])
    result = CliRunner().invoke(
        main, ["groups", str(profile.path), "-o", str(out), "--force", "--import", str(tmp_path / "l.csv")]
    )
    assert result.exit_code == 0, result.output
    assert len(NeuronGroups.read(out).neurons_of("math", "layers.1")) == 1


def test_the_command_reports_a_bad_profile_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["groups", str(tmp_path / "absent"), "-o", str(tmp_path / "g.json")])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "no such profile" in result.stderr
