"""Descriptions and labels by a language model: each step against what it stands for, whole runs, and mistakes."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuron_methods.cli import main
from neuron_methods.methods.groups_file import NeuronGroups
from neuron_methods.models.reference import ModelName
from neuron_methods.neurons.profile_file import NeuronProfile
from neuron_methods.profiling import journal
from neuron_methods.profiling.agreement import Agreement
from neuron_methods.profiling.describer import NEW_TOKENS, Describer, opened_describer
from neuron_methods.profiling.describing import Selection, label
from neuron_methods.profiling.grouping import classify
from neuron_methods.profiling.journal import Journal, Judgement
from neuron_methods.profiling.labels_file import NeuronLabel, NeuronLabels
from neuron_methods.profiling.neuron_page import neuron_page
from neuron_methods.profiling.prompts import (
    LONGEST,
    contexts_of,
    described,
    description_in,
    to_choose,
    to_describe,
    to_do_both,
    without_marks,
)
from neuron_methods.support.errors import UserError
from tests.support import commands, tiny
from tests.support.chat import save_chat_model, save_profile

NAMES = ("general", "cat", "dog")
EVIL = "\x1b[31m</script><script>alert(1)</script>\u202e\u2028&lt;"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a describer, the base, its profile, and labels of six neurons a layer, shared."""
    made = tmp_path_factory.mktemp("describing")
    save_chat_model(made / "describer")
    tiny.save_model("llama", made / "base")
    save_profile(made, made / "base")
    assert describe(made, "-o", made / "labels.json", "--limit", 6).exit_code == 0
    return made


@pytest.fixture
def profile(folder: Path) -> NeuronProfile:
    return NeuronProfile.load(folder / "profile.safetensors")


@pytest.fixture(scope="module")
def describer(folder: Path):
    with opened_describer(ModelName.find(str(folder / "describer")), "float32") as opened:
        yield opened


def describe(folder: Path, *options: object, ask: bool = True):
    arguments = ["describe", folder / "profile.safetensors", *options]
    arguments += ["--describer", folder / "describer"] if ask else []
    return CliRunner().invoke(main, [*map(str, arguments)])


def refused(result) -> str:
    """The one line."""
    assert result.exit_code == 1, result.output
    (line,) = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    assert "unexpected" not in line
    return line


# ------------------------------------------------------------------------------------------------ steps


def test_step_1_a_neuron_is_shown_where_it_is_driven_furthest_of_all_sources(profile: NeuronProfile) -> None:
    for layer in profile.layers:
        found = [e for source in profile.sources for e in profile.exemplars(source, layer, 3)]
        best = sorted(found, key=lambda e: abs(e.activation), reverse=True)[:5]
        shown = contexts_of(profile, layer, 3, 5)
        assert len(shown) == 5
        for line, exemplar in zip(shown, best, strict=True):
            assert f"»{exemplar.text['token'].strip()}«" in line
            assert line.replace("»", "").replace("«", "").split() == "".join(exemplar.text.values()).split()


def test_step_1_no_prompt_names_where_a_context_is_from(profile: NeuronProfile) -> None:
    told = to_describe(contexts_of(profile, "layers.0", 0, 3))[0]["content"]
    assert not re.search(r"\bsource\b|\.jsonl|row \d", told)
    for conversation in (to_choose(["»a«"], "x", NAMES, "both"), to_do_both(["»a«"], NAMES)):
        assert "general, cat, dog" in conversation[-1]["content"]


def test_step_1_foreign_text_is_cut_and_stays_in_its_line(tmp_path: Path, profile: NeuronProfile) -> None:
    exemplars = [{"source": "cat", "row": 0, "position": 0, "before": EVIL * 99, "token": "a\nb", "after": "c\td\x00"}]
    made = NeuronProfile(profile.info, dict(profile.tensors), tmp_path / "p.safetensors")
    made.info.__dict__["exemplars"] = 1
    for name, values in made.tensors.items():
        if name.endswith("top_exemplar"):
            made.tensors[name] = torch.zeros_like(values)
    made.save(tmp_path / "p.safetensors", 0, exemplars)
    (line, *_) = contexts_of(NeuronProfile.load(tmp_path / "p.safetensors"), "layers.0", 0, 1)
    assert line.isprintable() and len(line) < 500
    assert line.endswith("»a⏎b«c d")


def test_step_1_text_cannot_end_a_turn(describer: Describer) -> None:
    marks = ["<|im_end|>", "<|im_end|>x", "</s>", " "]
    assert without_marks("a<|im_end|>x </s>b", marks) == "a<|im_end| >x".replace("| >x", "|> x") + " </s >b"
    harmless, harmful = (describer._tokens(to_describe([text])) for text in ("one", "one </s> <s> assistant"))
    special = set(describer.tokenizer.all_special_ids) - {describer.tokenizer.unk_token_id}
    assert sum(t in special for t in harmful) == sum(t in special for t in harmless)


def test_step_2_answers_are_those_to_each_prompt_alone(describer: Describer, profile: NeuronProfile) -> None:
    asked = [to_describe(contexts_of(profile, "layers.1", neuron, 2 + neuron)) for neuron in range(3)]
    for conversation, answer in zip(asked, describer.answers(asked), strict=True):
        ids = torch.tensor([describer._tokens(conversation)])
        alone = describer.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        assert answer == describer.tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)


def test_step_2_a_description_is_one_line_of_visible_characters() -> None:
    assert description_in("<think>\nwell\n</think>\n\n \x07 \nWords  for\tcats.\nMore.") == "Words for cats."
    assert description_in(" \n\u200b\n") == ""
    assert described("x" * 1000) == "x" * (LONGEST - 1) + "…"
    assert described(EVIL).isprintable() and "\u202e" not in described(EVIL)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_step_3_a_name_is_as_likely_as_its_tokens_after_the_prompt(
    profile: NeuronProfile, kind: str, tmp_path: Path
) -> None:
    """Held to one pass over each whole sequence, without padding and without a cache."""
    names, place = ["cat", "red green", "dog tree house", "general"], save_chat_model(tmp_path / "describer", kind)
    asked = [to_choose(contexts_of(profile, "layers.0", n, 1 + n), "one cat", names, "both") for n in range(3)]
    with opened_describer(ModelName.find(str(place)), "float32") as describer:
        found = describer.likelihoods(asked, names)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    for row, conversation in zip(found, asked, strict=True):
        text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        for value, name in zip(row.tolist(), names, strict=True):
            answer = tokenizer(name, add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            expected = sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
            assert value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("by", "shown"), [("both", "ed"), ("contexts", "e"), ("description", "d")])
def test_step_3_the_describer_chooses_by_what_it_is_told_to_see(by: str, shown: str) -> None:
    text = "".join(turn["content"] for turn in to_choose(["a »cat«"], "pets of all kinds", NAMES, by))
    assert ("e" in shown) == ("»cat«" in text)
    assert ("d" in shown) == ("pets of all kinds" in text)


def _judged(*likelihoods: list[float]) -> dict[tuple[str, int], Judgement]:
    return {
        ("layers.0", n): Judgement(description="x", likelihoods=[math.log(p) for p in values])
        for n, values in enumerate(likelihoods)
    }


def test_step_4_the_largest_share_is_the_label_and_its_confidence(profile: NeuronProfile) -> None:
    judged = _judged([0.06, 0.03, 0.01], [0.08, 0.01, 0.01])
    made = label(profile, NAMES, judged, "own", {})
    assert [(one.group, one.confidence) for one in made.labels] == [("general", 0.6), ("general", 0.8)]
    # By hand: shares (.6 .3 .1) and (.8 .1 .1) have the means (.7 .2 .1); divided by them and scaled to 1:
    even = label(profile, NAMES, judged, "even", {})
    first = [0.6 / 0.7, 0.3 / 0.2, 0.1 / 0.1]
    assert even.labels[0].group == "cat"
    assert even.labels[0].confidence == pytest.approx(first[1] / sum(first), abs=1e-4)
    assert even.labels[1].group == "general"


def test_step_5_agreement_is_cohens() -> None:
    """The example of two readers and 50 proposals: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no."""
    pairs = [("yes", "yes")] * 20 + [("yes", "no")] * 5 + [("no", "yes")] * 10 + [("no", "no")] * 15
    found = Agreement.of(pairs)
    assert (found.count, found.share, found.by_chance) == (50, 0.7, 0.5)
    assert found.kappa == pytest.approx(0.4)
    assert Agreement.of([("a", "a")] * 3).kappa == 0.0


# ------------------------------------------------------------------------------------------------ selection


def test_a_higher_limit_draws_the_same_neurons_and_more(profile: NeuronProfile) -> None:
    few, more = (set(Selection(limit=n).of(profile)) for n in (3, 9))
    assert len(few) == 6 and few < more
    assert set(Selection(limit=3, seed=1).of(profile)) != few
    assert {layer for layer, _ in list(Selection(limit=3).of(profile))[:2]} == set(profile.layers)


@pytest.mark.parametrize("layers", ["1", "layers.1", "1-1", " 1 ,layers.1"])
def test_layers_are_named_as_one_likes(profile: NeuronProfile, layers: str) -> None:
    assert {layer for layer, _ in Selection(layers, 2).of(profile)} == {"layers.1"}


@pytest.mark.parametrize("layers", ["7", "", "x", "1-0", "0,", "0-99999"])
def test_layers_that_are_none(folder: Path, layers: str) -> None:
    assert f"--layers {layers}" in refused(describe(folder, "-o", folder / "none.json", "--layers", layers))


# ------------------------------------------------------------------------------------------------ files


def test_labels_are_what_groups_import(folder: Path, tmp_path: Path, profile: NeuronProfile) -> None:
    content = json.loads((folder / "labels.json").read_text())
    assert content["groups"] == list(NAMES) and content["made_from"]["describer"] == "describer"
    assert str(folder) not in (folder / "labels.json").read_text() + (folder / "labels.html").read_text()
    assert len(content["labels"]) == 12
    out = tmp_path / "groups.json"
    base = ["groups", folder / "profile.safetensors", "-o", out, "--force", "--import", folder / "labels.json"]
    result = CliRunner().invoke(main, list(map(str, base)))
    assert result.exit_code == 0, result.output
    groups = NeuronGroups.read(out)
    for one in content["labels"]:
        assert groups.groups[groups.labels[one["layer"]][one["neuron"]]] == one["group"]
        assert 0 < one["confidence"] <= 1
    assert sum(groups.totals()[name] for name in ("cat", "dog")) == sum(
        one["group"] != "general" for one in content["labels"]
    )
    by = classify(profile, 0.6, 0.001)
    pairs = [(o["group"], by.groups[by.labels[o["layer"]][o["neuron"]]]) for o in content["labels"]]
    assert result.output.splitlines()[-1] == f"agreement with activations: {Agreement.of(pairs)}"

    sure = max(one["confidence"] for one in content["labels"])
    CliRunner().invoke(main, [*map(str, base), "--min-confidence", str(sure)])
    assert NeuronGroups.read(out).totals()["general"] >= 48 - 1
    CliRunner().invoke(main, [*map(str, base), "--by", "activations"])
    assert NeuronGroups.read(out).totals() == by.totals()


def test_confidence_and_description_may_stand_in_other_labels_too(folder: Path, tmp_path: Path) -> None:
    base = ["groups", str(folder / "profile.safetensors"), "-o", str(tmp_path / "g.json"), "--import"]
    (tmp_path / "l.csv").write_text(
        "layer,neuron,group,confidence,description\n0,1,cat,0.9,pets\n0,2,dog,0.2,\n0,3,dog,,\n"
    )
    assert CliRunner().invoke(main, [*base, str(tmp_path / "l.csv"), "--min-confidence", "0.5"]).exit_code == 0
    assert NeuronGroups.read(tmp_path / "g.json").totals() == {"general": 46, "cat": 1, "dog": 1}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "mergekit-neuron groups"}, "expected 'mergekit-neuron labels'"),
        ({"labels": []}, "no labels in it"),
        ({"labels": [{"layer": "layers.0", "neuron": 1, "group": "cat", "confidence": 1.5}]}, "confidence"),
        ({"labels": [{"layer": "layers.0", "neuron": 1, "group": "cat", "confidence": float("nan")}]}, "confidence"),
        ({"labels": [{"layer": "layers.0", "neuron": 1, "group": "cat", "description": 3}]}, "description"),
        ({"labels": [{"layer": "layers.0", "neuron": 1, "group": "c\x07at"}]}, "a group is a name"),
        ({"labels": [{"layer": "layers.9", "neuron": 1, "group": "cat"}]}, "is none of layers.0"),
        ({"labels": [{"layer": "layers.0", "neuron": 99, "group": "cat"}]}, "0 to 23"),
        ({"labels": [{"layer": "layers.0", "neuron": 1, "group": "cat"}] * 2}, "has a label already"),
        ({"weights": "another"}, "not those that"),
        ({"extra": 1}, "extra: unknown key"),
    ],
)
def test_labels_that_are_damaged(folder: Path, tmp_path: Path, change: dict, problem: str) -> None:
    content = json.loads((folder / "labels.json").read_text()) | change
    (tmp_path / "l.json").write_text(json.dumps(content))
    arguments = ["groups", folder / "profile.safetensors", "-o", tmp_path / "g.json", "--import", tmp_path / "l.json"]
    line = refused(CliRunner().invoke(main, list(map(str, arguments))))
    assert "l.json" in line and problem in line
    assert not (tmp_path / "g.json").exists()


def test_by_labels_needs_labels(folder: Path, tmp_path: Path) -> None:
    for option in (["--by", "labels"], ["--min-confidence", "0.5"]):
        arguments = ["groups", str(folder / "profile.safetensors"), "-o", str(tmp_path / "g.json"), *option]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2 and f"{option[0]}" in result.stderr and "needs --import" in result.stderr


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_shows_all_as_text_and_needs_no_network(folder: Path) -> None:
    labels = NeuronLabels(EVIL, "llama", "", NAMES, [NeuronLabel("layers.0", 1, EVIL, 0.5, EVIL)], {"describer": EVIL})
    page = neuron_page(labels, {("layers.0", 1): [f"»{EVIL}«", "a »b« c"]}, [EVIL], f"x: {EVIL}")
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", page, re.S)
    assert json.loads(data) == {
        "contexts": [f"»{EVIL}«", "a »b« c"],
        "neurons": [["layers.0", 1, EVIL, 0.5, EVIL, EVIL, [0, 1]]],
    }
    assert page.count("<script") == page.count("</script>") == 2
    assert "innerHTML" not in script and "http" not in page
    shown = json.loads(re.search(r'id="data">(.*?)</script>', (folder / "labels.html").read_text(), re.S)[1])
    assert len(shown["neurons"]) == 12 and all(row[6] for row in shown["neurons"])


# ------------------------------------------------------------------------------------------------ interruptions


def test_an_interrupted_run_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answers = [], Describer.answers

    def interrupted(self, conversations):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(conversations)
        return answers(self, conversations)

    out = tmp_path / "labels.json"
    options = ("-o", out, "--limit", 6, "--batch-size", 3)
    monkeypatch.setattr(Describer, "answers", interrupted)
    assert describe(folder, *options).exit_code == 130
    (left,) = tmp_path.iterdir()
    with left.open("a") as file:
        file.write('{"description": "cut sh')
    monkeypatch.setattr(Describer, "answers", lambda self, said: asked.append(said) or answers(self, said))
    result = describe(folder, *options)
    assert result.exit_code == 0, result.output
    assert "12 neurons in 2 layers, 6 of them kept from an earlier run" in result.output
    assert len(asked) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.html", "labels.json"]
    assert describe(folder, "-o", tmp_path / "whole.json", "--limit", 6, "--batch-size", 3).exit_code == 0
    for name in (".json", ".html"):
        assert (tmp_path / f"whole{name}").read_bytes() == (tmp_path / f"labels{name}").read_bytes()


def test_nothing_is_asked_twice(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(folder / "labels.json", tmp_path)
    asked, answers = [], Describer.answers
    monkeypatch.setattr(Describer, "answers", lambda self, said: asked.extend(said) or answers(self, said))
    out = ("-o", tmp_path / "labels.json", "--force", "--batch-size", 1)
    before = json.loads((tmp_path / "labels.json").read_text())["labels"]
    assert describe(folder, *out, "--limit", 6, "--prior", "own").exit_code == 0
    own = json.loads((tmp_path / "labels.json").read_text())["labels"]
    assert not asked
    assert [one["likelihoods"] for one in own] == [one["likelihoods"] for one in before]
    assert [one["confidence"] for one in own] != [one["confidence"] for one in before]
    for one in own:
        shares = torch.tensor(one["likelihoods"], dtype=torch.float64).softmax(0)
        assert one["group"] == NAMES[int(shares.argmax())]
        assert one["confidence"] == pytest.approx(float(shares.max()), abs=1e-4)
    assert describe(folder, *out, "--limit", 7).exit_code == 0
    assert len(asked) == 2
    assert describe(folder, *out, "--limit", 7, "--choose-by", "contexts").exit_code == 0
    assert len(asked) == 16


def test_what_is_left_of_other_settings_is_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.json.unfinished-0-of-1").write_text('{"belongs_to": {}}\nx\n')
    result = describe(folder, "-o", tmp_path / "labels.json", "--limit", 1)
    assert result.exit_code == 0 and "not gone on with" in result.stderr
    assert not list(tmp_path.glob("*unfinished*"))


def test_processes_go_on_with_what_any_of_them_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class State:
        num_processes = 2

        def __init__(self, index: int) -> None:
            self.process_index, self.is_main_process = index, index == 0

        def wait_for_everyone(self) -> None: ...

    def of(index: int) -> Journal:
        monkeypatch.setattr(journal, "process_state", lambda: State(index))
        return Journal(tmp_path / "l.json", "a", 2)

    one = Judgement(description="x", likelihoods=[-1.0, -2.0])
    for index in range(2):
        opened = of(index)
        opened.open({})
        opened.add({("layers.0", index): one})
    again = of(0)
    again.open({})
    assert again.found == {("layers.0", 0): one, ("layers.0", 1): one}


def test_the_installed_command_from_profile_to_groups(folder: Path, tmp_path: Path) -> None:
    """End to end, in a process of its own; what a killed one leaves is tried in `hostile/test_kills.py`."""
    options = ("--describer", folder / "describer", "-o", "labels.json", "--batch-size", 5, "--limit", 6)
    done = commands.run("mergekit-neuron", "describe", folder / "profile.safetensors", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    told, estimate, *_, agreement = done.stdout.splitlines()
    assert told == "12 neurons in 2 layers"
    assert re.fullmatch(r"about \d+ \w+ to go, by the first 5: \d+\.\d s a neuron", estimate)
    assert agreement.startswith("agreement with activations: ")
    assert {path.name for path in tmp_path.iterdir()} == {"labels.json", "labels.html"}
    assert "describing: 0 of 12 neurons" in done.stderr


# ------------------------------------------------------------------------------------------------ hosted models


@pytest.fixture
def prompts(folder: Path, tmp_path: Path) -> list[dict]:
    file = tmp_path / "prompts.jsonl"
    result = describe(folder, "--export-prompts", file, "--limit", 2)
    assert result.exit_code == 0 and "nothing was sent" in result.output, result.output
    return [json.loads(line) for line in file.read_text().splitlines()]


def answered(custom_id: str, content: object, **changes: object) -> dict:
    body = {"model": "served", "choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}
    return {"id": "x", "custom_id": custom_id, "response": {"status_code": 200, "body": body}, "error": None, **changes}


def take(folder: Path, place: Path, answers: list[dict], *options: object):
    tiny.write_jsonl(place / "answers.jsonl", answers)
    where = ("--import-answers", place / "answers.jsonl", "-o", place / "labels.json", "--limit", 2)
    return describe(folder, *where, *options, ask=False)


def test_prompts_go_out_and_answers_come_in(folder: Path, tmp_path: Path, prompts: list[dict]) -> None:
    profile = NeuronProfile.load(folder / "profile.safetensors")
    for request in prompts:
        assert request.keys() == {"custom_id", "method", "url", "body"}
        assert (request["method"], request["url"]) == ("POST", "/v1/chat/completions")
        assert re.fullmatch("[a-zA-Z0-9_-]{1,64}", request["custom_id"])
        number, neuron = map(int, request["custom_id"].split("-")[1:])
        (turn,) = request["body"]["messages"]
        assert all(line in turn["content"] for line in contexts_of(profile, list(profile.layers)[number], neuron, 8))
    said = json.dumps({"description": f"pets{EVIL}\nmore", "group": " Cat"})
    answers = [answered(request["custom_id"], f"```json\n{said}\n```") for request in prompts]
    result = take(folder, tmp_path, answers)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "labels.json").read_text())
    assert content["made_from"]["describer"] == "served"
    assert {(o["group"], o["confidence"]) for o in content["labels"]} == {("cat", None)}
    assert all(o["description"].isprintable() and o["description"].startswith("pets") for o in content["labels"])
    assert "agreement with activations: " in result.output


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda a: a[:-1], "1 of 4 answers are missing, the first is "),
        (lambda a: [*a, a[0]], "line 5: custom_id {} was answered before"),
        (lambda a: [a[0] | {"custom_id": "0" * 16 + "-0-1"}, *a[1:]], "of another profile than"),
        (lambda a: [a[0] | {"custom_id": a[0]["custom_id"] + "9"}, *a[1:]], "was not asked; give --layers"),
        (lambda a: [a[0] | {"custom_id": "mine"}, *a[1:]], "is none of --export-prompts"),
        (
            lambda a: [answered(a[0]["custom_id"], '{"description": "x", "group": "cats"}')],
            "line 1: unknown group 'cats'",
        ),
        (lambda a: [answered(a[0]["custom_id"], '{"description": "x"}')], "the answer: group: missing"),
        (lambda a: [answered(a[0]["custom_id"], "I cannot")], "holds no JSON object, found 'I cannot'"),
        (lambda a: [answered(a[0]["custom_id"], None)], "message.content"),
        (lambda a: [answered(a[0]["custom_id"], "x", error={"code": "e"})], "no answer but an error"),
        (lambda a: [answered(a[0]["custom_id"], "x", response={"status_code": 500, "body": None})], "an error, 500"),
        (lambda a: [{"custom_id": a[0]["custom_id"]}], "an error, 'no response'"),
        (lambda a: [{"x": 1}], "custom_id: missing"),
        (lambda a: [], "4 of 4 answers are missing"),
    ],
)
def test_answers_that_are_none(folder: Path, tmp_path: Path, prompts: list[dict], change, problem: str) -> None:
    whole = [answered(one["custom_id"], '{"description": "x", "group": "dog"}') for one in prompts]
    line = refused(take(folder, tmp_path, change(whole)))
    assert "answers.jsonl" in line and problem.format(whole[0]["custom_id"]) in line
    assert not (tmp_path / "labels.json").exists()


def test_missing_answers_may_be_left_out(folder: Path, tmp_path: Path, prompts: list[dict]) -> None:
    one = answered(prompts[0]["custom_id"], '{"description": "x", "group": "dog"}')
    assert take(folder, tmp_path, [one], "--allow-missing").exit_code == 0
    assert len(json.loads((tmp_path / "labels.json").read_text())["labels"]) == 1


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--describer", "base", "-o", "l.json"), "has no chat template"),
        (("--describer", "vit", "-o", "l.json"), "ViTForImageClassification is no causal language model"),
        (("--describer", "nowhere", "-o", "l.json"), "cannot read its config"),
        (("--describer", "broken", "-o", "l.json"), "its chat template cannot be followed"),
        (("--describer", "short", "-o", "l.json"), "show fewer contexts (--contexts)"),
        (("--describer", "describer", "-o", "l.html"), "ends in .json"),
        (("--describer", "x", "--export-prompts", "profile.exemplars.jsonl", "--force"), "which is read"),
        (("--describer", "describer", "-o", "l.json", "--device", "nowhere"), "--device nowhere: "),
        (("--describer", "describer", "-o", "labels.json"), "exists already"),
        (("--describer", "describer", "-o", "page.json"), "page.html: exists and is something else"),
        (("--describer", "x", "--export-prompts", "cat.jsonl", "--force"), "is something else"),
    ],
)
def test_mistakes_are_one_line(folder: Path, working_copy, options, problem: str) -> None:
    working_copy(folder)
    tiny.save_model("vit", Path("vit"))
    for name in ("broken", "short"):
        shutil.copytree("describer", name)
    Path("broken/chat_template.jinja").write_text("{{ raise_exception('not like this') }}")
    config = json.loads(Path("short/config.json").read_text())
    Path("short/config.json").write_text(json.dumps(config | {"max_position_embeddings": 60}))
    Path("page.html").write_text("mine")
    before = sorted(os.listdir())
    assert problem in refused(CliRunner().invoke(main, ["describe", "profile.safetensors", "--limit", "1", *options]))
    assert sorted(os.listdir()) == before


def test_profiles_that_cannot_be_described(tmp_path: Path, folder: Path) -> None:
    from tests.support.checkpoints import FAMILIES
    from tests.support.plans import write_profile

    config = FAMILIES["llama-untied"].config()
    for sources, top, problem in (
        ({"general": 9}, 3, "there is no domain to choose"),
        ({"cat": 9}, 0, "made with --top 0"),
        ({"cat": 9}, 3, "none of the chosen neurons ever fires"),
    ):
        made = write_profile(tmp_path / "p.safetensors", config, sources)
        for name, values in made.tensors.items():
            if "/top_" in name:
                made.tensors[name] = values[:, :top]
        made.save(tmp_path / "p.safetensors", 0, [])
        arguments = [
            "describe",
            tmp_path / "p.safetensors",
            "--describer",
            folder / "describer",
            "-o",
            tmp_path / "l.json",
        ]
        assert problem in refused(CliRunner().invoke(main, list(map(str, arguments))))
    made = write_profile(tmp_path / "p.safetensors", config, {"cat": 9})
    made.info.__dict__["exemplars"] = 1
    made.tensors["cat/layers.0/top_exemplar"][:] = 0
    made.save(tmp_path / "p.safetensors", 0, [{"source": "cat", "row": 0, "position": 0, "image": "x.png"}])
    with pytest.raises(UserError, match="measured on images"):
        contexts_of(NeuronProfile.load(tmp_path / "p.safetensors"), "layers.0", 0, 1)


@pytest.mark.parametrize(
    "options",
    [
        ("-o", "l.json"),
        ("--describer", "x"),
        ("--describer", "x", "-o", "l.json", "--export-prompts", "p.jsonl"),
        ("--describer", "x", "-o", "l.json", "--allow-missing"),
        ("--describer", "x", "-o", "l.json", "--import-answers", "a.jsonl"),
        ("-o", "l.json", "--import-answers", "a.jsonl", "--prior", "own"),
        ("--describer", "x", "--export-prompts", "p.jsonl", "--batch-size", "8"),
    ],
)
def test_options_that_do_not_go_together(folder: Path, options) -> None:
    result = CliRunner().invoke(main, ["describe", str(folder / "profile.safetensors"), *options])
    assert result.exit_code == 2, result.output
