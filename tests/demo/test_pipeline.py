"""The whole demo on a tiny base: what it writes, what it keeps, what an interruption leaves, what it reports."""

import json
import re
import shutil
import socket
from statistics import mean

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from neuron_methods.cli.profile import profile
from neuron_methods.demo import pipeline
from neuron_methods.demo.pipeline import DemoSettings, run_demo, training_settings
from neuron_methods.demo.questions import build_tasks
from neuron_methods.evaluation import evaluate, load_tasks
from neuron_methods.evaluation.comparing.statistics import spread
from neuron_methods.plugin.merging import merge_to_directory
from neuron_methods.sharing.publishing import merge_witness
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import printable

TASKS = ["arithmetic", "german", "python"]


@pytest.fixture(scope="module", autouse=True)
def tiny_demo(tiny_base, tmp_path_factory):
    """Let the demo take the tiny base for SmolLM2, and let nothing reach the network."""

    def refuse(*arguments, **options):
        raise AssertionError("asked the network")

    def copy_base(gguf, directory):
        shutil.copytree(tiny_base, directory)

    gguf = tmp_path_factory.mktemp("package") / "tiny.gguf"
    gguf.write_bytes(b"weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "find_gguf", lambda: gguf)
        patch.setattr(pipeline, "save_base", copy_base)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(socket.socket, "connect", refuse)
        yield


def settings(out, **options):
    return DemoSettings(out=out, **{"full": True, "steps": 2, "examples": 4, "progress": False, **options})


def files(root):
    return {path.relative_to(root): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    said: list[str] = []
    report = run_demo(settings(out), said.append)
    return out, report, said


def test_its_tasks_score_what_the_demo_scores(finished) -> None:
    out, report, _ = finished
    tasks = load_tasks(out / "tasks.yml")
    assert [task.name for task in tasks] == TASKS
    answers = {task: [] for task in TASKS}
    for split in ("test", "validation"):
        for result in evaluate(str(out / "merged"), tasks, split=split, progress=False).tasks:
            assert result.count == 2
            answers[result.name] += [outcome.prediction for outcome in result.outcomes]
    assert answers == {task: report.scores["merge"][task]["answers"] for task in TASKS}


def test_everything_is_where_the_report_says(finished, tiny_base) -> None:
    out, report, _ = finished
    base = load_file(tiny_base / "model.safetensors")
    for name in ["base", "merged", *(f"experts/{task}/full" for task in TASKS)]:
        tensors = load_file(out / name / "model.safetensors")
        assert {key: tensor.shape for key, tensor in tensors.items()} == {k: t.shape for k, t in base.items()}
        assert (out / name / "tokenizer.json").is_file()
    for task in TASKS:
        adapter = json.loads((out / "experts" / task / "adapter" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(out / "base")
        assert adapter["r"] == 16
    assert (out / "report.txt").read_text() == f"{report}\n"
    assert not [path for path in out.rglob("*") if "partial" in path.name]


def test_what_the_demo_makes_holds_nothing_of_the_demos_own(finished, tmp_path) -> None:
    """Its directories are uploaded and loaded as they are: what a merge or peft writes, and nothing else."""
    out, _, _ = finished
    assert {path.name for path in out.iterdir()} == {
        *("base", "data", "demo.json", "experts", "inputs", "merge.yaml", "merged", "report.txt", "scores", ".stages"),
        "tasks.yml",
    }
    merge_to_directory((out / "merge.yaml").read_text(), tmp_path / "merged", progress=False, witness=merge_witness())
    for made, alike in ((out / "merged", tmp_path / "merged"),):
        assert sorted(path.name for path in made.iterdir()) == sorted(path.name for path in alike.iterdir())
    for task in TASKS:
        assert sorted(path.name for path in (out / "experts" / task).iterdir()) == ["adapter", "full"]
    assert {path.stem for path in (out / "inputs").iterdir()} == set(TASKS)
    assert not list(out.rglob("demo-stage.json"))


def test_scores_are_written_as_evaluate_writes_them(finished) -> None:
    out, report, _ = finished
    for model, by_task in report.scores.items():
        assert sorted(p.name for p in (out / "scores" / model).iterdir()) == [*("scores.examples.jsonl", "scores.json")]
        scores = json.loads((out / "scores" / model / "scores.json").read_text())
        assert {task["name"]: task["score"] for task in scores["tasks"]} == {
            t: mean(by_task[t]["scores"]) for t in TASKS
        }
        assert [task["count"] for task in scores["tasks"]] == [4, 4, 4]
        lines = (out / "scores" / model / "scores.examples.jsonl").read_text().splitlines()
        answers = [json.loads(line)["prediction"] for line in lines]
        assert answers == [answer for task in TASKS for answer in by_task[task]["answers"]]


def test_the_yaml_is_the_one_that_was_merged(finished) -> None:
    out, report, _ = finished
    recipe = yaml.safe_load((out / "merge.yaml").read_text())
    assert (recipe["merge_method"], recipe["parameters"]) == ("neuron_response", {"inputs": "both"})
    assert recipe["base_model"] == str(out / "base")
    assert [model["model"] for model in recipe["models"]] == [str(out / "experts" / t / "full") for t in TASKS]
    profiles = [model["parameters"]["profile"] for model in recipe["models"]]
    assert profiles == [str(out / "inputs" / f"{task}.safetensors") for task in TASKS]
    assert (out / "merged" / "mergekit_config.yml").read_text() == (out / "merge.yaml").read_text()
    assert str(out / "merged") in report.merge_summary


def test_inputs_are_what_profile_measures_on_forty_examples_that_the_expert_was_trained_on(finished, tmp_path) -> None:
    out, _, _ = finished
    for task in TASKS:
        file = tmp_path / f"{task}.safetensors"
        model, data = f"{out}/experts/{task}/full", f"{task}={out}/data/{task}.train.jsonl:prompt,answer"
        options = ["--inputs", "--samples", "40", "--separator", " ", "--dtype", "float32", "-o", str(file)]
        result = CliRunner().invoke(profile, [model, "--data", data, *options])
        assert result.exit_code == 0, result.output
        measured, expected = load_file(out / "inputs" / file.name), load_file(file)
        assert measured.keys() == expected.keys() and len(measured) > 4
        assert all(torch.equal(measured[name], expected[name]) for name in expected)


def test_the_report_has_every_model_every_task_and_the_yaml(finished) -> None:
    out, report, _ = finished
    rows = rows_of(report)
    assert list(rows) == ["base", *(f"expert-{task}" for task in TASKS), "merge"]
    assert all(len(row) == 4 and "–" not in row for row in rows.values())
    text = str(report)
    assert all(task.held_out[0].answer in text for task in report.tasks)
    assert report.merge_yaml.splitlines()[0] in text
    assert str(out) in text
    for model, by_task in report.scores.items():
        assert all(len(by_task[task]["answers"]) == 4 for task in TASKS)
        right = np.array([by_task[task]["scores"] for task in TASKS])
        assert rows[model] == [*(str(spread([{"": one}])) for one in right), str(spread([dict(enumerate(right))]))]


def rows_of(report):
    """Cells of the table by model: a score and its interval each."""
    found = [re.split(r"\s{2,}", line.strip()) for line in report.table().splitlines()[1:]]
    return {row[0]: row[1:] for row in found}


def test_a_quick_run_asks_experts_their_own_task_and_shares_nothing_with_a_full_one(finished, tmp_path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    said: list[str] = []
    report = run_demo(settings(out, full=False), said.append)
    assert [line for line in said if "done before" in line and line.startswith(("expert", "inputs", "merge"))] == []
    assert {name: list(by_task) for name, by_task in report.scores.items()} == {
        "base": TASKS,
        **{f"expert-{task}": [task] for task in TASKS},
        "merge": TASKS,
    }
    rows = rows_of(report)
    for place, task in enumerate(TASKS):
        cells = rows[f"expert-{task}"]
        assert cells[place] == str(spread([{task: np.array(report.scores[f"expert-{task}"][task]["scores"])}]))
        assert [*cells[:place], *cells[place + 1 :]] == ["–"] * 3
    assert "demo --full" in str(report) and "demo --full" not in str(finished[1])
    own = np.array([report.scores[f"expert-{task}"][task]["scores"] for task in TASKS])
    assert f"experts {spread([dict(enumerate(own))])} %, each on its own" in report.comparison()


def test_a_quick_run_trains_on_fewer_examples() -> None:
    for task in build_tasks(1, seed=0):
        quick, full = (training_settings(task, DemoSettings(full=full)) for full in (False, True))
        assert quick.steps * quick.batch_size < full.steps * full.batch_size
        assert (full.steps, full.batch_size) == (task.steps, 12)


def test_a_second_run_does_nothing_again_and_reports_the_same(finished) -> None:
    out, report, said = finished
    before = files(out)
    said_again: list[str] = []
    again = run_demo(settings(out), said_again.append)
    assert files(out) == before
    assert str(again) == str(report)
    told = said[
        7
    ]  # base, three experts, their inputs, the merge and its scores come before, those of four models after
    assert len(said) == len(said_again) == 12 and told == said_again.pop(7)
    assert told.startswith(f"merge: {rows_of(report)['merge'][-1]} % of answers are right")
    assert all(line.endswith("...") for line in said if line != told)
    assert all("done before" in line for line in said_again)


def test_the_same_seed_gives_the_same_bytes_elsewhere(finished, tmp_path) -> None:
    out, _, _ = finished
    run_demo(settings(tmp_path / "other"), lambda line: None)
    for name in ["merged", *(f"experts/{task}/{kind}" for task in TASKS for kind in ("full", "adapter"))]:
        for weights in (out / name).glob("*.safetensors"):
            assert (tmp_path / "other" / name / weights.name).read_bytes() == weights.read_bytes()


def test_only_what_the_change_concerns_is_done_again(finished, tmp_path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)

    def built(**options):
        said: list[str] = []
        run_demo(settings(out, **options), said.append)
        return {line.split(":")[0].removesuffix(" ...") for line in said if line.endswith("...")}

    experts = {f"expert {task}" for task in TASKS}
    scores = {f"scores of {name}" for name in ["base", *(f"expert-{task}" for task in TASKS), "merge"]}
    assert built() == {"merge", "scores of merge"}  # the directory moved, and the YAML names it
    assert built(examples=5) == scores
    assert built(examples=5, steps=3) == experts | {"inputs", "merge"} | scores - {"scores of base"}
    assert built(examples=5, steps=3) == set()
    assert built(examples=5, steps=3, force=True) == {"base", "inputs", "merge"} | experts | scores


def test_an_interrupted_run_keeps_what_was_finished_and_goes_on_there(tmp_path) -> None:
    out = tmp_path / "out"

    def interrupt(line):
        if line.startswith("expert german"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(settings(out), interrupt)
    assert sorted(path.name for path in out.iterdir()) == [
        *(".stages", "base", "data", "demo.json", "experts", "tasks.yml")
    ]
    assert [path.name for path in (out / "experts").iterdir()] == ["arithmetic"]
    before = files(out / "experts")
    run_demo(settings(out), lambda line: None)
    assert before.items() <= files(out / "experts").items()


def test_a_directory_that_is_not_the_demos_is_refused_and_untouched(tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that the demo did not write"):
        run_demo(settings(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="Not a directory"):
        run_demo(settings(tmp_path / "thesis.txt"))
    with pytest.raises(UserError, match=r"a '\+' in a model's path"):
        run_demo(settings(tmp_path / "a+b"))
    with pytest.raises(UserError, match="--steps 0"):
        run_demo(settings(tmp_path / "out", steps=0))


def test_the_command_prints_the_report_on_stdout_and_stages_on_stderr(finished) -> None:
    from neuron_methods.cli.demo import demo

    out, report, _ = finished
    result = CliRunner().invoke(demo, ["--out", str(out), "--full", "--steps", "2", "--examples", "4", "--quiet"])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{printable(str(report))}\n"  # a model of random weights may answer control characters
    assert result.stderr.count("done before") == 11
