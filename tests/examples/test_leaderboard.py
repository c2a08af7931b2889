"""The leaderboard on a tiny zoo: every method runs, all have one budget, rows are kept, the report adds up."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import candidates
import grouping
import numpy as np
import pytest
import report
import rows as kept_rows
import scales
import torch
from common import ZooModels, mean_score
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import load_file

import neuron_methods
from neuron_methods.neurons import infer_neurons
from neuron_methods.profiling import NeuronProfile
from neuron_methods.support.errors import UserError
from tests.support.zoos import build_zoo

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = candidates.candidates(3)
ROW = {row.name: row for row in ROWS}
ALL = [*ROWS, *candidates.ablations(3)]


@pytest.fixture(scope="module", autouse=True)
def registered():
    neuron_methods.register()


@pytest.fixture(scope="module")
def board():
    """examples/leaderboard/run.py; other scripts are called run, too."""
    spec = importlib.util.spec_from_file_location("leaderboard_run", EXAMPLES / "leaderboard" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    out = tmp_path_factory.mktemp("leaderboard") / "vit"
    build_zoo("vit", out, checks=False)
    return out


def test_every_method_of_mergekit_that_fits_has_a_row():
    assert candidates.untried(ROWS) == []
    without = [row for row in ROWS if row.method != "sce"]
    assert candidates.untried(without) == ["sce"]


def test_one_budget_for_all():
    for experts in (3, 8):
        points = {row.name: row.points for row in candidates.candidates(experts)}
        untuned = ["neuro_merging", "neuro_merging, density 0.5", "neuro_merging, norm"]
        untuned += [name for name in points if name.startswith("neuron_response") and not name.endswith("tuned")]
        assert {points.pop(name) for name in untuned} == {1}
        assert set(points.values()) == {candidates.BUDGET}
        assert {"neuron_response, tuned", "neuron_response, 40 samples, tuned", "WUDI", "RegMean"} <= points.keys()
    assert all(row.points == candidates.BUDGET for row in candidates.ablations(8))
    assert len({row.name for row in ALL}) == len(ALL)


@pytest.mark.parametrize("row", [row for row in ALL if row.origin != "fusion-bench"], ids=lambda row: row.name)
def test_every_setting_merges_and_scales(row, models, hand):
    for settings in row.settings:
        merged = candidates.merge(row, models.base, models.experts, {**settings, **hand(row, settings)})
        assert merged.keys() == models.base.keys()
        assert all(tensor.isfinite().all() for tensor in merged.values())
        assert any(not merged[name].equal(models.base[name]) for name in merged)
        assert merged["classifier.weight"].equal(models.base["classifier.weight"])
        half = candidates.scaled(models.base, merged, 0.5)
        for name, base in models.base.items():
            torch.testing.assert_close(half[name] - base, (merged[name] - base) / 2)


@pytest.fixture(scope="module")
def models(zoo):
    return ZooModels(zoo)


@pytest.fixture(scope="module")
def hand(board, zoo, tmp_path_factory):
    """What run.py hands to methods beside a row's settings."""
    return board.ZooRun(zoo, tmp_path_factory.mktemp("handed"), "full", lambda line: None).hand


@pytest.fixture(scope="module")
def profile(zoo, tmp_path_factory):
    return grouping.measure(zoo, tmp_path_factory.mktemp("profiles") / "vit-0", {"zoo": 1})


def test_the_profile_is_of_every_tasks_training_data_and_kept(zoo, profile, models):
    measured = NeuronProfile.load(profile)
    assert list(measured.sources) == models.names
    assert {source.samples for source in measured.info.sources.values()} == {12}
    assert all(source.source == "train.parquet:image" for source in measured.info.sources.values())
    before = profile.stat().st_mtime_ns
    assert grouping.measure(zoo, profile.parent, {"zoo": 1}) == profile
    assert profile.stat().st_mtime_ns == before
    grouping.measure(zoo, profile.parent, {"zoo": 2})
    assert profile.stat().st_mtime_ns > before


def test_neurons_of_a_task_take_more_of_its_expert(models, profile):
    settings = {"threshold": 0.0, "in_group": 3.0, "out_group": 1.0, "general": 2.0, "profile": str(profile)}
    merged = grouping.merge_by_groups(models.base, models.experts, settings)
    neurons = infer_neurons(models.base, lambda name: models.base[name].shape)
    (layer,) = neurons.layers
    tensor = models.base["vit.layers.0.mlp.fc1.weight"]
    updates = {task: expert["vit.layers.0.mlp.fc1.weight"] - tensor for task, expert in models.experts.items()}
    measured = NeuronProfile.load(profile)
    seen = set()
    for neuron in range(layer.neurons):
        sizes = torch.stack([measured.top_activations(task, layer.key)[neuron].abs() for task in models.names])
        largest = sizes.flatten().topk(sizes.shape[1]).indices // sizes.shape[1]
        counts = torch.bincount(largest, minlength=len(models.names))
        best = (counts == counts.max()).nonzero().flatten().tolist()
        if len(best) == 1 and sizes.max() > 0:
            factors = {task: 3.0 if task == models.names[best[0]] else 1.0 for task in models.names}
        else:
            factors = dict.fromkeys(models.names, 2.0)
        seen.add(tuple(factors.values()))
        expected = tensor[neuron] + sum(factors[task] * updates[task][neuron] for task in models.names)
        torch.testing.assert_close(merged["vit.layers.0.mlp.fc1.weight"][neuron], expected)
    assert len(seen) > 2


def test_rows_are_kept_and_reported(board, zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(board, "has_fusion_bench", lambda: False)
    only = ["task_arithmetic", "neuro_merging", "TSV-M"]
    said = []
    result = board.run_zoo(zoo, tmp_path, said.append, only)
    assert result["rows"]["TSV-M"] is None
    assert any("pip install fusion-bench" in line for line in said)
    chosen = result["rows"]["task_arithmetic"]["chosen"]
    assert chosen["validation"] == max(point["validation"] for point in result["rows"]["task_arithmetic"]["trace"])
    again = []
    assert board.run_zoo(zoo, tmp_path, again.append, only) == result
    assert not any("loading" in line for line in again)

    report.write_report([result, result], tmp_path, ROWS)
    text = (tmp_path / "results.md").read_text()
    assert "| ViT, 2 seeds |" in text
    assert text.count("| neuro_merging |") == 1
    assert "| TSV-M | fusion-bench | 8 | – |" in text
    content = json.loads((tmp_path / "results.json").read_text())
    (row,) = [row for row in content["rows"] if row["name"] == "task_arithmetic"]
    share = np.mean([[int(c) for c in text] for text in result["rows"]["task_arithmetic"]["test"].values()])
    assert row["scores"]["vit"]["mean"] == pytest.approx(share)
    assert (tmp_path / "leaderboard.svg").read_text().startswith("<?xml")


def test_the_row_of_neuron_merge_measures_its_profile(board, zoo, tmp_path):
    result = board.run_zoo(zoo, tmp_path, lambda line: None, ["neuron_merge"])
    row = result["rows"]["neuron_merge"]
    assert [point["settings"] for point in row["trace"][:1]] == [{**ROW["neuron_merge"].settings[0]}]
    assert "profile" not in json.dumps(row)
    place = tmp_path / "profiles" / "vit-0" / "base.safetensors"
    before = place.stat().st_mtime_ns
    (tmp_path / "rows" / "vit-0" / "neuron_merge.json").unlink()
    assert (
        board.run_zoo(zoo, tmp_path, lambda line: None, ["neuron_merge"])["rows"]["neuron_merge"]["test"] == row["test"]
    )
    assert place.stat().st_mtime_ns == before


def test_a_row_that_another_process_is_at_is_left_to_it(board, zoo, tmp_path):
    """A process that holds a row's lock stands for one that is scoring it; it lets go when it has stored its row."""
    only = ["neuro_merging", "neuro_merging, norm"]
    first = board.run_zoo(zoo, tmp_path, lambda line: None, only)
    path = tmp_path / "rows" / "vit-0" / "neuro_merging.json"
    theirs = json.loads(path.read_text())
    theirs["result"]["seconds"] = 12345.0
    path.unlink()
    (tmp_path / "rows" / "vit-0" / "neuro_merging_norm.json").unlink()
    code = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(EXAMPLES / "leaderboard")!r})
from rows import held
place = Path({str(path)!r})
with held(place):
    print("held", flush=True)
    norm = place.with_name("neuro_merging_norm.json")
    while not norm.is_file():
        time.sleep(0.05)
    place.write_text({json.dumps(theirs)!r})
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        said = []
        result = board.run_zoo(zoo, tmp_path, said.append, only)
        assert process.wait() == 0
    assert result["rows"]["neuro_merging"]["seconds"] == 12345.0
    assert result["rows"]["neuro_merging, norm"]["test"] == first["rows"]["neuro_merging, norm"]["test"]
    assert sum("neuro_merging: another process is at it" in line for line in said) == 1


def test_a_row_scored_beside_this_run_is_in_its_table(board, zoo, tmp_path, monkeypatch):
    board.run_zoo(zoo, tmp_path, lambda line: None, ["neuro_merging"])
    folder = tmp_path / "rows" / "vit-0"
    row = json.loads((folder / "neuro_merging.json").read_text())

    def missing_here():
        """Another process, which has the package, finishes the row while this one leaves it out."""
        row["key"]["candidate"] = asdict(ROW["TSV-M"]) | {"note": ""}
        (folder / "TSV-M.json").write_text(json.dumps(row))
        return False

    monkeypatch.setattr(board, "has_fusion_bench", missing_here)
    assert board.run_zoo(zoo, tmp_path, lambda line: None, ["TSV-M"])["rows"]["TSV-M"] == row["result"]


def test_rows_are_built_once_and_again_under_another_key(tmp_path):
    kept = kept_rows.Rows(tmp_path / "rows")
    assert kept.make("a, b", {"x": (1, 2)}, lambda: {"n": 1}) == {"n": 1}
    assert kept.make("a, b", {"x": [1, 2]}, lambda: {"n": 2}) == {"n": 1}
    assert kept.read("a, b", {"x": [1]}) is None
    assert kept.make("a, b", {"x": [1]}, lambda: {"n": 3}) == {"n": 3}
    with kept_rows.held(tmp_path / "rows" / "a_b.json"), pytest.raises(kept_rows.Busy):
        kept.make("a, b", {"x": [1]}, lambda: {"n": 4}, wait=False)


def test_only_names_rows(board, zoo, tmp_path, monkeypatch, capsys):
    board.check_names(["ties", "neuron_merge"], ROWS)
    with pytest.raises(UserError, match="--only 'neuromerging': no row has that name; did you mean 'neuro_merging'"):
        board.check_names(["ties", "neuromerging"], ROWS)
    with pytest.raises(UserError, match="there are: neuron_response; neuron_response, tuned; "):
        board.check_names(["zzz"], ROWS)
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path), "--zoo", str(tmp_path / "none")])
    with pytest.raises(UserError, match=r"no zoo\.json there"):
        board.main()
    for name in ("neuro_merging", "neuro_merging, norm"):
        monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path), "--zoo", str(zoo), "--only", name])
        board.main()
    lines = (tmp_path / "results.md").read_text().splitlines()
    scored = [line.split(" | ")[0] for line in lines if line.startswith("| neur") and not line.endswith("| – |")]
    assert sorted(scored) == ["| neuro_merging", "| neuro_merging, norm"]  # what was finished before is there, too


def test_a_row_without_all_seeds_is_shown_but_not_compared(tmp_path):
    right, wrong = {"a": "1" * 20}, {"a": "10" * 10}
    references = {"base": wrong, "experts": right}

    def row(test):
        return {"test": test, "chosen": {"settings": {}, "scale": 1.0}}

    results = [
        {"family": "vit", "references": references, "rows": {"ties": row(wrong), "neuro_merging": row(wrong)}},
        {"family": "vit", "references": references, "rows": {"ties": row(wrong), "neuro_merging": row(wrong)}},
    ]
    results[0]["rows"]["sce"] = row(right)
    report.write_report(results, tmp_path, ROWS)
    text = (tmp_path / "results.md").read_text()
    assert "| sce | mergekit | 8 | 100.0 (100.0–100.0), 1 of 2 seeds |" in text
    assert "from the best of mergekit's own, ties (only 1 of 13 of them were scored)" in text
    figure = (tmp_path / "leaderboard.svg").read_text()
    assert "<!-- ties -->" in figure
    assert "<!-- sce -->" not in figure

    report.write_report([{**result, "rows": {}} for result in results], tmp_path, ROWS)
    assert "| ties | mergekit | 8 | – |" in (tmp_path / "results.md").read_text()


def test_interval_covers_the_mean_and_narrows_with_examples():
    few = [{"a": np.array([0, 1] * 20), "b": np.array([1, 1, 1, 0] * 10)}]
    many = [{name: np.tile(values, 100) for name, values in few[0].items()}]
    scores = [report.interval(outcomes) for outcomes in (few, many)]
    for score in scores:
        assert score.low < 0.625 < score.high
        assert score.mean == pytest.approx(0.625)
    assert scores[1].high - scores[1].low == pytest.approx((scores[0].high - scores[0].low) / 10, rel=0.15)


def test_difference_is_paired():
    right = np.array([1, 1, 0, 0] * 10)
    assert report.difference([{"a": right}], [{"a": right}]) == (0.0, 0.0)
    gap, error = report.difference([{"a": right}], [{"a": 1 - right}])
    assert gap == 0.0
    assert error > 0.1


def test_matching_norms_gives_updates_the_experts_mean_norm(models):
    merged = {name: base + 3.0 * (models.experts["shapes"][name] - base) for name, base in models.base.items()}
    for neurons in (False, True):
        found = scales.matched(merged, models.base, models.experts, 1.0, neurons)
        for name in ("vit.layers.0.mlp.fc1.weight", "vit.layernorm.bias"):
            wanted = np.mean([(e[name] - models.base[name]).norm().item() for e in models.experts.values()])
            if not neurons or models.base[name].ndim == 1:
                assert (found[name] - models.base[name]).norm().item() == pytest.approx(wanted, rel=1e-4)
        assert found["classifier.weight"].equal(models.base["classifier.weight"])


@pytest.mark.parametrize("settings", scales.VARIANTS.values(), ids=scales.VARIANTS.keys())
def test_the_tables_rules_are_those_of_neuro_merging(models, settings):
    names = scales.changed_by(models.experts, models.base)
    assert set(models.base) - set(names) == {"classifier.weight", "classifier.bias"}
    base = {name: models.base[name] for name in names}
    experts = {task: {name: expert[name] for name in names} for task, expert in models.experts.items()}

    def merged(rule, **changed):
        parameters = {**settings, **changed, "lambda_orthogonal": rule}
        return merge_state_dicts({"b": base, **experts}, "neuro_merging", base="b", parameters=parameters)

    psi = merged(1.0)
    by_norm = scales.matched(psi, base, experts, 1.0, True)
    for name, tensor in merged("norm").items():
        torch.testing.assert_close(by_norm[name] - base[name], tensor - base[name], rtol=2e-3, atol=1e-6)
    found = scales.rules(scales.flat(psi, base), [scales.flat(e, base) for e in experts.values()], settings["density"])
    published = merged("auto", consensus="mean")
    for name, tensor in scales.scaled(base, merged(1.0, consensus="mean"), found[scales.PUBLISHED]).items():
        torch.testing.assert_close(tensor - base[name], published[name] - base[name], rtol=2e-3, atol=1e-6)


@pytest.fixture(scope="module")
def adapters(zoo):
    """LoRA adapters of two of the zoo's three tasks, their weights drawn at random."""
    from peft import LoraConfig, get_peft_model
    from transformers import ViTForImageClassification

    torch.manual_seed(0)
    for name in ("digits-latin", "shapes"):
        model = ViTForImageClassification.from_pretrained(zoo / "base")
        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["fc1"], init_lora_weights=False))
        model.save_pretrained(zoo / "adapters" / name)
    return zoo / "adapters"


def test_adapters_are_merged_into_the_base_and_missing_ones_named(zoo, adapters, models):
    with pytest.raises(UserError, match="counts holds no adapter; make the zoo with --lora"):
        scales.adapted_experts(models)
    two = ZooModels(zoo, ["validation"])
    two.names = ["digits-latin", "shapes"]
    found = scales.adapted_experts(two)
    assert found.keys() == {"digits-latin", "shapes"}
    name = "vit.layers.0.mlp.fc1.weight"
    assert scales.changed_by(found, models.base) == [name]
    for task, weights in found.items():
        stored = load_file(adapters / task / "adapter_model.safetensors")
        (a,), (b,) = ([t for key, t in stored.items() if f"lora_{side}" in key] for side in "AB")
        torch.testing.assert_close(weights[name], models.base[name] + 2 * b @ a)
    explored = scales.explore(two, found, lambda line: None)
    text = scales.table({"tiny, adapters": explored})
    assert "| norm of ψ = mean norm of τ, per neuron (`norm`) |" in text
    assert explored["base"] == pytest.approx(mean_score(two.outcomes(two.base, "validation")))
    taus = [(weights[name] - models.base[name]).norm() / models.base[name].norm() for weights in found.values()]
    assert explored["length"] == pytest.approx(float(sum(taus)) / 2)


def test_trimming_by_what_differs_keeps_entries_of_greatest_variance():
    base = {"weight": torch.zeros(1, 4)}
    # variances 0, 4, 1 and 9: the half in which experts differ most are the second and the last
    experts = {
        "a": {"weight": torch.tensor([[8.0, 4.0, 2.0, 6.0]])},
        "b": {"weight": torch.tensor([[8.0, 0.0, 0.0, 0.0]])},
    }
    (row,) = (r for r in candidates.ablations(2) if r.name.startswith("trimmed to the half of the entries"))
    merged = candidates.merge(row, base, experts, row.settings[0])["weight"]
    assert (merged[0] != 0).tolist() == [False, True, False, True]
