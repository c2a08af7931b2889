"""`mergekit-neuron help`, and the errors that point to it."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import neuron_methods
from neuron_methods.cli import SUBCOMMANDS, main
from neuron_methods.sharing.topics import find_topic, topics
from neuron_methods.support.errors import UserError, explained_by
from tests.support import tiny

PACKAGE = Path(neuron_methods.__file__).parent


def run(*args):
    return CliRunner().invoke(main, list(map(str, args)))


def test_every_topic_that_an_error_points_to_is_a_section():
    used = {
        topic
        for path in PACKAGE.rglob("*.py")
        for topic in re.findall(r'explained_by\("(.*?)"\)', path.read_text("utf-8"))
    }
    assert len(used) >= 8
    for topic in used:
        assert topic not in SUBCOMMANDS, "help of the command would be shown"
        assert len(find_topic(topic).text.splitlines()) > 2


def test_the_innermost_topic_is_told():
    with pytest.raises(UserError) as caught, explained_by("heads"), explained_by("models"):
        raise UserError("no")
    assert caught.value.topic == "models" and UserError("no").topic is None


def test_topics_are_listed_and_shown():
    listed = run("help").stdout
    assert all(topic.name in listed for topic in topics()) and "models-that-go-together" in listed
    shown = run("help", "adapters").stdout
    assert shown.startswith("## Adapters\n") and "merge_and_unload" in shown and "## Heads" not in shown
    shown = run("help", "parameters").stdout
    assert "### `min_merging`" in shown and "(https://arxiv.org/" in shown and "](" not in shown
    assert run("help", "merge").stdout == CliRunner().invoke(main, ["merge", "--help"]).stdout
    completed = CliRunner().invoke(
        main,
        env={"COMP_WORDS": "x help ad", "COMP_CWORD": "2", "_X_COMPLETE": "bash_complete"},
        prog_name="x",
        complete_var="_X_COMPLETE",
    )
    assert completed.stdout.split() == ["plain,adapters"]


def test_what_is_no_topic_is_one_line():
    told = run("help", "adaptors")
    assert (told.exit_code, told.stdout) == (1, "")
    assert told.stderr == "error: no topic adaptors; did you mean 'adapters'? (`mergekit-neuron help` lists all)\n"
    assert "there are several: " in run("help", "model").stderr


def config(folder, base, *models):
    path = folder / "merge.yml"
    entries = [{"model": str(model)} for model in models]
    path.write_text(json.dumps({"merge_method": "neuro_merging", "base_model": str(base), "models": entries}))
    return path


def merged(folder, base, *models):
    return run("merge", config(folder, base, *models), folder / "out", "--dry-run")


@pytest.fixture
def model(tmp_path):
    tiny.save_model("llama", tmp_path / "model")
    return tmp_path / "model"


def no_base(folder, model):
    return merged(folder, folder / "nothing", model)


def quantised(folder, model):
    tiny.save_model("llama", folder / "less")
    path = folder / "less" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    return merged(folder, model, folder / "less")


def other_architecture(folder, model):
    tiny.save_model("t5", folder / "other")
    return merged(folder, model, folder / "other")


def no_adapter(folder, model):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return merged(folder, model, f"{model}+{folder / 'adapter'}")


def no_profile(folder, model):
    (folder / "x.safetensors").write_text("no")
    return run("groups", folder / "x.safetensors", "-o", folder / "groups.json")


def no_tasks(folder, model):
    (folder / "tasks.yml").write_text("tasks: [{name: a, kind: generatoin}]")
    return run("evaluate", model, "--task", folder / "tasks.yml")


def no_template(folder, model):
    tiny.write_jsonl(folder / "rows.jsonl", [{"a": "red", "b": "cat"}])
    task = {"name": "a", "kind": "generation", "data": {"source": "rows.jsonl"}, "chat": True}
    tasks = [task | {"columns": {"input": "a", "target": "b"}}]
    (folder / "tasks.yml").write_text(json.dumps({"tasks": tasks}))
    return run("evaluate", model, "--task", folder / "tasks.yml")


def no_repository(folder, model):
    return run("push", model, "not an id")


@pytest.mark.parametrize(
    ("mistake", "topic"),
    [
        (no_base, "models"),
        (quantised, "models"),
        (other_architecture, "models"),
        (no_adapter, "adapters"),
        (no_profile, "neuron_merge"),
        (no_tasks, "tasks"),
        (no_template, "chat"),
        (no_repository, "upload"),
    ],
)
def test_common_mistakes_point_to_what_explains_them(tmp_path, model, mistake, topic):
    told = mistake(tmp_path, model)
    last = told.stderr.splitlines()[-1]
    assert told.exit_code == 1 and last.startswith("error: ")
    assert last.endswith(f" (see: mergekit-neuron help {topic})"), last
