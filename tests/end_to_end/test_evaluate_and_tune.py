"""`mergekit-neuron evaluate` and `tune` as installed; the best configuration through mergekit's own command."""

import json
import os
from pathlib import Path

import pytest
import yaml

from tests.evaluation import cases
from tests.support import commands, tiny


def run(folder, command, *arguments, code=0):
    done = commands.run(command, *arguments, folder=folder)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny.save_experts(tmp_path_factory.mktemp("tune"))
    cases.questions(folder)
    (folder / "merge.yml").write_text(cases.merge_yaml(Path(".")))
    cases.write_tasks(folder, cases.perplexity_task(), cases.choice_task())
    return folder


def test_the_best_configuration_is_mergekit_s_and_scores_what_tune_said(folder):
    search = ["--search", "lambda_orthogonal=0.5:3:0.5", "--objective", "relative", "--test", "-o", "tuned"]
    done = run(folder, "mergekit-neuron", "tune", "merge.yml", "--task", "tasks.yml", *search)
    assert "6 points tried: 6 recombined in memory, 0 merged; 4 merges in" in done.stdout
    assert "Traceback" not in done.stderr
    assert sorted(os.listdir(folder / "tuned")) == [
        "best.yml",
        "experts.json",
        "scores.png",
        "trace.jsonl",
        "tune.json",
    ]
    best = yaml.safe_load((folder / "tuned" / "best.yml").read_text())
    assert best["merge_method"] == "neuro_merging"

    run(folder, "mergekit-yaml", "tuned/best.yml", "merged")
    shown = run(folder, "mergekit-neuron", "evaluate", "merged", "--task", "tasks.yml", "-o", "merged.json").stdout
    told = {task["name"]: task for task in json.loads((folder / "tuned" / "tune.json").read_text())["test"]["tasks"]}
    for task in json.loads((folder / "merged.json").read_text())["tasks"]:
        assert task["score"] == pytest.approx(told[task["name"]]["score"], rel=1e-6)
        assert task["count"] == told[task["name"]]["count"] == 12
    assert shown.splitlines()[0].startswith("task ")
    assert len((folder / "merged.examples.jsonl").read_text().splitlines()) == 24


def test_a_mistake_is_one_line(folder):
    done = run(folder, "mergekit-neuron", "evaluate", "base", "--task", "none.yml", code=1)
    assert (done.stdout, done.stderr) == (
        "",
        "error: none.yml: cannot be read (No such file or directory); check the path\n",
    )
