"""Whole evaluations: what is refused before a model is loaded, what is written, one process and two."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model

from neuron_methods.cli import main
from neuron_methods.evaluation import evaluate, evaluate_model, open_model, read_examples, start_task
from neuron_methods.evaluation.score_files import table
from neuron_methods.support.errors import UserError
from tests.evaluation import cases
from tests.support import tiny
from tests.support.checkpoints import edit


@pytest.fixture
def folder(tmp_path, monkeypatch):
    cases.questions(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_loading(monkeypatch):
    """Loading a model fails the test."""

    def load(*arguments, **options):
        raise KeyboardInterrupt("the model was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", load)


def run(*arguments):
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def test_table_json_and_outcomes(model, folder):
    tasks = cases.write_tasks(folder, cases.choice_task(), cases.choice_task(name="again", normalize="tokens"))
    done = run(model("llama"), "--task", tasks, "-q", "-o", folder / "scores.json")
    assert done.exit_code == 0, done.output
    scores = json.loads((folder / "scores.json").read_text())
    assert (scores["format"], scores["version"], scores["model"]) == ("mergekit-neuron-evaluation", 1, "llama")
    first, second = scores["tasks"]
    assert (first["name"], first["kind"], first["metric"], first["count"]) == (
        "choices",
        "multiple-choice",
        "accuracy",
        12,
    )
    assert (first["source"], first["split"]) == ("questions.jsonl", "[:12]")
    assert first["low"] <= first["score"] <= first["high"]
    assert scores["mean"] == pytest.approx((first["score"] + second["score"]) / 2)
    lines = [json.loads(line) for line in (folder / scores["outcomes"]).read_text().splitlines()]
    assert [line["row"] for line in lines if line["task"] == "choices"] == list(range(12))
    assert sum(line["score"] for line in lines if line["task"] == "again") / 12 == pytest.approx(second["score"])
    assert {"prediction", "target"} <= lines[0].keys()
    rows = done.stdout.splitlines()
    assert rows[0].split() == ["task", "score", "95", "%", "interval", "examples", "metric", "split"]
    assert f"{100 * first['score']:.1f} %" in rows[1]
    assert rows[3].split()[0] == "mean"
    assert rows[4] == f"written: {folder / 'scores.json'}"


def test_the_file_is_named_after_the_model_and_not_replaced_unasked(model, folder):
    tasks = cases.write_tasks(folder, cases.choice_task())
    assert run(model("llama"), "--task", tasks, "-q", "--limit", 3).exit_code == 0
    assert json.loads((folder / "llama.scores.json").read_text())["tasks"][0]["count"] == 3
    again = run(model("llama"), "--task", tasks, "-q")
    assert again.exit_code == 1
    assert again.stderr == (
        "error: -o llama.scores.json: exists already; name another file, or give --force to replace it\n"
    )
    assert run(model("llama"), "--task", tasks, "-q", "--force", "--split", "validation").exit_code == 0
    assert json.loads((folder / "llama.scores.json").read_text())["tasks"][0]["split"] == "[12:]"


def test_no_mean_over_a_perplexity(model, folder):
    evaluation = evaluate(
        str(model("llama")), cases.tasks_of(folder, cases.choice_task(), cases.perplexity_task()), progress=False
    )
    assert evaluation.mean is None
    assert len(table(evaluation)) == 3


def test_base_and_adapter_and_an_adapter_by_itself(model, folder):
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(model("llama"))
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(model("llama"))
    adapted.save_pretrained(folder / "adapter")
    (task,) = cases.tasks_of(folder, cases.perplexity_task())
    in_memory = evaluate_model(adapted, tiny.build_tokenizer(), task).score
    by_both = evaluate(f"{model('llama')}+{folder / 'adapter'}", [task], progress=False)
    by_itself = evaluate(str(folder / "adapter"), [task], progress=False)
    plain = evaluate(str(model("llama")), [task], progress=False)
    assert by_both.model == "llama+adapter"
    assert by_both.tasks[0].score == by_itself.tasks[0].score == pytest.approx(in_memory, rel=1e-6)
    assert plain.tasks[0].score != pytest.approx(in_memory, rel=1e-3)


def test_a_running_task_follows_weights_that_change(model, folder):
    (task,) = cases.tasks_of(folder, cases.perplexity_task())
    with open_model(str(model("llama"))) as opened:
        running = start_task(opened.model, opened.processor, task)
        first = running.run().score
        weights = {name: tensor.clone() for name, tensor in opened.model.state_dict().items()}
        with torch.no_grad():
            for parameter in opened.model.parameters():
                parameter.mul_(1.5)
        assert running.run().score != pytest.approx(first, rel=1e-2)
        opened.model.load_state_dict(weights)
        assert running.run().score == first


def test_examples_are_read_once_for_several_models(model, folder, monkeypatch):
    (task,) = cases.tasks_of(folder, cases.choice_task())
    examples = read_examples(task)
    (folder / "questions.jsonl").unlink()
    with open_model(str(model("llama"))) as opened:
        assert evaluate_model(opened.model, opened.processor, task, examples=examples).count == 12


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("t5", {}, None),
        ("t5", {"kind": "perplexity", "columns": {}}, "model t5 is a T5ForConditionalGeneration, kind perplexity"),
        ("vit", {}, "model vit is a ViTForImageClassification, kind multiple-choice needs a causal or a text-to-text"),
        ("t5", {"kind": "generation", "columns": {}}, "needs a causal language model"),
        ("llama", {"kind": "text-to-text", "columns": {}}, "needs a text-to-text model such as T5"),
        ("llama", {"kind": "image-classification", "columns": {}}, "needs an image classifier with its head"),
        ("clip", {"kind": "image-classification", "columns": {}}, "is a CLIPModel.*needs an image classifier"),
        ("vit", {"kind": "zero-shot-image-classification", "columns": {}}, "needs a model of images and texts"),
        ("llama", {"kind": "text-classification", "columns": {}}, "needs a text classifier with its head"),
        ("vit", {"kind": "image-classification", "columns": {}, "labels": ["bird"]}, "no label 'bird' .it has cat"),
        ("vit", {"kind": "image-classification", "columns": {}, "labels": [3]}, "the model vit has no label 3"),
        ("llama", {"kind": "generation", "columns": {}, "max_new_tokens": 5000}, "model llama reads 2048 tokens"),
        ("llama", {"columns": {"input": "promt"}}, "there is no column 'promt' .there are: prompt"),
        ("llama", {"columns": {"input": "prompt", "label": "answer"}}, "column 'answer' of row 0 holds"),
    ],
)  # fmt: skip
def test_refused_before_the_model_is_loaded(model, folder, no_loading, kind, changes, message):
    (task,) = cases.tasks_of(folder, cases.choice_task(**changes))
    if message is None:
        with pytest.raises(KeyboardInterrupt, match="the model was loaded"):
            evaluate(str(model(kind)), [task])
        return
    with pytest.raises(UserError, match=f"task 'choices'.*{message}") as caught:
        evaluate(str(model(kind)), [task])
    assert "\n" not in str(caught.value)


def test_labels_in_the_data_that_the_model_lacks(model, folder, no_loading):
    tiny.write_images(folder / "images", 1)
    (folder / "images" / "cat").rename(folder / "images" / "bird")
    given = {"name": "a", "kind": "image-classification", "data": {"source": "images", "split": "train"}}
    with pytest.raises(
        UserError, match="task 'a': column 'label' of row 0 holds 0, needed is one of the model's 3 labels"
    ):
        evaluate(str(model("vit")), cases.tasks_of(folder, given))


def test_labels_in_the_data_that_the_task_leaves_out(model, folder, no_loading):
    tiny.write_images(folder / "images", 1)
    given = {"name": "a", "kind": "image-classification", "data": {"source": "images", "split": "train"}}
    with pytest.raises(UserError, match="needed is one of the task's labels"):
        evaluate(str(model("vit")), cases.tasks_of(folder, {**given, "labels": ["cat", "tree"]}))


def test_a_processor_that_is_missing(folder, no_loading):
    tiny.build_model("llama").save_pretrained(folder / "bare")
    with pytest.raises(UserError, match=r"model bare: .*tokenizer"):
        evaluate(str(folder / "bare"), cases.tasks_of(folder, cases.choice_task()))


def test_a_head_that_does_not_fit(folder):
    tiny.write_images(folder / "images", 1)
    given = {"name": "a", "kind": "image-classification", "data": {"source": "images", "split": "train"}}
    tasks = cases.tasks_of(folder, given)
    tiny.save_model("vit", folder / "vit")
    edit(folder / "vit", lambda tensors: tensors.update({"classifier.weight": torch.zeros(5, 16)}))
    with pytest.raises(UserError, match="model vit: cannot load it"):
        evaluate(str(folder / "vit"), tasks)
    edit(folder / "vit", lambda tensors: tensors.pop("classifier.weight"))
    with pytest.raises(
        UserError, match=r"model vit: its files lack weights of ViTForImageClassification.*classifier.weight"
    ):
        evaluate(str(folder / "vit"), tasks)


def test_where_stderr_is_no_terminal_each_task_begins_with_a_line(model, folder, capfd):
    tasks = cases.tasks_of(folder, cases.choice_task(batch_size=2), cases.perplexity_task(batch_size=2))
    path = str(model("llama"))
    capfd.readouterr()  # what saving the model has shown
    evaluate(path, tasks)
    shown = capfd.readouterr().err
    assert "\r" not in shown
    assert [line.split(",")[0] for line in shown.splitlines() if " of 12 " in line] == [
        "choices: 0 of 12 examples",
        "words: 0 of 12 examples",
    ]
    evaluate(path, tasks, progress=False)
    assert capfd.readouterr().err == ""


def test_models_that_are_none(folder):
    tasks = cases.tasks_of(folder, cases.choice_task())
    with pytest.raises(UserError, match="model no/such/model: cannot read its config"):
        evaluate("no/such/model", tasks)
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"model empty: the directory holds no config.json"):
        evaluate(str(folder / "empty"), tasks)


def test_the_harness_is_an_extra(model, folder, no_loading, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (task,) = cases.tasks_of(folder, {"name": "a", "kind": "lm-eval", "task": "hellaswag"})
    with pytest.raises(
        UserError, match=r"kind lm-eval needs the package lm_eval: pip install 'mergekit-neuron\[lm-eval\]'"
    ):
        evaluate(str(model("llama")), [task])
    with pytest.raises(UserError, match="task: expected the name of a task"):
        cases.tasks_of(folder, {"name": "a", "kind": "lm-eval"})


@pytest.mark.parametrize("place", ["scores.txt", "none/scores.json", "."])
def test_places_to_write_that_are_none(model, folder, no_loading, place):
    tasks = cases.write_tasks(folder, cases.choice_task())
    done = run(model("llama"), "--task", tasks, "-o", place)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: -o {place}: ")


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_routed_model(folder, kind):
    from neuron_methods.routing import NeuronRoutedModel
    from neuron_methods.routing.build import build_routed_model
    from tests.support import routed as routing

    made = folder / "made"
    made.mkdir()
    routing.make_workspace(kind, made)
    (made / "route.yml").write_text(yaml.safe_dump(routing.settings(kind)))
    build_routed_model(made / "route.yml", made / "routed")
    routed = NeuronRoutedModel.from_pretrained(made / "routed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "base")

    def encoded(text):
        return tokenizer(text, return_tensors="pt", return_token_type_ids=False)

    answers, choices = cases.tasks_of(
        folder,
        {
            "name": "g",
            "kind": "generation" if kind == "llama" else "text-to-text",
            "data": {"source": "questions.jsonl", "split": "[:6]"},
            "columns": {"input": "prompt", "target": "answer"},
            "max_new_tokens": 3,
        },
        cases.choice_task(),
    )
    with open_model(str(made / "routed")) as opened:
        assert type(opened.model) is NeuronRoutedModel
    evaluation = evaluate(str(made / "routed"), [answers, choices], progress=False)
    assert evaluation.model == "routed"
    assert [task.count for task in evaluation.tasks] == [6, 12]
    for outcome in evaluation.tasks[0].outcomes:
        given = encoded(cases.QUESTIONS[outcome.row]["prompt"])
        said = routed.generate(**given, max_new_tokens=3, do_sample=False)[0]
        said = said[given["input_ids"].shape[1] :] if kind == "llama" else said
        assert outcome.prediction == tokenizer.decode(said, skip_special_tokens=True).strip()
    for outcome in evaluation.tasks[1].outcomes:
        question = cases.QUESTIONS[outcome.row]
        routing_of_prompt = routed.route(**encoded(question["prompt"]))
        values = []
        for choice in question["choices"]:
            if kind == "t5":
                labels = tokenizer(choice, return_tensors="pt")["input_ids"]
                loss = routed(**encoded(question["prompt"]), labels=labels).loss
                values.append(-float(loss) * labels.numel())
                continue
            whole = encoded(question["prompt"] + " " + choice)
            start = encoded(question["prompt"])["input_ids"].shape[1]
            logs = routed(**whole, routing=routing_of_prompt).logits[0].log_softmax(-1)
            ids = whole["input_ids"][0]
            values.append(sum(float(logs[i - 1, ids[i]]) for i in range(start, len(ids))))
        assert outcome.prediction == question["choices"][max(range(3), key=values.__getitem__)]


def test_two_processes_score_what_one_does(model, folder):
    tasks = cases.write_tasks(
        folder, cases.choice_task(batch_size=3, data="questions.jsonl"), cases.perplexity_task(data="questions.jsonl")
    )
    alone = evaluate(str(model("llama")), cases.load_tasks(tasks), progress=False)
    # Without --multi_gpu accelerate 1.15 leaves several processes on a CPU to mpirun, and starts one itself.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["-m", "neuron_methods", "evaluate", str(model("llama")), "--task", str(tasks), "-o", "two.json", "-q"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: two.json") == 1
    together = json.loads((folder / "two.json").read_text())
    assert together["processes"] == 2
    assert [task["count"] for task in together["tasks"]] == [30, 30]
    for one, two in zip(alone.tasks, together["tasks"], strict=True):
        assert two["score"] == pytest.approx(one.score, rel=1e-5)
    lines = [json.loads(line) for line in (folder / "two.examples.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [*range(30), *range(30)]
