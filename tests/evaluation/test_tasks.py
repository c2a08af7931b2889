"""Files of tasks: what they may say, and one clear error for what they may not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from neuron_methods.evaluation import load_tasks, read_examples
from neuron_methods.evaluation.task_file import choose_tasks
from neuron_methods.evaluation.tasks import Rows
from neuron_methods.support.errors import UserError
from tests.evaluation import cases
from tests.support import tiny


@pytest.fixture
def folder(tmp_path):
    cases.questions(tmp_path)
    return tmp_path


def test_defaults_come_from_the_kind(folder):
    (task,) = cases.tasks_of(folder, {"name": "a", "kind": "generation", "data": "questions.jsonl"})
    assert (task.metric, task.limit, task.columns) == ("exact_match", 0, {"input": "input", "target": "target"})
    assert task.test == Rows(str(folder / "questions.jsonl"), True)
    assert task.validation is None


def test_sources_are_relative_to_the_file(folder, monkeypatch):
    monkeypatch.chdir("/")
    (task,) = cases.tasks_of(folder, cases.choice_task())
    assert len(read_examples(task, "test")) == 12
    assert [s.row for s in read_examples(task, "validation").samples] == list(range(12, 30))


def test_a_directory_with_splits(tmp_path):
    for name, count in (("train", 5), ("validation", 3), ("test", 4)):
        (tmp_path / "data").mkdir(exist_ok=True)
        cases.questions(tmp_path, cases.QUESTIONS[:count]).rename(tmp_path / "data" / f"{name}.jsonl")
    data = {"source": "data", "split": "test", "validation_split": "train[1:3]"}
    (task,) = cases.tasks_of(tmp_path, cases.choice_task(data=data))
    assert len(read_examples(task, "test")) == 4
    assert [sample.row for sample in read_examples(task, "validation").samples] == [1, 2]


def test_a_limit_draws_by_the_seed_in_the_order_of_rows(folder):
    (task,) = cases.tasks_of(folder, cases.choice_task(limit=5, data="questions.jsonl"))
    drawn = [[s.row for s in read_examples(task, "test", seed).samples] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] == sorted(drawn[0])
    assert drawn[0] != drawn[2]
    assert drawn[0] != list(range(5)) and len(drawn[0]) == 5
    assert len(read_examples(task, "test", limit=3)) == 3
    assert len(read_examples(task, "test", limit=9)) == 5


def test_a_limit_draws_from_all_of_a_folder_of_images(tmp_path, monkeypatch):
    """Its rows come label after label, and the first ones are of one label alone."""
    monkeypatch.setattr("neuron_methods.data.sources.SHUFFLE_BUFFER", 4)
    tiny.write_images(tmp_path / "images", 10)
    task = {"name": "a", "kind": "image-classification", "data": {"source": "images", "split": "train"}, "limit": 12}
    (loaded,) = cases.tasks_of(tmp_path, task)
    examples = read_examples(loaded)
    assert {examples.value(i, "label") for i in range(12)} == {0, 1, 2}


def test_rows_with_an_empty_question_are_left_out_and_counted(tmp_path):
    rows = [{"prompt": p, "answer": a} for p, a in (("one", "1"), (" ", "2"), ("two", None), ("three", ""))]
    cases.questions(tmp_path, rows)
    columns = {"input": "prompt", "target": "answer"}
    given = {"name": "a", "kind": "generation", "data": "questions.jsonl", "columns": columns}
    examples = read_examples(cases.tasks_of(tmp_path, given)[0])
    assert [sample.row for sample in examples.samples] == [0, 3]
    assert examples.skipped == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kind": "generatoin"},
            "tasks.yml, line 3: task 'choices': unknown kind 'generatoin'; did you mean 'generation'",
        ),
        ({"kind": None}, "unknown kind None"),
        ({"metric": "acuracy"}, "unknown metric 'acuracy'; did you mean 'accuracy'"),
        ({"metric": "token_f1"}, "unknown metric 'token_f1'.*for kind multiple-choice"),
        ({"colums": {}}, "unknown key 'colums'; did you mean 'columns'"),
        ({"stop": "x"}, "unknown key 'stop'"),
        ({"columns": {"question": "prompt"}}, "columns: unknown key 'question'"),
        ({"columns": ["prompt"]}, "columns: expected a column for each of input, choices, label"),
        ({"name": ""}, "expected a name"),
        ({"limit": -1}, "limit: expected a whole number from 0"),
        ({"limit": True}, "limit: expected a whole number"),
        ({"batch_size": 0}, "batch_size: expected a whole number from 1"),
        ({"normalize": "characters"}, "normalize: expected none or tokens, found 'characters'"),
        ({"separator": 3}, "separator: expected text, found 3"),
        ({"max_length": 1}, "max_length: expected a whole number from 2"),
        ({"data": None}, "data: expected .*source"),
        ({"data": {"split": "test"}}, "data: expected .*source"),
        ({"data": {"source": "questions.jsonl", "splt": "a"}}, "data: unknown key 'splt'; did you mean 'split'"),
        ({"data": {"source": "questions.jsonl", "split": 3}}, "data: split: expected text"),
        ({"data": "none.jsonl"}, "data: source: there is no file or folder 'none.jsonl'"),
        ({"data": "a/b/c"}, "data: source: there is no file or folder 'a/b/c'"),
        ({"data": {"source": "questions.jsonl", "split": "test"}}, "is a file, which has no split 'test'"),
        ({"data": {"source": "questions.jsonl", "split": "[5:5]"}}, "'.5:5.' holds no rows"),
        ({"data": {"source": "questions.jsonl", "split": "[:50%]"}}, "expected a name or a name with rows"),
        ({"data": {"source": "questions.jsonl", "name": "x"}}, "only data sets of the hub have configurations"),
    ],
)
def test_mistakes_in_a_task(folder, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        cases.tasks_of(folder, cases.choice_task(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "generation", "max_new_tokens": 0}, "max_new_tokens: expected a whole number from 1"),
        ({"kind": "generation", "stop": ""}, "stop: expected the text that ends an answer"),
        ({"kind": "image-classification", "labels": []}, "labels: expected a list of different labels"),
        ({"kind": "image-classification", "labels": [1, 1]}, "labels: expected a list of different labels"),
        ({"kind": "zero-shot-image-classification", "labels": [1]}, "labels: expected a list of different labels"),
        ({"kind": "zero-shot-image-classification", "prompts": ["a photo"]}, "prompts: expected a list of texts with"),
        ({"kind": "lm-eval", "task": "x"}, "data: kind lm-eval brings its own"),
    ],
)
def test_mistakes_in_settings(folder, task, message):
    with pytest.raises(UserError, match=message):
        cases.tasks_of(folder, {"name": "a", "data": "questions.jsonl", **task})


def test_paths_of_the_harness_are_relative_to_the_file(folder, monkeypatch):
    monkeypatch.chdir("/")
    (task,) = cases.tasks_of(folder, {"name": "a", "kind": "lm-eval", "task": "x", "include_path": "."})
    assert task.settings["include_path"] == str(folder)
    with pytest.raises(UserError, match="include_path: there is no file or folder 'no'"):
        cases.tasks_of(folder, {"name": "a", "kind": "lm-eval", "task": "x", "include_path": "no"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the key tasks"),
        ("tasks: []", "expected the key tasks with a list"),
        ("tasks: [3]", "task 1: expected keys"),
        ("task:\n- a", "expected the key tasks"),
        ("tasks:\n- {name: a\n", "line .*: not readable as YAML"),
        ("taks: 1\ntasks: [{name: a}]", "line 1: unknown key 'taks'; did you mean 'tasks'"),
        ("tasks:\n- name: a\n  limit: 3\n  limit: 4\n", "line 4, column 3: key 'limit' appears twice"),
        ("tasks:\n- name: a\ntasks:\n- name: b\n", "line 3, column 1: key 'tasks' appears twice"),
        ("tasks:\n- name: a\n  data: {source: x, source: y}\n", "line 3, .*: key 'source' appears twice"),
    ],
)
def test_files_that_are_none(tmp_path, text, message):
    (tmp_path / "tasks.yml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_tasks(tmp_path / "tasks.yml")


def test_a_mistake_is_told_with_its_line(folder):
    """In a file of many tasks a name alone is found slowly, and a task without one not at all."""
    path = cases.write_tasks(folder, cases.choice_task(), cases.perplexity_task(limit=-1))
    line = path.read_text().splitlines().index("  limit: -1") + 1
    with pytest.raises(UserError, match=f"tasks.yml, line {line}: task 'words': limit: expected a whole number"):
        load_tasks(path)
    path = cases.write_tasks(folder, cases.choice_task(data={"source": "questions.jsonl", "splt": "test"}))
    line = path.read_text().splitlines().index("    splt: test") + 1
    with pytest.raises(UserError, match=f"tasks.yml, line {line}: task 'choices': data: unknown key 'splt'"):
        load_tasks(path)


def test_a_file_that_is_not_there_and_a_name_taken_twice(folder):
    with pytest.raises(UserError, match=r"none.yml: cannot be read \(No such file"):
        load_tasks(folder / "none.yml")
    with pytest.raises(UserError, match=r"line \d+: task 'choices': another task has the same name"):
        cases.tasks_of(folder, cases.choice_task(), cases.choice_task())


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "it is empty"), ([{"text": "a"}], "there is no column 'prompt'.*there are: text")],
)
def test_data_that_does_not_fit(tmp_path, rows, message):
    cases.questions(tmp_path, rows)
    (task,) = cases.tasks_of(tmp_path, cases.choice_task())
    with pytest.raises(UserError, match=rf"task 'choices' \(questions.jsonl.*{message}"):
        read_examples(task)


def test_a_range_behind_the_last_row(folder):
    (task,) = cases.tasks_of(folder, cases.choice_task(data={"source": "questions.jsonl", "split": "[100:]"}))
    with pytest.raises(UserError, match=r"nothing to score in split '.100:.'"):
        read_examples(task)


def test_a_split_that_is_not_there(tmp_path):
    (tmp_path / "data").mkdir()
    cases.questions(tmp_path / "data").rename(tmp_path / "data" / "train.jsonl")
    (task,) = cases.tasks_of(tmp_path, cases.choice_task(data={"source": "data", "split": "test"}))
    with pytest.raises(UserError, match=r"task 'choices' .*test"):
        read_examples(task)
    with pytest.raises(UserError, match="there is no validation_split"):
        read_examples(task, "validation")


def test_hub_data_sets():
    rows = Rows("openai/gsm8k", False, "main", "test")
    assert not rows.overlaps(replace(rows, split="train"))
    assert rows.overlaps(replace(rows, start=5))


def test_overlap_of_rows(tmp_path):
    (tmp_path / "data").mkdir()
    path = tiny.write_jsonl(tmp_path / "data" / "test.jsonl", cases.QUESTIONS)
    whole = Rows(str(path), True)
    assert not replace(whole, stop=10).overlaps(replace(whole, start=10))
    assert replace(whole, stop=11).overlaps(replace(whole, start=10))
    assert Rows(str(tmp_path / "data"), True, None, "test").overlaps(whole)
    assert not Rows(str(tmp_path / "data"), True, None, "train").overlaps(whole)
    assert Rows(str(tmp_path / "data" / ".." / "data"), True, None, "a").overlaps(
        Rows(str(tmp_path / "data"), True, None, "a")
    )


def test_a_choice_of_tasks(folder):
    tasks = cases.tasks_of(folder, cases.choice_task(), cases.perplexity_task())
    assert [task.name for task in choose_tasks(tasks, ["words"])] == ["words"]
    assert {task.batch_size for task in choose_tasks(tasks, batch_size=3)} == {3}
    with pytest.raises(UserError, match="--only: unknown task 'wrds'; did you mean 'words'"):
        choose_tasks(tasks, ["wrds"])
