"""Comparisons on tiny models: every score is that of a real merge, rows are kept, and the best is the validation's."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from neuron_methods.cli import main
from neuron_methods.evaluation import evaluate, load_tasks
from neuron_methods.evaluation.comparing import (
    CompareSettings,
    compare,
    contenders,
    outcome,
    paired_difference,
    spread,
    study,
)
from neuron_methods.evaluation.comparing.contenders import parse_methods
from neuron_methods.evaluation.tuning import tune
from neuron_methods.evaluation.tuning.search import make_strategy
from neuron_methods.plugin.configuration import read_configuration
from neuron_methods.plugin.in_memory import merged_in_memory
from neuron_methods.plugin.merging import merge_to_directory
from neuron_methods.support.errors import UserError
from tests.evaluation import cases

QUIET = CompareSettings(progress=False, defaults=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    cases.questions(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tasks_file(folder):
    return cases.write_tasks(folder, cases.choice_task(), cases.choice_task(name="by tokens", normalize="tokens"))


def run(*arguments):
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def test_every_row_is_a_real_merge_and_the_best_is_the_best_on_validation_data(experts, folder, tmp_path):
    (folder / "merge.yml").write_text(cases.merge_yaml(experts("llama"), density=0.5))
    tasks = tasks_file(folder)
    options = ["--no-defaults", "--method", "linear", "--method", "ties:density=0.3,0.9;lambda=0.5,2", "--quiet"]
    done = run("merge.yml", "--task", tasks, "-o", "out", *options)
    assert done.exit_code == 0, done.output
    told = json.loads((folder / "out/compare.json").read_text())
    rows = {row["name"]: row for row in told["rows"]}
    tuned = "ties (density=0.3,0.9, lambda=0.5,2)"
    assert list(rows) == ["base", "expert-a", "expert-b", "as configured", "linear", tuned]
    assert (rows[tuned]["points"], rows["linear"]["points"]) == (4, 1)

    loaded = load_tasks(tasks)
    for name in ("base", "expert-a", "expert-b"):
        scores = [task.score for task in evaluate(str(experts("llama") / name), loaded, progress=False).tasks]
        assert [task["score"] for task in rows[name]["tasks"]] == scores
    for number, row in enumerate(row for row in told["rows"] if row["kind"] == "merge"):
        merge_to_directory((folder / "out" / row["yaml"]).read_text(), folder / f"m{number}", progress=False)
        found = [evaluate(str(folder / f"m{number}"), loaded, split=s, progress=False) for s in ("test", "validation")]
        assert [task["score"] for task in row["tasks"]] == [task.score for task in found[0].tasks]
        assert row["validation"] == pytest.approx(found[1].mean)
    merges = [row for row in told["rows"] if row["kind"] == "merge"]
    assert told["best"] == max(merges, key=lambda row: row["validation"])["name"]
    best = yaml.safe_load((folder / "out/best.yml").read_text())
    assert best == yaml.safe_load((folder / "out" / rows[told["best"]]["yaml"]).read_text())
    assert f"best on validation data (mean): {told['best']}" in done.output
    page = (folder / "out/compare.html").read_text()
    assert page.count("<svg") == 2 and "expert-b" in page and "http" not in page.replace("http://www.w3.org", "")
    assert "| linear |" in (folder / "out/compare.md").read_text()


def test_finished_rows_are_kept_and_others_made(experts, folder, monkeypatch):
    source = cases.merge_yaml(experts("llama"))
    tasks = load_tasks(tasks_file(folder))
    merged, interrupted = [], []
    merge = merged_in_memory

    def count(source, *arguments, **options):
        merged.append(yaml.safe_load(source)["merge_method"])
        if len(merged) == 2 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return merge(source, *arguments, **options)

    monkeypatch.setattr("neuron_methods.evaluation.tuning.bench.merged_in_memory", count)
    with pytest.raises(KeyboardInterrupt):
        compare(source, tasks, folder / "out", ["linear"], QUIET)
    assert not [p for p in (folder / "out").rglob("*") if p.suffix == ".safetensors"]
    first = compare(source, tasks, folder / "out", ["linear"], QUIET)
    assert set(merged[1:]) == {"neuro_merging", "linear"}
    merged.clear()
    again = compare(source, tasks, folder / "out", ["linear", "task_arithmetic"], QUIET)
    assert set(merged) == {"task_arithmetic"}
    assert [row.tasks for row in again.rows[:-1]] == [row.tasks for row in first.rows]
    merged.clear()
    cases.questions(folder, [{**row, "right": (row["right"] + 1) % 3} for row in cases.QUESTIONS])
    compare(source, tasks, folder / "out", ["linear"], QUIET)
    assert set(merged) == {"neuro_merging", "linear"}  # of other data


def test_a_method_that_cannot_merge_is_told_and_the_others_compared(experts, folder):
    source = cases.merge_yaml(experts("llama"))
    said = []
    found = compare(
        source, load_tasks(tasks_file(folder)), folder / "out", ["neuron_response:profile=none"], QUIET, say=said.append
    )
    row = found.merges[-1]
    assert row.failed and "none" in row.failed and any(row.failed in line for line in said)
    assert found.best.name == "as configured"


def test_the_usual_methods_are_sound_and_within_the_budget(experts):
    source = cases.merge_yaml(experts("llama"))
    for count in (2, 3, 5):
        everyone = contenders(count)
        assert len({each.name for each in everyone}) == len(everyone)
        for each in everyone:
            read_configuration(each.source(source, "x"), "x")
            if each.search:
                (points,) = make_strategy("grid", each.parameters, 8, 0).batches()
                assert len(points) == 8
    written = yaml.safe_load(everyone[0].source(source, "x"))
    assert written["base_model"] == yaml.safe_load(source)["base_model"] and written["dtype"] == "bfloat16"


def test_the_base_is_no_expert(experts):
    """Of methods that merge a YAML's base like its other models it has no share."""
    source = cases.merge_yaml(experts("llama"), dtype="float32")
    linear, karcher = parse_methods(["linear", "karcher"])
    with merged_in_memory(linear.source(source, "x")) as held:
        found = held.tensors["model.norm.weight"]
    own = [load_file(experts("llama") / f"expert-{n}" / "model.safetensors")["model.norm.weight"] for n in "ab"]
    torch.testing.assert_close(found, (own[0] + own[1]) / 2)
    assert "base_model" not in yaml.safe_load(karcher.source(source, "x"))


def test_a_method_by_hand():
    one, several, plain, of_one = parse_methods(
        ["ties:density=0.3", "ties:density=0.2,0.6;lambda=0.7:1.3:0.2", "neuro_merging", "linear:weight@1=2"]
    )
    assert (of_one.settings, of_one.search) == ({"weight": 1.0}, ("weight@1=2",))
    assert (one.settings, one.search) == ({"density": 0.3, "weight": 1.0}, ())
    assert several.search == ("density=0.2,0.6", "lambda=0.7:1.3:0.2")
    assert (plain.settings, plain.search) == ({}, ())


@pytest.mark.parametrize(
    ("methods", "changes", "message"),
    [
        (["tise"], {}, "--method 'tise': unknown method 'tise'; did you mean 'ties'"),
        (["ties:"], {}, "--method 'ties:': expected NAME"),
        (["ties:density"], {}, "--method 'ties:density': "),
        (["ties:densty=0.5"], {}, "^--method 'ties:densty=0.5': ties has no parameter 'densty'"),
        (["ties:density=high"], {}, "^--method 'ties:density=high': density: "),
        (["ties:density=0.2,5"], {}, "^--method 'ties:density=0.2,5': density: "),
        (["ties:weight@nobody=1,2"], {}, "^--method 'ties:weight@nobody=1,2': weight@nobody: 'nobody' names no expert"),
        (["linear", "linear"], {}, "--method linear: is compared already"),
        ([], {"objective": "relative"}, "--objective 'relative': expected mean or minimum"),
    ],
)
def test_what_cannot_be_compared(experts, folder, methods, changes, message):
    tasks = load_tasks(tasks_file(folder))
    settings = CompareSettings(progress=False, defaults=False, **changes)
    with pytest.raises(UserError, match=message):
        compare(cases.merge_yaml(experts("llama")), tasks, folder / "out", methods, settings)
    assert not (folder / "out").exists()


def test_places_and_configurations_that_are_none(experts, folder):
    tasks = load_tasks(tasks_file(folder))
    source = cases.merge_yaml(experts("llama"))
    (folder / "mine").mkdir()
    (folder / "mine/notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"-o .*mine: holds files that compare did not write"):
        compare(source, tasks, folder / "mine", [], QUIET)
    inside = experts("llama") / "expert-a" / "out"
    for run in (
        lambda: compare(source, tasks, inside, [], QUIET),
        lambda: tune(source, tasks, ["density=0.5"], inside),
    ):
        with pytest.raises(UserError, match=r"^-o .*/expert-a/out: lies in .*/expert-a, which is read; choose another"):
            run()
    assert not inside.exists()
    alone = yaml.safe_load(source)
    del alone["models"][1]
    with pytest.raises(UserError, match="compare takes a configuration with base_model and two models or more"):
        compare(yaml.safe_dump(alone), tasks, folder / "out", [], QUIET)
    (task,) = cases.tasks_of(folder, cases.choice_task(data="questions.jsonl"))
    with pytest.raises(UserError, match="there is no validation_split"):
        compare(source, [task], folder / "out", [], QUIET)
    assert {path.name for path in folder.iterdir()} == {"mine", "questions.jsonl", "tasks.yml"}


@pytest.fixture(scope="module")
def finished(experts, tmp_path_factory):
    """A comparison of two methods, with what it was made from."""
    folder = tmp_path_factory.mktemp("finished")
    cases.questions(folder)
    tasks = load_tasks(tasks_file(folder))
    source = cases.merge_yaml(experts("llama"))
    compare(source, tasks, folder / "out", ["linear"], QUIET)
    return source, tasks, folder / "out"


CHANGES = {
    "nothing in it": lambda result: result.clear(),
    "a key too many": lambda result: result.update(name="linear"),
    "no tasks": lambda result: result.update(tasks=[]),
    "a task that is none": lambda result: result.update(tasks=[1, 2]),
    "another task": lambda result: result["tasks"][0].update(name="others"),
    "scores that are text": lambda result: result.update(outcomes="right"),
    "a score that is no number": lambda result: result["outcomes"]["choices"].__setitem__(0, float("nan")),
    "an example too few": lambda result: result["outcomes"]["choices"].pop(),
    "a point that is none": lambda result: result.update(point=[1]),
    "a YAML that is none": lambda result: result.update(source=3),
    "a time that is text": lambda result: result.update(merge_seconds="1"),
    "an objective that is text": lambda result: result.update(validation="1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_row_that_was_changed_is_told(finished, tmp_path, change):
    source, tasks, made = finished
    out = tmp_path / "out"
    shutil.copytree(made, out)
    row = next((out / "rows").glob("merge_linear-*.json"))
    content = json.loads(row.read_text())
    CHANGES[change](content["result"])
    row.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"^{re.escape(str(row))}: .*; remove it, or give --force to begin anew$"):
        compare(source, tasks, out, ["linear"], QUIET)
    row.unlink()
    compare(source, tasks, out, ["linear"], QUIET)


def test_force_forgets_rows_and_nothing_else(finished, tmp_path):
    source, tasks, made = finished
    out = tmp_path / "out"
    shutil.copytree(made, out)
    (out / "yamls").mkdir()
    for name in ("notes.txt", "rows/mine.json", "yamls/mine.yml"):
        (out / name).write_text("mine")
    next((out / "rows").glob("base_*.json")).write_text("{")
    compare(source, tasks, out, [], replace(QUIET, force=True))
    assert {(out / name).read_text() for name in ("notes.txt", "rows/mine.json", "yamls/mine.yml")} == {"mine"}
    assert not list((out / "rows").glob("merge_linear-*.json"))
    (tmp_path / "other/rows").mkdir(parents=True)
    (tmp_path / "other/rows/mine.json").write_text("{}")
    with pytest.raises(UserError, match="holds files that compare did not write"):
        compare(source, tasks, tmp_path / "other", [], replace(QUIET, force=True))


def test_every_row_has_a_yaml_of_its_own():
    many = f"ties (density={','.join(f'0.{number}' for number in range(100, 180))})"
    names = ["linear", "ties (density=0.2,0.6)", "ties (density=0.2:0.6)", many, f"{many} "]
    found = outcome.yaml_names(names)
    assert found["linear"] == "linear.yml"
    assert len(set(found.values())) == len(names) and all(len(name.encode()) < 100 for name in found.values())


def test_why_there_is_no_figure(experts, folder):
    (folder / "merge.yml").write_text(cases.merge_yaml(experts("llama")))
    tasks = cases.write_tasks(folder, cases.choice_task(), cases.perplexity_task())
    done = run("merge.yml", "--task", tasks, "-o", "out", "--no-defaults", "--quiet")
    assert "no figure: it is of scores that are means over examples" in done.output and "pip" not in done.output


def test_intervals_and_differences():
    generator = np.random.default_rng(0)
    right = {name: (generator.random(400) < share).astype(float) for name, share in (("a", 0.7), ("b", 0.4))}
    found = spread([right])
    wide = 1.96 * np.sqrt(0.7 * 0.3 / 400 + 0.4 * 0.6 / 400) / 2
    assert found.mean == pytest.approx((right["a"].mean() + right["b"].mean()) / 2)
    assert (found.high - found.low) / 2 == pytest.approx(wide, rel=0.1)
    shares = {"a": generator.random(500)}
    found = spread([shares])
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * shares["a"].std() / np.sqrt(500), rel=0.1)
    worse = {name: values * (generator.random(400) < 0.9) for name, values in right.items()}
    gap, error = paired_difference([worse], [right])
    each = [worse[name] - right[name] for name in right]
    assert gap == pytest.approx(np.mean([e.mean() for e in each]))
    assert error == pytest.approx(np.sqrt(sum(e.var(ddof=1) / 400 for e in each)) / 2)


def test_an_expert_is_named_by_what_tells_it_apart():
    paths = ["/x/a/model", "/x/b/model", "org/c"]
    assert [study._shown(path, paths) for path in paths] == ["a/model", "b/model", "c"]
