"""`mergekit-neuron route` and `generate` as installed, and what they wrote used from Python in another process."""

import json

import yaml

from tests.support.commands import run
from tests.support.routed import HEADS, make_headed_workspace, make_workspace, settings

SCRIPT = """
from neuron_methods import NeuronRoutedModel
from transformers import AutoTokenizer

model = NeuronRoutedModel.from_pretrained("routed")
tokenizer = AutoTokenizer.from_pretrained("routed")
inputs = tokenizer(["one two two", "red blue blue", "cat dog cat"], return_tensors="pt")
output, routing = model.generate(
    inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=3, return_routing=True
)
for sample in range(3):
    print(routing.describe(sample))
model.as_static({"numbers": 0.5, "colours": 0.5}).save_pretrained("plain")
"""


def test_from_adapters_to_answers_with_no_data_left(tmp_path):
    folder = make_workspace("llama", tmp_path)
    (folder / "routed.yaml").write_text(yaml.safe_dump(settings("llama")))
    done = run("mergekit-neuron", "route", "routed.yaml", "routed", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "complete and verified: routed" in done.stdout and "enhanced, density" in done.stdout
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    for path in (folder / "data").iterdir():
        path.unlink()

    done = run(
        "mergekit-neuron", "generate", "routed", "--prompt", "dog cat", "--json", "--max-new-tokens", 3, folder=folder
    )
    assert done.returncode == 0, done.stderr
    assert next(iter(json.loads(done.stdout)["experts"])) == "animals"

    (folder / "script.py").write_text(SCRIPT)
    done = run(folder / "script.py", folder=folder)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["numbers", "colours", "animals"]
    assert (folder / "plain" / "model.safetensors").is_file()


def test_four_heads_of_different_sizes_are_routed_and_scored_each_on_its_task(tmp_path):
    folder = make_headed_workspace(tmp_path, headless=True)
    tasks = [
        {"name": name, "kind": "image-classification", "data": {"source": f"data/{name}", "split": "train"}}
        for name in HEADS
    ]
    (folder / "tasks.yml").write_text(yaml.safe_dump({"tasks": tasks}))
    done = run("mergekit-neuron", "route", "routed.yaml", "routed", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "complete and verified: routed" in done.stdout and "Traceback" not in done.stderr
    done = run("mergekit-neuron", "evaluate", "routed", "--task", "tasks.yml", "-o", "scores.json", folder=folder)
    assert done.returncode == 0, done.stderr
    scores = json.loads((folder / "scores.json").read_text())["tasks"]
    assert [task["name"] for task in scores] == [*HEADS] and all(0 <= task["score"] <= 1 for task in scores)
    predictions = [json.loads(line) for line in (folder / "scores.examples.jsonl").read_text().splitlines()]
    for name, labels in HEADS.items():
        assert {line["prediction"] for line in predictions if line["task"] == name} <= {*labels}
