"""Whole searches on tiny models: merges counted, scores equal to those of real merges, resumed, refused."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from neuron_methods.cli import main
from neuron_methods.evaluation import evaluate, read_examples
from neuron_methods.evaluation.tuning import Bench, Recipe, TuneSettings, parse_search, tune
from neuron_methods.evaluation.tuning.bench import distinct_tensors
from neuron_methods.evaluation.tuning.objective import experts_of_task, objective
from neuron_methods.evaluation.tuning.trace import Trace
from neuron_methods.kernels import response
from neuron_methods.methods import neuron_response
from neuron_methods.plugin import in_memory, merging
from neuron_methods.support import runs
from neuron_methods.support.errors import UserError
from tests.evaluation import cases
from tests.support import tiny
from tests.support.plans import write_groups

L1, L2 = "lambda_parallel", "lambda_orthogonal"
FILE = "questions.jsonl"
QUIET = TuneSettings(progress=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    cases.questions(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def merges(monkeypatch):
    """The configurations that were really merged, in their order."""
    seen = []
    merge = in_memory.merged_in_memory

    def count(source, *arguments, **options):
        seen.append(yaml.safe_load(source))
        return merge(source, *arguments, **options)

    monkeypatch.setattr("neuron_methods.evaluation.tuning.bench.merged_in_memory", count)
    return seen


def settings(**changes):
    return TuneSettings(**{"progress": False, **changes})


def words(folder, **changes):
    return cases.tasks_of(folder, cases.perplexity_task(**changes))


def test_a_grid_of_a_linear_parameter_takes_three_merges_and_one_to_confirm(experts, folder, merges):
    tasks = words(folder)
    said = []
    source = cases.merge_yaml(experts("llama"))
    result = tune(source, tasks, ["lambda_orthogonal=0:3:0.25"], folder / "out", QUIET, say=said.append)
    assert len(merges) == result.effort.merges == 4
    assert [m["parameters"]["lambda_orthogonal"] for m in merges] == [0.0, 1.0, 3.0, result.best["lambda_orthogonal"]]
    assert [m["dtype"] for m in merges] == ["float32", "float32", "float32", "bfloat16"]
    assert (result.effort.points, result.effort.recombined) == (13, 13)
    assert said == ["linear in lambda_orthogonal: parts found and checked by 3 merges, 0 MB"]
    assert result.difference <= 2**-8
    assert result.confirmed["words"] == pytest.approx(result.scores["words"], rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "method", "searches", "point"),
    [
        ("llama", "neuro_merging", [L2 + "=0:3:1", L1 + "=-1:1:1"], {L2: 2.0, L1: -1.0}),
        ("llama", "task_arithmetic", ["lambda=0:3:0.5"], {"lambda": 2.5}),
        ("llama", "task_arithmetic", ["weight@1=0:2:1", "weight@2=0:2:1"], {"weight@1": 2.0, "weight@2": 1.0}),
        ("llama", "ties", ["lambda=0:3:0.5"], {"lambda": 1.5}),
        ("llama", "min_merging", ["lambda=0:3:0.5"], {"lambda": 2.5}),
        ("vit", "neuro_merging", [L2 + "=0:3:0.5"], {L2: 2.5}),
        ("t5", "neuro_merging", [L2 + "=0:3:0.5"], {L2: 2.5}),
    ],
)  # fmt: skip
def test_recombined_weights_are_those_of_a_real_merge(experts, folder, kind, method, searches, point):
    required = {"weight": 1.0, "density": 0.5} if method == "ties" else {}
    required = {"weight": 1.0} if method == "task_arithmetic" and "@" not in searches[0] else required
    # mergekit's own methods compute in dtype: in bfloat16, rounding decides some of the elections of ties.
    source = cases.merge_yaml(experts(kind), method, dtype="float32", **required) + "out_dtype: bfloat16\n"
    parameters = parse_search(searches)
    recipe = Recipe(source, "merge.yml", parameters)
    tiny.write_images(folder / "images", 1)
    images = {
        "name": "a",
        "kind": "image-classification",
        "data": {"source": "images", "split": "train", "validation_split": "train"},
    }
    (task,) = cases.tasks_of(folder, images if kind == "vit" else cases.choice_task())
    from neuron_methods.evaluation.tuning.search import make_strategy

    (points,) = make_strategy("grid", parameters, None, 0).batches()
    with Bench(recipe, [(task, read_examples(task, "validation"))]) as bench:
        found = None
        for tried, _, how in bench.try_points(points):
            assert how == "recombined"
            if tried == point:
                found = {
                    name: tensor.detach().cpu().clone()
                    for name, tensor in distinct_tensors(bench._opened.model).items()
                }
        merging.merge_to_directory(recipe.source_at(point), folder / "real", progress=False)
    loader = getattr(transformers, type(bench_model(folder / "real")).__name__)
    real = distinct_tensors(loader.from_pretrained(folder / "real", dtype=torch.float32))
    assert found.keys() == real.keys()
    changed = 0
    for name, tensor in real.items():
        torch.testing.assert_close(found[name], tensor, rtol=2**-7, atol=1e-5)  # bfloat16 holds 8 bits
        assert torch.equal(found[name], found[name].bfloat16().float())
        changed += not torch.equal(tensor, 0 * tensor)
    assert changed


def bench_model(path):
    config = transformers.AutoConfig.from_pretrained(path)
    return getattr(transformers, config.architectures[0])(config)


def test_every_point_merged_scores_the_same(experts, folder, merges):
    tasks = words(folder)
    source = cases.merge_yaml(experts("llama"), dtype="float32")
    fast = tune(source, tasks, ["lambda_orthogonal=0:3:0.5"], folder / "fast", QUIET)
    assert len(merges) == 4
    slow = tune(source, tasks, ["lambda_orthogonal=0:3:0.5"], folder / "slow", settings(shortcut=False))
    assert len(merges) == 4 + 7 and (slow.effort.merges, slow.effort.recombined) == (7, 0)
    assert {t.weights for t in fast.trials} == {"recombined"} and {t.weights for t in slow.trials} == {"merged"}
    for one, other in zip(fast.trials, slow.trials, strict=True):
        assert one.point == other.point
        assert one.scores["words"] == pytest.approx(other.scores["words"], rel=1e-5)
    assert fast.best == slow.best


def test_a_trial_is_what_evaluate_says_of_the_merge(experts, folder):
    tasks = words(folder)
    source = cases.merge_yaml(experts("llama"))
    result = tune(source, tasks, ["lambda_orthogonal=3,2.5,2,1.5,1,0.5"], folder / "out", settings(test=True))
    merging.merge_to_directory((folder / "out" / "best.yml").read_text(), folder / "merged", progress=False)
    validation = evaluate(str(folder / "merged"), tasks, split="validation", progress=False)
    assert validation.tasks[0].score == pytest.approx(result.confirmed["words"], rel=1e-6)
    test = evaluate(str(folder / "merged"), tasks, progress=False)
    assert test.tasks[0].score == pytest.approx(result.test.tasks[0].score, rel=1e-6)
    assert result.test.tasks[0].split == "[:12]"
    assert len({trial.scores["words"] for trial in result.trials}) == 6
    assert min(result.trials, key=lambda t: t.scores["words"]).point == result.best != result.trials[0].point


def test_test_data_is_not_looked_at_while_searching(experts, folder):
    source = cases.merge_yaml(experts("llama"))
    search = ["lambda_orthogonal=0.5:3:0.5"]
    one = tune(source, words(folder), search, folder / "one", settings(test=True))
    rows = [{**q, "prompt": "tree " * 9 if i < 12 else q["prompt"]} for i, q in enumerate(cases.QUESTIONS)]
    cases.questions(folder, rows)
    two = tune(source, words(folder), search, folder / "two", settings(test=True))
    assert [t.scores for t in one.trials] == [t.scores for t in two.trials]
    assert one.test.tasks[0].score != two.test.tasks[0].score


def test_parameters_that_are_not_linear_share_parts_where_they_agree(experts, folder, merges):
    source = cases.merge_yaml(experts("llama"))
    search = ["density=0.1,0.4", "lambda_orthogonal=auto,0,1,2,3"]
    result = tune(source, words(folder), search, folder / "out", QUIET)
    assert (result.effort.points, result.effort.recombined) == (10, 8)
    assert len(merges) == 2 * (3 + 1) + 1
    by_key = {(t.point["density"], t.point["lambda_orthogonal"]): t.scores["words"] for t in result.trials}
    # With nothing of the experts added, density is of no consequence; otherwise it is.
    assert by_key[0.1, 0] == by_key[0.4, 0] and by_key[0.1, 2] != by_key[0.4, 2]


def test_where_stderr_is_no_terminal_only_the_points_are_told(experts, folder, capfd):
    """A line for each task of each point would bury everything else."""
    source = cases.merge_yaml(experts("llama"))
    capfd.readouterr()  # what saving the models has shown
    tune(source, words(folder), ["lambda_orthogonal=1,2,3"], folder / "out", settings(progress=True))
    shown = capfd.readouterr().err
    assert "\r" not in shown
    first, *others = [line for line in shown.splitlines() if "point" in line or "example" in line]
    assert first == "points: 0 points, 00:00 elapsed"
    assert re.fullmatch(r"points: 3 of 3 points, 00:\d\d elapsed, 00:00 to go, best 0\.\d{4}", others[-1])


def test_few_points_are_merged_one_by_one(experts, folder, merges):
    tune(cases.merge_yaml(experts("llama")), words(folder), ["lambda_orthogonal=1,2,3"], folder / "out", QUIET)
    assert [m["dtype"] for m in merges] == ["bfloat16"] * 3


def test_a_merge_that_is_not_linear_is_found_out_aloud(experts, folder, merges):
    source = cases.merge_yaml(experts("llama"), "dare_linear", weight=1.0, density=0.5)
    said = []
    result = tune(source, words(folder), ["lambda=0.5:2:0.25"], folder / "out", QUIET, say=said.append)
    (line,) = said
    assert line.startswith("no shortcut: the merge is not linear in lambda (") and "merged by itself" in line
    assert {trial.weights for trial in result.trials} == {"merged"}
    assert len(merges) == 3 + 7


def test_neuron_merge_s_factors_are_recombined_where_groups_are_plain(experts, folder, merges):
    config = transformers.AutoConfig.from_pretrained(experts("llama") / "base")
    write_groups(folder / "groups.json", config, ("general", "code", "math"))
    source = yaml.safe_load(cases.merge_yaml(experts("llama"), "neuron_merge", groups="groups.json", rest_weight=1.0))
    for entry, group in zip(source["models"], ("code", "math"), strict=True):
        entry["parameters"] = {"group": group}
    search = ["general=0:1:0.25", "in_group=0,1,2"]
    result = tune(yaml.safe_dump(source), words(folder), search, folder / "out", QUIET)
    assert (result.effort.points, result.effort.recombined, len(merges)) == (15, 15, 5)
    assert result.difference <= 2**-5
    assert len({trial.scores["words"] for trial in result.trials}) == 15
    search = ["lambda=0:2:0.25", "rest=base,task_arithmetic"]
    result = tune(yaml.safe_dump(source), words(folder), search, folder / "rest", QUIET)
    assert (result.effort.points, result.effort.recombined) == (18, 18)
    # Without a change to the neurons, what is left is the rest: the base's, or merged with a lambda of 0.
    scores = {(t.point["lambda"], t.point["rest"]): t.scores["words"] for t in result.trials}
    assert scores[0.0, "base"] == scores[0.0, "task_arithmetic"]
    assert scores[1.0, "base"] != scores[1.0, "task_arithmetic"]
    source["parameters"]["within"] = "ties"
    tune(yaml.safe_dump(source), words(folder), ["general=0:1:0.25"], folder / "ties", QUIET)
    assert len([m for m in merges if m["parameters"].get("within") == "ties"]) == 5


def test_what_these_parameters_do_not_change_follows_the_others(experts, folder):
    """A value of `rest` changes tensors that lambda does not: they must not stay as the other value left them."""
    source = yaml.safe_load(cases.merge_yaml(experts("llama"), "min_merging", dtype="float32"))
    search = ["lambda=0:2:0.5", "rest=base,linear"]
    fast = tune(yaml.safe_dump(source), words(folder), search, folder / "fast", QUIET)
    slow = tune(yaml.safe_dump(source), words(folder), search, folder / "slow", settings(shortcut=False))
    assert fast.effort.recombined == 10
    expected = {str(t.point): t.scores["words"] for t in slow.trials}
    assert {str(t.point): pytest.approx(t.scores["words"], rel=1e-5) for t in fast.trials} == expected
    assert len({*expected.values()}) == 10


def test_cma_recombines_all_its_generations(experts, folder, merges):
    source = cases.merge_yaml(experts("llama"))
    search = ["lambda_orthogonal=0:3", "lambda_parallel=-1:1"]
    result = tune(source, words(folder), search, folder / "out", settings(strategy="cma", budget=20))
    assert (result.effort.points, result.effort.recombined, len(merges)) == (20, 20, 5)
    again = tune(source, words(folder), search, folder / "out", settings(strategy="cma", budget=20))
    assert (again.effort.points, len(merges)) == (0, 5)
    assert again.best == result.best


def test_what_is_in_the_trace_is_not_tried_again(experts, folder, merges):
    source, out = cases.merge_yaml(experts("llama")), folder / "out"
    first = tune(source, words(folder), ["lambda_orthogonal=1:3:0.5"], out, settings(test=True))
    count = len(merges)
    told = json.loads((out / "tune.json").read_text())
    (out / f".mergekit-neuron-tune.{runs._host()}.1.0.0.partial").mkdir()  # as a killed run leaves it
    again = tune(source, words(folder), ["lambda_orthogonal=1:3:0.5"], out, QUIET)
    assert (again.effort.points, again.best, len(merges)) == (0, first.best, count)
    assert json.loads((out / "tune.json").read_text())["test"] == told["test"] is not None
    assert sorted(path.name for path in out.iterdir()) == ["best.yml", "scores.png", "trace.jsonl", "tune.json"]
    wider = tune(source, words(folder), ["lambda_orthogonal=0:3:0.5"], out, QUIET)
    assert (wider.effort.points, len(wider.trials)) == (2, 7)


def test_a_search_that_was_interrupted_goes_on(experts, folder, merges):
    source, out = cases.merge_yaml(experts("llama")), folder / "out"
    whole = tune(source, words(folder), ["lambda_orthogonal=0:3:0.5"], out, QUIET)
    lines = (out / "trace.jsonl").read_text().splitlines(keepends=True)
    (out / "trace.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote the fourth
    (out / "best.yml").unlink()
    again = tune(source, words(folder), ["lambda_orthogonal=0:3:0.5"], out, QUIET)
    assert again.effort.points == 4
    assert [t.scores for t in again.trials] == [t.scores for t in whole.trials]
    assert len((out / "trace.jsonl").read_text().splitlines()) == 7
    assert (out / "best.yml").is_file()


@pytest.mark.parametrize(
    "what",
    [
        "configuration",
        "set of validation examples",
        "set of tasks",
        "state of the models' files",
        "set of parameters",
        "--dtype",
    ],
)
def test_another_search_s_trace_is_not_taken(experts, folder, merges, what):
    shutil.copytree(experts("llama"), folder / "models")
    source, search = cases.merge_yaml(folder / "models"), ["lambda_orthogonal=1,2"]
    tune(source, words(folder), search, folder / "out", QUIET)
    changed = QUIET
    if what == "configuration":
        source = cases.merge_yaml(folder / "models", density=0.4)
    elif what == "set of validation examples":
        cases.questions(folder, cases.QUESTIONS[:-1])
    elif what == "state of the models' files":
        tiny.build_model("llama").save_pretrained(folder / "models" / "expert-a")
    elif what == "set of parameters":
        search = ["density=0.1,0.2"]
    elif what == "--dtype":
        changed = settings(dtype="bfloat16")
    tasks = words(folder, max_length=4) if what == "set of tasks" else words(folder)
    with pytest.raises(UserError, match=rf"-o .*: holds a search with (.* and )?another {what}[ ;].*--force"):
        tune(source, tasks, search, folder / "out", changed)
    assert tune(source, tasks, search, folder / "out", settings(force=True, dtype=changed.dtype)).effort.points == 2


def test_directories_that_hold_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that tune did not write"):
        Trace(tmp_path, {}, False)
    with pytest.raises(UserError, match="a file; name a directory"):
        Trace(tmp_path / "notes.txt", {}, False)


def test_objectives():
    scores, metrics = {"a": 0.8, "b": 0.4, "p": 4.0}, {"a": "accuracy", "b": "exact_match", "p": "perplexity"}
    assert objective("mean", scores, metrics) == pytest.approx((0.8 + 0.4 + 0.25) / 3)
    assert objective("minimum", scores, metrics) == 0.25
    experts = {"a": 1.0, "b": 0.8, "p": 2.0}
    assert objective("relative", scores, metrics, experts) == pytest.approx((0.8 + 0.5 + 0.5) / 3)


def test_relative_to_the_experts_that_are_scored_once(experts, folder, monkeypatch):
    source = cases.merge_yaml(experts("llama"))
    tasks = cases.tasks_of(folder, cases.perplexity_task(name="expert-b"), cases.perplexity_task(name="else"))
    said = []
    result = tune(
        source, tasks, ["lambda_orthogonal=1,2"], folder / "out", settings(objective="relative"), say=said.append
    )
    alone = {
        n: evaluate(str(experts("llama") / n), tasks, split="validation", progress=False)
        for n in ("expert-a", "expert-b")
    }
    known = json.loads((folder / "out" / "experts.json").read_text())
    assert known["expert-b"] == {str(experts("llama") / "expert-b"): alone["expert-b"].tasks[0].score}
    assert known["else"] == {str(experts("llama") / n): e.tasks[1].score for n, e in alone.items()}
    best = min(known["else"].values())
    expected = (known["expert-b"][str(experts("llama") / "expert-b")] + best) / result.scores["else"] / 2
    assert result.objective == pytest.approx(expected)
    assert [line.split(":")[0] for line in said] == ["expert on expert-b", "expert on else"]
    monkeypatch.setattr("neuron_methods.evaluation.tuning.study.open_model", None)  # calling it would fail
    tune(source, tasks, ["lambda_orthogonal=1,2"], folder / "out", settings(objective="relative"))


def test_the_expert_of_a_task():
    experts = ["run/experts/german/full", "base+run/arithmetic/adapter"]
    (german, other) = (type("T", (), {"name": name})() for name in ("german", "french"))
    assert experts_of_task(german, experts) == experts[:1]
    assert experts_of_task(type("T", (), {"name": "arithmetic"})(), experts) == experts[1:]
    assert experts_of_task(other, experts) == experts


def test_the_figure_shows_every_parameter(experts, folder):
    from PIL import Image

    source = cases.merge_yaml(experts("llama"))
    for number, search in enumerate(
        (["lambda_orthogonal=auto,1,2"], ["lambda_orthogonal=auto,1,2", "trim=model,tensor"])
    ):
        tune(source, words(folder), search, folder / f"out{number}", QUIET)
    one, two = (Image.open(folder / f"out{n}" / "scores.png") for n in (0, 1))
    assert two.width > one.width > 300 and one.height > 300
    assert len(one.convert("L").getcolors()) > 5


def test_without_matplotlib_there_is_no_figure_and_that_is_said(experts, folder, monkeypatch):
    monkeypatch.setattr("neuron_methods.evaluation.tuning.study.can_plot", lambda: False)
    said = []
    tune(
        cases.merge_yaml(experts("llama")),
        words(folder),
        ["lambda_orthogonal=1,2"],
        folder / "out",
        QUIET,
        say=said.append,
    )
    assert said == ["scores.png will not be drawn: it needs matplotlib: pip install 'mergekit-neuron[report]'"]
    assert not (folder / "out" / "scores.png").exists() and (folder / "out" / "best.yml").exists()


@pytest.fixture
def no_work(monkeypatch):
    """Merging or loading fails the test."""

    def never(*arguments, **options):
        raise AssertionError("merged or loaded")

    monkeypatch.setattr("neuron_methods.evaluation.tuning.bench.merged_in_memory", never)
    monkeypatch.setattr("neuron_methods.evaluation.models.opened_model", never)


@pytest.mark.parametrize(
    ("search", "changes", "task", "message"),
    [
        (L2 + "=3:1:1", {}, {}, "an empty range"),
        ("lambda_ortho=1:3:1", {}, {}, "--search lambda_ortho: neuro_merging has no parameter 'lambda_ortho'"),
        (L2 + "=1:3", {}, {}, "a grid needs steps"),
        (L2 + "=1:3:1", {"budget": 2}, {}, "--budget 2: the grid has 3 points"),
        (L2 + "=1,2", {"strategy": "cma"}, {}, "cma needs a range"),
        (L2 + "=1,2", {"objective": "median"}, {}, "--objective 'median'"),
        (L2 + "=1,2", {}, {"data": FILE}, "task 'words': data: there is no validation_split.*--allow-same-split"),
        (L2 + "=1,2", {}, {"data": {"source": FILE, "split": "[:9]", "validation_split": "[8:]"}}, "share rows"),
        (L2 + "=1,2", {}, {"columns": {"text": "pormpt"}}, "there is no column 'pormpt'"),
        (L2 + "=1,2", {"test": True}, {"data": {"source": FILE, "split": "[90:]", "validation_split": "[:9]"}}, "noth"),
        (L2 + "=1,2", {}, {"kind": "text-to-text", "columns": {}}, "kind text-to-text needs"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_merged(experts, folder, no_work, search, changes, task, message):
    with pytest.raises(UserError, match=message) as caught:
        tune(cases.merge_yaml(experts("llama")), words(folder, **task), [search], folder / "out", settings(**changes))
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists()


def test_one_split_for_both_if_told(experts, folder):
    source, tasks = cases.merge_yaml(experts("llama")), words(folder, data="questions.jsonl")
    result = tune(source, tasks, ["lambda_orthogonal=1,2"], folder / "out", settings(allow_same_split=True, test=True))
    assert result.test.tasks[0].score == pytest.approx(result.scores["words"], rel=1e-6)


def test_the_command(experts, folder):
    (folder / "merge.yml").write_text(cases.merge_yaml(experts("llama")))
    tasks = cases.write_tasks(folder, cases.perplexity_task(), cases.choice_task())
    command = ["tune", "merge.yml", "--task", str(tasks), "--search", "lambda_orthogonal=0:3:0.5", "-o", "out", "-q"]
    done = CliRunner().invoke(main, [*command, "--test", "--limit", "8"])
    assert done.exit_code == 0, done.output
    best = yaml.safe_load((folder / "out" / "best.yml").read_text())
    assert f"best: lambda_orthogonal={best['parameters']['lambda_orthogonal']:g}" in done.stdout
    assert "7 points tried: 7 recombined in memory, 0 merged; 4 merges in" in done.stdout
    assert "one merge per point would have been 4 merges more" in done.stdout
    assert "test data, scored once:" in done.stdout
    written = json.loads((folder / "out" / "tune.json").read_text())
    assert written["best"]["point"] == best["parameters"]
    assert [task["count"] for task in written["test"]["tasks"]] == [8, 8]
    missing = CliRunner().invoke(main, ["tune", "none.yml", *command[2:]])
    message = "error: none.yml: cannot be read (No such file or directory); check the path\n"
    assert (missing.exit_code, missing.stderr) == (1, message)


def test_the_method_itself_is_searched(experts, folder, merges):
    source = cases.merge_yaml(experts("llama"), method="task_arithmetic", weight=1.0)
    result = tune(
        source, words(folder), ["merge_method=task_arithmetic,linear", "dtype=float32,bfloat16"], folder / "out", QUIET
    )
    assert {(m["merge_method"], m["dtype"]) for m in merges} == {
        (method, dtype) for method in ("task_arithmetic", "linear") for dtype in ("float32", "bfloat16")
    }
    best = yaml.safe_load((folder / "out/best.yml").read_text())
    assert {key: best[key] for key in result.best} == result.best
    with pytest.raises(UserError, match=r"--search merge_method: .*'tise'"):
        tune(source, words(folder), ["merge_method=ties,tise"], folder / "other", QUIET)


@pytest.fixture
def solves(monkeypatch):
    """How many systems were decomposed for all ridges, and solved for one."""
    counts = {"decomposed": 0, "solved": 0}
    for name, function in (("decomposed", response.decompose_responses), ("solved", response.merge_responses)):

        def counted(*given, name=name, function=function):
            counts[name] += 1
            return function(*given)

        monkeypatch.setattr(neuron_response, function.__name__, counted)
    return counts


def matrices_of(folder):
    """How many matrices `neuron_response` merges by response in a tiny model."""
    stored = load_file(folder / "base" / "model.safetensors")
    return sum(tensor.ndim == 2 and "embed_tokens" not in name for name, tensor in stored.items())


def test_a_search_over_ridge_decomposes_every_matrix_once(experts, folder, merges, solves):
    place, tasks = experts("llama"), words(folder)
    source = cases.merge_yaml(place, "neuron_response", dtype="float32")
    said = []
    search = ["ridge=0.01,0.1,auto,2", "toward=mean,zero"]
    result = tune(source, tasks, search, folder / "out", QUIET, say=said.append)
    count = matrices_of(place)
    assert solves == {"decomposed": 2 * count, "solved": 0}
    assert (len(merges), result.effort.points) == (8, 8)
    assert [m["parameters"]["toward"] for m in merges] == ["mean"] * 4 + ["zero"] * 4
    assert [line.partition(", ")[0] for line in said] == [f"ridge: {count} matrices decomposed once for all values"] * 2
    for trial in result.trials[::3]:
        again = cases.merge_yaml(place, "neuron_response", dtype="float32", **trial.point)
        merging.merge_to_directory(again, folder / "real", progress=False, force=True)
        scored = evaluate(str(folder / "real"), tasks, split="validation", progress=False).tasks[0].score
        assert trial.scores["words"] == pytest.approx(scored, rel=1e-5)
    assert solves["solved"] == 3 * count


def test_lambda_and_ridge_are_searched_together(experts, folder, merges, solves):
    place = experts("llama")
    source = cases.merge_yaml(place, "neuron_response", dtype="float32")
    result = tune(source, words(folder), ["ridge=0.01,0.1", "lambda=0.5:2:0.25"], folder / "out", QUIET)
    # Three merges for each ridge's parts; the best point is merged for real.
    assert (len(merges), result.effort.recombined) == (7, 14)
    assert solves == {"decomposed": matrices_of(place), "solved": matrices_of(place)}
    assert result.difference is None or result.difference <= 1e-5


def test_without_room_for_decompositions_every_merge_is_solved_and_that_is_said(experts, folder, solves, monkeypatch):
    monkeypatch.setattr("neuron_methods.evaluation.tuning.bench.free_memory", lambda: 20_000)
    place = experts("llama")
    said = []
    search = ["ridge=0.01,0.1,1"]
    tune(cases.merge_yaml(place, "neuron_response"), words(folder), search, folder / "out", QUIET, say=said.append)
    (line,) = said
    kept, without = solves["decomposed"], matrices_of(place) - solves["decomposed"]
    assert kept and without and solves["solved"] == 3 * without
    assert line.startswith(f"ridge: {kept} matrices decomposed once for all values, ")
    assert line.endswith(f"no room for {without} more, which are solved anew")
    assert 0 < float(line.split(" kB kept")[0].rpartition(" ")[2]) <= 10


def test_two_ridges_are_merged_like_any_other_parameter(experts, folder, solves):
    place = experts("llama")
    source = cases.merge_yaml(place, "neuron_response")
    tune(source, words(folder), ["ridge=0.01,0.1"], folder / "out", QUIET)
    assert solves == {"decomposed": 0, "solved": 2 * matrices_of(place)}


@pytest.mark.parametrize("command", ["tune", "compare"])
def test_heads_of_different_sizes_are_left_to_one_model(experts, folder, command):
    shutil.copytree(experts("vit"), "models")
    labels = dict(enumerate([*tiny.LABELS, "house"]))
    config = transformers.ViTConfig.from_pretrained("models/expert-b", id2label=labels, label2id={})
    transformers.ViTForImageClassification(config).save_pretrained("models/expert-b")
    (folder / "merge.yml").write_text(cases.merge_yaml(folder / "models", "task_arithmetic", weight=1.0))
    tiny.write_images(folder / "images", 1)
    data = {"source": "images", "split": "train", "validation_split": "train"}
    tasks = cases.write_tasks(folder, {"name": "a", "kind": "image-classification", "data": data})
    search = {
        "tune": ["--search", "lambda=0.5,1,2"],
        "compare": ["--no-defaults", "--method", "ties:density=0.5;lambda=1,2;weight=1"],
    }
    arguments = [
        command,
        "merge.yml",
        "--task",
        str(tasks),
        "-o",
        "out",
        "--quiet",
        "--allow-same-split",
        *search[command],
    ]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1 and "say what becomes of them: --head base" in refused.output

    done = CliRunner().invoke(main, [*arguments, "--head", "base"])
    assert done.exit_code == 0, done.output
    best = (folder / "out/best.yml").read_text()
    assert "# mergekit-neuron merge --head base\n" in best
    merging.merge_to_directory(best, "merged", progress=False)
    assert load_file("merged/model.safetensors")["classifier.weight"].equal(
        load_file("models/base/model.safetensors")["classifier.weight"].bfloat16()
    )
