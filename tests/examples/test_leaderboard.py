"""The leaderboard on a tiny zoo: every method runs, all have one budget, rows are kept, the report adds up."""

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

import neuron_methods
from neuron_methods.evaluation.comparing.statistics import paired_difference, spread
from neuron_methods.kernels.task_vectors import LowRankTaskVector
from neuron_methods.methods.inputs_file import InputsFile
from neuron_methods.neurons import infer_neurons
from neuron_methods.profiling import NeuronProfile
from neuron_methods.support.errors import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = candidates.candidates(3)
ROW = {row.name: row for row in ROWS}
ALL = [*ROWS, *candidates.ablations(3)]


@pytest.fixture(scope="module", autouse=True)
def registered():
    neuron_methods.register()


def test_every_method_of_mergekit_that_fits_has_a_row():
    assert candidates.untried(ROWS) == []
    without = [row for row in ROWS if row.method != "sce"]
    assert candidates.untried(without) == ["sce"]


def test_one_budget_for_all():
    for experts in (3, 8):
        points = {row.name: row.points for row in candidates.candidates(experts)}
        untuned = ["neuro_merging", "neuro_merging, density 0.5", "neuro_merging, norm"]
        untuned += [row.name for row in candidates.untuned()]
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
    assert "from the best of mergekit's own, ties (only 1 of 16 of them were scored)" in text
    figure = (tmp_path / "leaderboard.svg").read_text()
    assert "<!-- ties -->" in figure
    assert "<!-- sce -->" not in figure

    report.write_report([{**result, "rows": {}} for result in results], tmp_path, ROWS)
    assert "| ties | mergekit | 8 | – |" in (tmp_path / "results.md").read_text()


def test_interval_covers_the_mean_and_narrows_with_examples():
    few = [{"a": np.array([0, 1] * 20), "b": np.array([1, 1, 1, 0] * 10)}]
    many = [{name: np.tile(values, 100) for name, values in few[0].items()}]
    scores = [spread(outcomes) for outcomes in (few, many)]
    for score in scores:
        assert score.low < 0.625 < score.high
        assert score.mean == pytest.approx(0.625)
    assert scores[1].high - scores[1].low == pytest.approx((scores[0].high - scores[0].low) / 10, rel=0.15)


def test_difference_is_paired():
    right = np.array([1, 1, 0, 0] * 10)
    assert paired_difference([{"a": right}], [{"a": right}]) == (0.0, 0.0)
    gap, error = paired_difference([{"a": right}], [{"a": 1 - right}])
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
    automatic = merged("auto", consensus="mean")
    for name, tensor in scales.scaled(base, merged(1.0, consensus="mean"), found[scales.AUTO]).items():
        torch.testing.assert_close(tensor - base[name], automatic[name] - base[name], rtol=2e-3, atol=1e-6)


@pytest.fixture(scope="module")
def adapted(t5):
    return ZooModels(t5, ["validation"], adapters=True)


def test_adapters_are_the_base_and_their_factors(t5, adapted, tmp_path):
    from peft import PeftModel
    from transformers import T5ForConditionalGeneration

    full = ZooModels(t5, ["validation"])
    assert full.factors == {}
    assert adapted.tokens == full.tokens == ("shared.weight",)
    for task, factors in adapted.factors.items():
        model = T5ForConditionalGeneration.from_pretrained(t5 / "base")
        merged = PeftModel.from_pretrained(model, t5 / "adapters" / task).merge_and_unload()
        for name, parameter in merged.named_parameters():
            torch.testing.assert_close(adapted.experts[task][name], parameter.detach())
        touched = {name for name in full.base if not adapted.experts[task][name].equal(full.base[name])}
        assert touched == set(factors)
        assert all(isinstance(factor, LowRankTaskVector) for factor in factors.values())
    (tmp_path / "tasks.yml").write_text((t5 / "tasks.yml").read_text())
    for part in ("base", "data", "experts"):
        (tmp_path / part).symlink_to(t5 / part)
    with pytest.raises(UserError, match="sort holds no adapter; make the zoo with --lora"):
        ZooModels(tmp_path, ["validation"], adapters=True)


def test_scales_of_adapters_are_explored(adapted):
    explored = scales.explore(adapted, lambda line: None)
    text = scales.table({"tiny, adapters": explored})
    assert "| norm of ψ = mean norm of τ, per neuron (`norm`) |" in text
    assert explored["base"] == pytest.approx(mean_score(adapted.outcomes(adapted.base, "validation")))
    names = scales.changed_by(adapted.experts, adapted.base)
    size = scales.flat({n: 2 * adapted.base[n] for n in names}, {n: adapted.base[n] for n in names}).norm()
    taus = [scales.flat(e, {n: adapted.base[n] for n in names}).norm() for e in adapted.experts.values()]
    assert explored["length"] == pytest.approx(float(sum(taus) / len(taus) / size))


def test_adapters_are_merged_in_their_factors(adapted, monkeypatch):
    """B·A is merged as it is; the merge is the same as of the updates formed, but for the ridge chosen by itself."""
    row = ROW["neuron_response"]
    settings = {**row.settings[0], "models": adapted, "ridge": 0.1}
    merged = candidates.merge(row, adapted.base, adapted.experts, settings)

    def formed(*_):
        raise AssertionError("an update was formed")

    monkeypatch.setattr(LowRankTaskVector, "dense", formed)
    again = candidates.merge(row, adapted.base, adapted.experts, settings)
    assert all(tensor.equal(again[name]) for name, tensor in merged.items())
    monkeypatch.setattr(adapted, "factors", {})
    dense = candidates.merge(row, adapted.base, adapted.experts, settings)
    moved = max(float((tensor - adapted.base[name]).abs().max()) for name, tensor in merged.items())
    for name, tensor in merged.items():
        torch.testing.assert_close(dense[name], tensor, rtol=0, atol=2e-3 * moved)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_experts_are_merged_by_the_inputs_measured_on_them(board, t5, tmp_path, lora):
    """Without a ridge Δ S = N holds, and S and N are those of the expert's own file."""
    run = board.ZooRun(t5, tmp_path, "lora" if lora else "full", lambda line: None)
    row = ROW["neuron_response, 40 samples, data alone"]
    settings = {**row.settings[0], "samples": 6, "ridge": 0.0}
    handed = run.hand(row, settings)
    experts = run.models.experts
    merged = candidates.merge(row, run.models.base, experts, {**settings, **handed})
    for module in ("decoder.block.0.layer.2.DenseReluDense.wo", "encoder.block.0.layer.0.SelfAttention.k"):
        base = run.models.base[f"{module}.weight"].double()
        s = n = 0
        for task, expert in experts.items():
            file = InputsFile.open(str(handed["measured"] / f"{task}.safetensors"))
            assert file.info.made_from["samples"] == {task: 6}
            assert file.info.model == (f"base+{task}" if lora else task)
            factor = file.read(file.factor_of(module)).double()
            moment = factor.T @ factor / factor.square().sum()
            s, n = s + moment, n + (expert[f"{module}.weight"].double() - base) @ moment
        found = (merged[f"{module}.weight"].double() - base) @ s
        assert (found - n).norm() < 2e-3 * n.norm()
        assert n.norm() > 0


def test_token_embeddings_by_mean_are_the_same_for_all(board, t5, tmp_path):
    only = ["neuron_response", "task_arithmetic", "neuron_response, embeddings by rows"]
    full = board.run_zoo(t5, tmp_path, lambda line: None, only)
    said = []
    mean = board.run_zoo(t5, tmp_path, said.append, only, board="tokens")
    assert (full["family"], mean["family"]) == ("t5", "t5-tokens")
    assert mean["references"] == full["references"]
    # What has the mean by itself is not scored again.
    assert mean["rows"]["neuron_response"] == full["rows"]["neuron_response"]
    assert not (tmp_path / "rows" / "t5-tokens-0" / "neuron_response.json").exists()
    assert (tmp_path / "rows" / "t5-tokens-0" / "neuron_response_embeddings_by_rows.json").exists()

    models = ZooModels(t5, ["validation"])
    row = ROW["neuron_response"]
    merged = candidates.merge(row, models.base, models.experts, {"models": models})
    by_rows = candidates.merge(row, models.base, models.experts, {"models": models, "embeddings": "rows"})
    name = "shared.weight"
    expected = models.base[name] + sum(e[name] - models.base[name] for e in models.experts.values()) / 3
    assert not torch.allclose(by_rows[name], expected, atol=1e-6)
    treated = candidates.tokens_by_mean(candidates.scaled(models.base, by_rows, 0.3), models.experts, models.tokens)
    for table in (merged[name], treated[name]):
        torch.testing.assert_close(table, expected)
    other = next(key for key in models.base if key.endswith("wi_0.weight"))
    torch.testing.assert_close(treated[other], models.base[other] + 0.3 * (by_rows[other] - models.base[other]))


def test_boards_of_a_zoo(board, zoo, t5, tmp_path, monkeypatch):
    assert board.boards_of(zoo) == ["full"]
    assert board.boards_of(t5) == ["full", "tokens", "lora"]
    for name in ("task_arithmetic", "neuron_response"):
        arguments = ["run.py", str(tmp_path), "--zoo", str(t5), "--only", name, "--board", "lora", "--board", "tokens"]
        monkeypatch.setattr(sys, "argv", arguments)
        board.main()
    text = (tmp_path / "results.md").read_text()
    assert "| method | from | points | T5, token embeddings by mean | gain |" in text
    assert "| method | from | points | T5, LoRA |" in text
    assert "as it is" not in text
    content = json.loads((tmp_path / "results.json").read_text())
    (row,) = [row for row in content["rows"] if row["name"] == "task_arithmetic"]
    assert row["scores"].keys() == {"t5-tokens", "t5-lora"}


def test_what_token_embeddings_change_is_told(tmp_path):
    def result(family, test):
        row = {"test": {"a": test}, "chosen": {"settings": {}, "scale": 1.0}}
        rows = {"sce": row, "TSV-M": {**row, "test": {"a": "1" * 4}}}
        return {"family": family, "references": {"base": {"a": "0" * 4}, "experts": {"a": "1" * 4}}, "rows": rows}

    report.write_report([result("t5", "1000"), result("t5-tokens", "1110")], tmp_path, ROWS)
    lines = (tmp_path / "results.md").read_text().splitlines()
    gains = [line.split(" | ")[-1] for line in lines if line.startswith(("| sce |", "| TSV-M |"))]
    assert gains[-2:] == ["+0.0 |", "+50.0 |"]  # the best comes first


def test_what_reads_data_is_compared_with_what_does(tmp_path):
    scores = {"neuron_response": "1100", "neuron_response, 40 samples": "1111", "sce": "1000", "RegMean": "1110"}
    scores["WUDI"] = "1000"
    rows = {name: {"test": {"a": test * 10}, "chosen": {"settings": {}, "scale": 1.0}} for name, test in scores.items()}
    references = {"base": {"a": "0" * 40}, "experts": {"a": "1" * 40}}
    report.write_report([{"family": "vit", "references": references, "rows": rows}], tmp_path, ROWS)
    lines = (tmp_path / "results.md").read_text().splitlines()
    told = [line for line in lines if line.startswith("- ViT: ")]
    assert [line.split(" is ")[0] for line in told] == [
        "- ViT: neuron_response at its defaults",
        "- ViT: the best of ours, neuron_response,",
        "- ViT: the best of ours with data, neuron_response, 40 samples,",
    ]
    assert "+25.0 points" in told[0] and "best of mergekit's own, sce (only 1 of 16" in told[0]
    assert "best of FusionBench's, WUDI (only 1 of 7" in told[0]
    assert "+25.0 points" in told[2] and "best of FusionBench's, RegMean (only 1 of 2 of them" in told[2]
    assert "| RegMean | fusion-bench | 8, 40 samples | 75.0" in "\n".join(lines)


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


def test_a_row_is_what_compare_says_of_the_same_merge(board, zoo, models, tmp_path):
    """At the same points, on the same data: the chosen one, and right or wrong for every example."""
    from neuron_methods.evaluation import load_tasks
    from neuron_methods.evaluation.comparing import CompareSettings, compare

    rows = {"weight average": "linear", "task_arithmetic, untuned": "task_arithmetic:lambda=0.4"}
    scales = ROW["task_arithmetic"].scales
    rows["task_arithmetic"] = f"task_arithmetic:lambda={','.join(map(str, scales))}"
    scored = board.run_zoo(zoo, tmp_path / "board", lambda line: None, [*rows])
    settings = CompareSettings(defaults=False, progress=False, dtype="float32")
    source, tasks = (zoo / "merge.yml").read_text(), load_tasks(zoo / "tasks.yml")
    found = compare(source, tasks, tmp_path / "compared", [*rows.values()], settings)
    merges = [row for row in found.rows if row.kind == "merge"][1:]
    for name, row in zip(rows, merges, strict=True):
        test = report.unpack(scored["rows"][name]["test"])
        assert {task: scores.tolist() for task, scores in row.outcomes.items()} == {
            t: v.tolist() for t, v in test.items()
        }
    assert merges[-1].point == {"lambda": scored["rows"]["task_arithmetic"]["chosen"]["scale"]}
    base, own = (report.unpack(scored["references"][kind]) for kind in ("base", "experts"))
    assert all(found.rows[0].outcomes[task].tolist() == values.tolist() for task, values in base.items())
    for row in found.rows[1 : 1 + len(own)]:
        assert row.outcomes[row.name].tolist() == own[row.name].tolist()
    assert len({str(row.outcomes) for row in found.rows}) > 3  # scores tell models apart here
