"""The leaderboard on a tiny zoo: every method runs, all have one budget, rows are kept, the report adds up."""

import importlib.util
import json
from pathlib import Path

import candidates
import numpy as np
import pytest
import report
import scales
import torch
import vit
from common import ZooModels

import neuron_methods

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = candidates.candidates(3)
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
    sizes = {"width": 16, "layers": 1, "pretraining_steps": 3, "steps": 2, "train": 12, "validation": 6, "test": 10}
    settings = vit.Settings(
        tasks=("digits-latin", "shapes", "counts"), scripts=("pillow",), latin_faces=("pillow",), **sizes
    )
    vit.build_zoo(out, settings, checks=False, say=lambda line: None, progress=False)
    return out


def test_every_method_of_mergekit_that_fits_has_a_row():
    assert candidates.untried(ROWS) == []
    without = [row for row in ROWS if row.method != "sce"]
    assert candidates.untried(without) == ["sce"]


def test_one_budget_for_all():
    for experts in (3, 8):
        points = {row.name: row.points for row in candidates.candidates(experts)}
        untuned = ("neuro_merging", "neuro_merging, density 0.5", "neuro_merging, norm")
        assert [points.pop(name) for name in untuned] == [1, 1, 1]
        assert set(points.values()) == {candidates.BUDGET}
    assert all(row.points == candidates.BUDGET for row in candidates.ablations(8))
    assert len({row.name for row in ALL}) == len(ALL)


@pytest.mark.parametrize("row", [row for row in ALL if row.origin != "fusion-bench"], ids=lambda row: row.name)
def test_every_setting_merges_and_scales(row, zoo, models):
    for settings in row.settings:
        merged = candidates.merge(row, models.base, models.experts, settings)
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
        found = scales.matched(merged, models, 1.0, neurons)
        for name in ("vit.layers.0.mlp.fc1.weight", "vit.layernorm.bias"):
            wanted = np.mean([(e[name] - models.base[name]).norm().item() for e in models.experts.values()])
            if not neurons or models.base[name].ndim == 1:
                assert (found[name] - models.base[name]).norm().item() == pytest.approx(wanted, rel=1e-4)
        assert found["classifier.weight"].equal(models.base["classifier.weight"])
