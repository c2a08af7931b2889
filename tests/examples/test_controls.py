"""What stands beside the leaderboard: controls of groups, tasks left out, published orderings and linearity."""

import json
import re
import sys
from collections import Counter

import candidates
import controls
import grouping
import numpy as np
import orderings
import outside
import pytest
import report
import torch
from common import ZooModels
from report import Row

import neuron_methods
from neuron_methods.neurons.profile_file import NeuronProfile
from neuron_methods.support.errors import UserError
from tests.examples.conftest import EXAMPLES, load_script


@pytest.fixture(scope="module", autouse=True)
def registered():
    neuron_methods.register()


@pytest.fixture(scope="module")
def profiled(board, t5, tmp_path_factory):
    """A directory of results with a profile of the base, and the profile."""
    out = tmp_path_factory.mktemp("controls")
    return out, board.ZooRun(t5, out, "full", lambda line: None).profile()


def row(name, outcomes, origin="ours"):
    return Row(name, origin, 1, 0, "", {"t5": [{"a": np.array(outcomes)}]}, {})


def test_random_groups_have_the_sizes_of_the_classified_ones(profiled):
    _, profile = profiled
    found = grouping.make_groups(profile, 0.3)
    first, again, other = (grouping.make_groups(profile, 0.3, by) for by in ("random 1", "random 1", "random 2"))
    assert first.counts() == other.counts() == found.counts()
    assert len(set(found.totals().values()) - {0}) > 1
    for layer, own in found.labels.items():
        assert first.labels[layer].equal(again.labels[layer])
        assert not first.labels[layer].equal(own)
        assert not first.labels[layer].equal(other.labels[layer])
    general = grouping.make_groups(profile, 0.3, "general")
    assert general.groups == found.groups
    assert set(general.totals().values()) == {0, sum(found.totals().values())}


def test_labels_of_a_file_are_taken_and_tasks_without_neurons_stay_groups(profiled, tmp_path):
    _, profile = profiled
    layer = next(iter(NeuronProfile.load(profile).layers))
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps({"layer": layer, "neuron": n, "group": "sum"}) + "\n" for n in (2, 5)))
    found = grouping.make_groups(profile, 0.3, str(file))
    assert found.neurons_of("sum", layer).tolist() == [2, 5]
    assert set(found.groups) == {"general", "sort", "plural", "sum"}
    assert Counter(found.totals().values())[0] == 2


def test_rows_by_labels_are_scored_anew_for_other_labels(board, t5, profiled, tmp_path, monkeypatch):
    out, profile = profiled
    layer = next(iter(NeuronProfile.load(profile).layers))
    file = tmp_path / "labels.csv"
    names = ["groups by labels", "random groups, draw 0", "random groups, draw 1"]
    only = [argument for name in names for argument in ("--only", name)]
    command = ["run.py", str(out), "--controls", "--zoo", str(t5), "--board", "full", "--labels", str(file), *only]
    monkeypatch.setattr(sys, "argv", command)
    kept = []
    for group in ("sort", "sum"):
        file.write_text(f"layer,neuron,group\n{layer},0,{group}\n")
        board.main()
        kept.append(json.loads((out / "rows" / "t5-0" / "groups_by_labels.json").read_text())["key"]["candidate"])
    assert kept[0] != kept[1]
    text = (out / "controls.md").read_text()
    assert "- T5: groups by labels, at the defaults, " in text
    assert "from the mean of 2 draws of random groups" in text
    assert "| groups by activations | ours | 0, 1,000 samples | – |" in text
    assert "tuned, " not in text.partition("- T5")[2]


def test_labels_come_one_file_for_each_zoo(board, tmp_path):
    with pytest.raises(UserError, match="--labels: only --controls has rows for them"):
        board.labels_of([tmp_path], [tmp_path], "results")
    with pytest.raises(UserError, match="--labels: 1 given for 2 --zoo"):
        board.labels_of([tmp_path], [tmp_path, tmp_path], "controls")
    with pytest.raises(UserError, match=r"none\.csv: not there"):
        board.labels_of([tmp_path / "none.csv"], [tmp_path], "controls")
    assert board.labels_of(None, None, "results") is None


def test_groups_are_compared_in_pairs_with_the_mean_of_random_ones():
    drawn = [row("random groups, draw 0", [1, 1, 0, 0] * 50), row("random groups, draw 1", [1, 0, 0, 0] * 50)]
    better = row("groups by activations", [1, 1, 1, 0] * 50)
    (line,) = controls.against_random([better, *drawn], [], "t5")
    # 75 % against 37.5 %; the draws differ by 25 points, the gaps of the examples are 0, ½, 1 and 0.
    gap = np.array([0, 0.5, 1, 0] * 50)
    half = 1.96 * 100 * np.sqrt(gap.var(ddof=1) / 200 + 0.25**2 / 2 / 2)
    assert "+37.5 points" in line
    assert [float(n) for n in re.search(r"\(([+-][\d.]+) to ([+-][\d.]+)\)", line).groups()] == pytest.approx(
        [37.5 - half, 37.5 + half], abs=0.06
    )
    assert line.endswith("2 draws of random groups, which score 25.0 to 50.0.")
    assert controls.against_random([better], [], "t5") == []
    # Tuned ones stand beside tuned ones.
    assert controls.against_random([row("all general, tuned", [1] * 200), *drawn], [], "t5") == []


def test_a_task_left_out_is_scored_on_the_merge_of_all_others(t5, tmp_path):
    run = outside.OutsideRun(t5, tmp_path, "full", lambda line: None)
    average = next(c for c in outside.outside(3) if c.name == "weight average")
    scored = []

    class Models(ZooModels):
        def outcomes(self, weights, split, names=None):
            scored.append((weights, names))
            return super().outcomes(weights, split, names)

    run.models = Models(t5)
    found = run.score(average)
    assert list(found["test"]) == run.models.names
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    for weights, (left_out,) in scored:
        others = [expert[name] for task, expert in run.models.experts.items() if task != left_out]
        torch.testing.assert_close(weights[name], sum(others) / 2)
    assert run.rows_of(average).folder == tmp_path / "outside" / "t5-0"


def test_what_is_done_to_tasks_left_out_is_reported(t5, tmp_path, monkeypatch):
    command = ["outside.py", str(tmp_path), "--zoo", str(t5), "--board", "tokens", "--only", "weight average"]
    monkeypatch.setattr(sys, "argv", [*command, "--only", "neuron_response"])
    outside.main()
    text = (tmp_path / "outside.md").read_text()
    assert "each task on the merge of all experts but its own" in text
    assert re.search(r"^- T5, token embeddings by mean: neuron_response [+-][\d.]+ points", text, re.M)
    # References are those of the leaderboard.
    assert {path.name for path in (tmp_path / "rows" / "t5-0").iterdir()} >= {"references.json"}
    assert not (tmp_path / "outside" / "t5-0" / "references.json").exists()
    assert {row.name for row in outside.outside(3)} == set(outside.NAMES)
    monkeypatch.setattr(sys, "argv", ["outside.py", str(tmp_path), "--zoo", str(tmp_path)])
    with pytest.raises(UserError, match=r"no zoo\.json there"):
        outside.main()


def test_orderings_hold_are_level_or_do_not():
    def scored(first, second):
        return {"neuro_merging": row("neuro_merging", first), "ties, untuned": row("ties, untuned", second)}

    more, less = [1, 1, 1, 0] * 100, [1, 0, 1, 0] * 100
    lines = orderings.table({"t5": scored(more, less), "vit": {}}).splitlines()
    assert lines[2].endswith("| averages there | T5 | ViT |")
    first = next(line for line in lines if "at our defaults" in line)
    assert "T5-base 74.8, 73.6" in first
    assert first.endswith("| yes, +25.0 ± 4.2 | – |")
    assert "| no, -25.0 ± 4.2 |" in orderings.table({"t5": scored(less, more)})
    assert "| level, +0.0 ± 0.0 |" in orderings.table({"t5": scored(more, more)})
    names = {row.name for row in candidates.candidates(3)}
    assert names >= {name for one in orderings.ORDERINGS for name in (one.above, one.below)}


def test_seeds_are_told_one_by_one():
    def of(name, origin, *seeds, samples=0):
        return Row(name, origin, 1, samples, "", {"t5": [{"a": np.array(seed)} for seed in seeds]}, {})

    ours = of("neuron_response", "ours", [1, 1, 1, 0], [1, 1, 0, 0])
    with_data = of("neuron_response, 40 samples", "ours", [1, 1, 1, 1], [1, 1, 1, 1], samples=40)
    other = of("TSV-M", "fusion-bench", [1, 0, 1, 0], [1, 1, 1, 0])
    lines = report.by_seed([ours, with_data, other], [], "t5")
    assert lines[0].startswith("- T5, by seed: neuron_response 75.0, 50.0; +0.0 points (standard error ")
    assert lines[0].endswith("; +25.0, -25.0) from TSV-M.")
    assert lines[1:] == [
        "- T5, by seed: neuron_response, 40 samples 100.0, 100.0.",
        "- T5, by seed: TSV-M 50.0, 75.0.",
    ]
    assert {row.name for row in candidates.seeds(3)} == set(candidates.ON_SEEDS)


@pytest.fixture(scope="module")
def linearity():
    return load_script(EXAMPLES / "figures" / "linearity.py")


def test_linearity_of_groups_is_that_of_the_command(linearity, t5, profiled, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from neuron_methods.cli import main

    out, profile = profiled
    monkeypatch.setattr(linearity, "THRESHOLD", 0.3)
    command = ["linearity.py", str(out), "--zoo", str(t5), "--draws", "2", "--tokens", "24"]
    monkeypatch.setattr(sys, "argv", command)
    linearity.main()
    text = (out / "linearity.md").read_text()
    assert (out / "linearity.svg").read_text().startswith("<?xml")

    groups = tmp_path / "groups.json"
    grouping.make_groups(profile, 0.3).write(groups)
    recipe = json.dumps(
        {
            "merge_method": "neuron_merge",
            "base_model": str(t5 / "base"),
            "models": [
                {"model": str(t5 / "experts" / n), "parameters": {"group": n}} for n in ("sort", "plural", "sum")
            ],
            "parameters": {"groups": str(groups)},
            "dtype": "float32",
        }
    )
    (tmp_path / "merge.yaml").write_text(recipe)
    data = [a for n in ("sort", "plural", "sum") for a in ("--data", f"{n}={t5}/data/{n}/train.parquet:prompt,answer")]
    arguments = ["linearity", str(tmp_path / "merge.yaml"), *data, "--tokens", "24", "-o", str(tmp_path / "l.json")]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    errors = json.loads((tmp_path / "l.json").read_text())["errors"]
    for layer, own in errors.items():
        plain, ratio = re.search(rf"^\| {re.escape(layer)} \| ([\d.]+) \| ([\d.]+) \|", text, re.M).groups()
        assert float(plain) == pytest.approx(100 * own["task_arithmetic, same size"], abs=0.006)
        expected = own["merge by neuron_merge"] / own["task_arithmetic, same size"]
        assert float(ratio) == pytest.approx(expected, abs=6e-4)


def test_layers_are_counted_that_groups_make_more_linear(linearity):
    one = linearity.Measured(
        "t5",
        ["a", "b", "c"],
        np.array([0.9, 1.1, 1.3]),
        [np.array([1.0, 1.0, 1.0]), np.array([1.0, 1.4, 1.2])],
        np.array([1.0, 2.0, 3.0]),
        60.0,
    )
    text = linearity.table([one])
    assert "| b | 2.00 | 1.100 | 1.200 (1.000–1.400) |" in text
    assert "| mean | 2.00 | 1.100 | 1.100 (1.000–1.200) |" in text
    assert "1 of 3 layers are more linear than task arithmetic of the same size, 2 more than random groups" in text
    assert "and 1 more than every draw" in text
