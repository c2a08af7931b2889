"""`mergekit-neuron evaluate` and `tune` as installed; the best configuration through mergekit's own command."""

import json
import os
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from neuron_methods.cli import main
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
        "error: none.yml: cannot be read (No such file or directory); check the path "
        "(see: mergekit-neuron help tasks)\n",
    )


def test_several_processes_find_what_one_finds(folder, monkeypatch):
    """Merges with chance in them, too; the first process alone writes, and of what it kept nothing is made again."""
    few = ["--task", "tasks.yml", "--only", "choices", "--quiet"]
    dare = "dare_linear:density=0.5;lambda=0.5,2"
    compare = ["compare", "merge.yml", *few, "--no-defaults", "--method", dare, "-o"]
    tune = ["tune", "merge.yml", *few, "--search", "lambda_orthogonal=0.5:3:0.5", "--test", "-o"]
    wrong = ["compare", "merge.yml", *few, "--method", "tise", "-o", "wrong"]
    commands_file = folder / "commands.json"
    commands_file.write_text(json.dumps([[*compare, "two"], [*compare, "two"], [*tune, "tuned-by-two"], wrong]))
    done = commands.launched("tests.support.several", commands_file, folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: two/best.yml") == 2 and done.stdout.count("written: tuned-by-two/best.yml") == 1
    assert done.stdout.count("2 processes: they share out the scoring, and each makes every merge in memory, ") == 1
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))  # by whichever is first
    assert error.removeprefix("error: ").removeprefix("process 1: ").startswith("--method 'tise': unknown method")
    ended = [line for line in done.stdout.splitlines() if line.startswith("ended")]
    assert sorted(ended) == ["ended: 0"] * 6 + ["ended: 1"] * 2
    assert not (folder / "wrong").exists() and not list(folder.rglob("*.partial"))
    monkeypatch.chdir(folder)
    for arguments in ([*compare, "one"], [*tune, "tuned-by-one"]):
        assert CliRunner().invoke(main, arguments).exit_code == 0

    def told(place):
        content = json.loads((folder / place).read_text())
        for row in content.get("rows", []):
            row.pop("merge_seconds", None)
            for task in row["tasks"]:
                task.pop("seconds")
        return content.get("rows") or (content["best"], content["confirmed"], content["test"]["mean"])

    assert told("two/compare.json") == told("one/compare.json")
    assert told("tuned-by-two/tune.json") == told("tuned-by-one/tune.json")
    assert (folder / "two/best.yml").read_text() == (folder / "one/best.yml").read_text()
    one, two = ((folder / f"tuned-by-{n}/trace.jsonl").read_text().splitlines() for n in ("one", "two"))
    assert [json.loads(line)["scores"] for line in one] == [json.loads(line)["scores"] for line in two]
    assert len(one) == 6
