"""Prompts through chat templates and behind worked examples, against transformers' own conversations."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers

from neuron_methods.evaluation import evaluate_model, open_model, read_examples, score_files, scoring
from neuron_methods.evaluation.kinds import generation, harness
from neuron_methods.evaluation.kinds.generation import Generation
from neuron_methods.evaluation.kinds.likelihood import windows
from neuron_methods.models import chat
from neuron_methods.support.errors import UserError
from tests.evaluation import cases
from tests.evaluation.test_kinds import greedy, likelihood, score
from tests.evaluation.test_run import run
from tests.support import tiny

# Turns between <s> and </s>: what a role is called is a word that the tokenizer does not know.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and m.content == 'refused' %}{{ raise_exception('no system') }}"
    "{% endif %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
ROWS = [{**question, "text": "red cat", "choices": ["cat dog", "red", "two"]} for question in cases.QUESTIONS]


@pytest.fixture
def folder(tmp_path):
    cases.questions(tmp_path, ROWS)
    return tmp_path


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A model whose tokenizer puts <s> before every text by itself, and has a chat template."""
    place = tiny.save_model("llama", tmp_path_factory.mktemp("chatty") / "model", bos=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    return place


def conversation(place, messages, answers=True):
    """Token ids by transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=answers, tokenize=True, return_dict=False)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


GENERATION = {
    "name": "a",
    "kind": "generation",
    "data": {"source": "questions.jsonl", "split": "[:9]", "validation_split": "[9:]"},
    "columns": {"input": "prompt", "target": "answer"},
    "max_new_tokens": 5,
    "batch_size": 4,
}


@pytest.mark.parametrize("system", [None, "two red"])
def test_a_prompt_is_the_users_turn(chatty, folder, system):
    (task,) = cases.tasks_of(folder, {**GENERATION, **({"system": system} if system else {"chat": True})})
    result, loaded = score(chatty, task)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chatty)
    for outcome, row in zip(result.outcomes, ROWS, strict=False):
        said = [{"role": "system", "content": system}] if system else []
        tokens = conversation(chatty, [*said, user(row["prompt"])])
        assert outcome.prediction == tokenizer.decode(greedy(loaded, tokens, 5), skip_special_tokens=True)
    assert result.prompts["chat"] is True and result.prompts.get("system") == system
    assert result.notes == ["prompts through the model's chat template"]


def test_without_chat_prompts_go_as_they_are_and_that_is_said(chatty, model, folder):
    silent, off = cases.tasks_of(folder, GENERATION, {**GENERATION, "name": "b", "chat": False})
    result, loaded = score(chatty, silent)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chatty)
    for outcome, row in zip(result.outcomes, ROWS, strict=False):
        tokens = tokenizer(row["prompt"])["input_ids"]
        assert outcome.prediction == tokenizer.decode(greedy(loaded, tokens, 5), skip_special_tokens=True)
    assert result.prompts == {"chat": False, "few_shot": 0}
    assert "which chat: true uses" in result.notes[0]
    again, _ = score(chatty, off)
    assert (again.notes, [o.prediction for o in again.outcomes]) == ([], [o.prediction for o in result.outcomes])
    assert score(model("llama"), silent)[0].notes == []  # there is no template to tell of


def test_an_answer_ends_where_the_template_ends_a_turn(chatty, folder):
    """Even where neither checkpoint nor tokenizer would end there."""
    template = folder / "other.jinja"
    template.write_text(TEMPLATE.replace("</s>", "<pad>"))
    task, plain = cases.tasks_of(
        folder, {**GENERATION, "template": "other.jinja", "max_new_tokens": 30}, {**GENERATION, "name": "b"}
    )
    with open_model(str(chatty)) as opened:
        ends = [
            Generation(
                opened.model, opened.processor, read_examples(t), opened.device
            ).settings_of_generate.eos_token_id
            for t in (task, plain)
        ]
        result = evaluate_model(opened.model, opened.processor, task)
    assert (ends[0], ends[1]) == ([2, 0], 2)
    assert result.prompts["template"] == "of the task"


def test_examples_are_shown_first_never_the_one_that_is_asked(chatty, folder):
    tasks = [
        {**GENERATION, "few_shot": 2},
        {**GENERATION, "name": "b", "few_shot": 2, "separator": " and "},
        {**GENERATION, "name": "c", "few_shot": 2, "chat": True},
    ]
    joined, apart, chat = cases.tasks_of(folder, *tasks)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chatty)
    for split in ("test", "validation"):
        shown_before = read_examples(joined, split)
        assert len({*map(tuple, map(shown_before.shots_before, range(len(shown_before))))}) == (
            1 if split == "test" else 3
        )
        results = [score(chatty, task, split=split)[0] for task in (joined, apart, chat)]
        with open_model(str(chatty)) as opened:
            for place in range(len(shown_before)):
                shots = [ROWS[shown_before.shots.samples[i].row] for i in shown_before.shots_before(place)]
                row = shown_before.samples[place].row
                asked = ROWS[row]["prompt"]
                assert len(shots) == 2 and ROWS[row] not in shots and all(ROWS.index(s) >= 9 for s in shots)
                texts = [
                    "\n\n".join([*(f"{s['prompt']}{sep}{s['answer']}" for s in shots), asked]) for sep in (" ", " and ")
                ]
                turns = [turn for s in shots for turn in (user(s["prompt"]), assistant(s["answer"]))]
                expected = [tokenizer(text)["input_ids"] for text in texts]
                expected.append(conversation(chatty, [*turns, user(asked)]))
                for result, tokens in zip(results, expected, strict=True):
                    said = greedy(opened.model, tokens, 5)
                    assert result.outcomes[place].prediction == tokenizer.decode(said, skip_special_tokens=True)


def test_a_choice_is_what_the_model_says(chatty, folder):
    (task,) = cases.tasks_of(folder, cases.choice_task(chat=True, few_shot=1))
    result, loaded = score(chatty, task)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chatty)
    examples = read_examples(task)
    shown = ROWS[examples.shots.samples[0].row]
    turns = [user(shown["prompt"]), assistant(shown["choices"][shown["right"]])]
    for outcome, row in zip(result.outcomes, ROWS, strict=False):
        given = conversation(chatty, [*turns, user(row["prompt"])])
        values = [
            likelihood(loaded, given, tokenizer(choice, add_special_tokens=False)["input_ids"])
            for choice in row["choices"]
        ]
        assert outcome.prediction == row["choices"][max(range(3), key=values.__getitem__)]


def test_perplexity_of_what_the_model_says_alone(chatty, folder):
    columns = {"text": "answer", "input": "prompt"}
    (task,) = cases.tasks_of(folder, cases.perplexity_task(chat=True, columns=columns))
    result, loaded = score(chatty, task)
    tokenizer, total, count = transformers.AutoTokenizer.from_pretrained(chatty), 0.0, 0
    for row in ROWS[:12]:
        said = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        total -= likelihood(loaded, conversation(chatty, [user(row["prompt"])]), said)
        count += len(said)
    assert result.score == pytest.approx(math.exp(total / count), rel=1e-5)


def test_windows_score_every_token_that_is_said_once():
    for length, given, width in [(10, 1, 4), (10, 5, 4), (10, 9, 3), (7, 3, 20), (9, 4, 2)]:
        tokens = list(range(length))
        scored = [token for window, start in windows(tokens, given, width) for token in window[start:]]
        assert scored == tokens[given:]
        assert all(len(window) <= width for window, _ in windows(tokens, given, width))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat": "yes"}, "chat: expected true or false, found 'yes'"),
        ({"chat": False, "system": "two"}, "system: has no effect with chat: false"),
        ({"template": "none.jinja"}, "template: there is no file or folder 'none.jinja'"),
        ({"few_shot": -1}, "few_shot: expected a whole number from 0"),
        ({"separator": "-"}, "separator: stands between .* give few_shot"),
        ({"extract": "("}, "extract: expected a regular expression"),
        ({"extract": "(a)(b)"}, "extract: expected a regular expression with one group"),
        ({"kind": "text-to-text", "chat": True}, "unknown key 'chat'"),
    ],
)
def test_settings_that_say_nothing(folder, changes, message):
    with pytest.raises(UserError, match=message):
        cases.tasks_of(folder, {**GENERATION, **changes})


def test_a_chat_that_cannot_be(chatty, model, folder):
    (folder / "broken.jinja").write_text("{% for %}")
    task, refused, broken, hungry, single = cases.tasks_of(
        folder,
        {**GENERATION, "chat": True},
        {**GENERATION, "name": "b", "system": "refused"},
        {**GENERATION, "name": "c", "template": "broken.jinja"},
        {**GENERATION, "name": "d", "few_shot": 40},
        {**GENERATION, "name": "e", "few_shot": 1, "data": "questions.jsonl"},
    )
    with pytest.raises(UserError, match="task 'a': chat: the model's tokenizer has no chat template"):
        score(model("llama"), task)
    with pytest.raises(UserError, match=r"task 'b': its chat template cannot be followed: .*no system"):
        score(chatty, refused)
    with pytest.raises(UserError, match="task 'c': its chat template cannot be followed: "):
        score(chatty, broken)
    with pytest.raises(UserError, match="task 'd': few_shot: 40 asked for, and its validation split has 21 rows"):
        score(chatty, hungry)
    with pytest.raises(UserError, match="task 'e': data: there is no validation_split"):
        score(chatty, single)
    (t5,) = cases.tasks_of(folder, cases.choice_task(chat=True))
    with pytest.raises(UserError, match="chat: model t5 is text-to-text"):
        score(model("t5"), t5)


def test_the_command_says_which_scores_these_are(chatty, folder):
    tasks = cases.write_tasks(folder, {**GENERATION, "chat": True, "system": "one", "few_shot": 1})
    done = run(chatty, "--task", tasks, "-o", folder / "scores.json")
    assert done.exit_code == 0, done.stderr
    assert "a: prompts through the model's chat template" in done.stderr + done.stdout
    (record,) = json.loads((folder / "scores.json").read_text())["tasks"]
    assert record["prompts"] == {"chat": True, "few_shot": 1, "template": "of the model", "system": "one"}

    from neuron_methods.sharing.card import read_evaluation, with_evaluation

    card = with_evaluation("---\nlicense: mit\n---\n# x\n", read_evaluation(folder / "scores.json"), "x")
    assert "num_few_shot" not in card and "few_shot: 1" in card and "| chat template, system prompt, 1 shown |" in card


def harness_returns(monkeypatch, results: dict, samples: dict) -> dict:
    """Stand in for the package, which is none of the tests', with what it returned; what it is asked for."""
    import sys
    import types

    asked = {}
    package, models, tasks = (types.ModuleType(name) for name in ("lm_eval", "models", "tasks"))
    package.simple_evaluate = lambda **given: asked.update(given) or {"results": results, "samples": samples}
    models.HFLM = lambda **given: given
    tasks.TaskManager = lambda **given: given
    for name, module in (("lm_eval", package), ("lm_eval.models.huggingface", models), ("lm_eval.tasks", tasks)):
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_the_harness_is_given_the_chat(folder, monkeypatch):
    asked = harness_returns(monkeypatch, {"x": {"acc,none": 1.0}}, {})
    (folder / "mine.jinja").write_text(TEMPLATE)
    given = {"name": "a", "kind": "lm-eval", "task": "x", "system": "two", "template": "mine.jinja"}
    (task,) = cases.tasks_of(folder, given)
    tokenizer = tiny.build_tokenizer()
    harness.run_harness(torch.nn.Module(), tokenizer, task, 0)
    assert (asked["apply_chat_template"], asked["system_instruction"]) == (True, "two")
    assert asked["model"]["tokenizer"].chat_template == TEMPLATE and tokenizer.chat_template is None
    notes = scoring.HarnessTask(torch.nn.Module(), tokenizer, task, 0).run().notes
    assert notes == ["prompts through the task's chat template"]


# As lm-evaluation-harness 0.4.13 returned it for tasks of two filters and of two metrics, and a group of both.
TWO = {"name": "two", "alias": "two", "sample_len": 2, "exact_match,word": 0.5, "exact_match_stderr,word": "N/A"}
TWO |= {"exact_match,raw": 0.0, "exact_match_stderr,raw": 0.0}
WORDS = {"alias": "words", "sample_len": 2, "acc,none": 0.5, "acc_stderr,none": 0.25, "word_perplexity,none": 9}
SAMPLES = {
    "words": [{"doc_id": row, "filter": "none", "acc": float(row), "acc_norm": 0.0} for row in (0, 1)],
    "two": [
        {"doc_id": row, "filter": kept, "exact_match": float(kept == "word" and row)}
        for kept in ("word", "raw")
        for row in (1, 0)
    ],
}


@pytest.mark.parametrize(
    ("name", "metric", "found"),
    [
        ("two", None, ("exact_match,word", 0.5, 0.0, [(1, 1.0), (0, 0.0)], 2)),
        ("two", "exact_match", ("exact_match,word", 0.5, 0.0, [(1, 1.0), (0, 0.0)], 2)),
        ("two", "exact_match,raw", ("exact_match,raw", 0.0, 0.0, [(1, 0.0), (0, 0.0)], 2)),
        ("words", None, ("acc", 0.5, 0.25, [(0, 0.0), (1, 1.0)], 2)),
        ("words", "acc,none", ("acc", 0.5, 0.25, [(0, 0.0), (1, 1.0)], 2)),
        ("words", "word_perplexity", ("word_perplexity", 9.0, 0.0, [], 2)),
    ],
)
def test_a_metric_of_the_harness_may_be_chosen_with_its_filter(folder, monkeypatch, name, metric, found):
    harness_returns(monkeypatch, {name: {"two": TWO, "words": WORDS}[name]}, {name: SAMPLES[name]})
    given = {"name": "a", "kind": "lm-eval", "task": name} | ({"metric": metric} if metric else {})
    (task,) = cases.tasks_of(folder, given)
    assert harness.run_harness(torch.nn.Module(), tiny.build_tokenizer(), task, 0) == found
    result = scoring.HarnessTask(torch.nn.Module(), tiny.build_tokenizer(), task, 0).run()
    assert (result.metric, result.count, len(result.outcomes), result.notes) == (found[0], 2, len(found[3]), [])


@pytest.mark.parametrize(
    ("metric", "value", "error", "shown", "mean"),
    [
        ("bleu", 43.25, 2.0, ["43.2 %", "39.3 to 47.2 %"], 0.4325),
        ("chrf++", 43.25, "N/A", ["43.2 %", "43.2 to 43.2 %"], 0.4325),
        ("acc", 0.4325, 0.02, ["43.2 %", "39.3 to 47.2 %"], 0.4325),
        ("word_perplexity", 9.5, "N/A", ["9.500", "9.500 to 9.500"], None),
        ("bits_per_byte", 0.75, 0.0, ["0.750", "0.750 to 0.750"], None),
        ("ter", 120.0, 0.0, ["120.000", "120.000 to 120.000"], None),
        ("brier_score", 0.25, 0.0, ["0.250", "0.250 to 0.250"], None),
    ],
)
def test_scores_of_the_harness_are_shares_or_shown_as_they_are(folder, monkeypatch, metric, value, error, shown, mean):
    harness_returns(monkeypatch, {"x": {f"{metric},kept": value, f"{metric}_stderr,kept": error}}, {"x": []})
    (task,) = cases.tasks_of(folder, {"name": "a", "kind": "lm-eval", "task": "x"})
    result = scoring.HarnessTask(torch.nn.Module(), tiny.build_tokenizer(), task, 0).run()
    found = scoring.Evaluation("m", [result, result])
    assert found.mean == mean
    row = [cell.strip() for cell in score_files.table(found)[1].split("  ") if cell.strip()]
    assert row[1:3] == shown


def test_a_group_of_the_harness_counts_the_examples_of_all_its_tasks(folder, monkeypatch):
    samples = {"words": SAMPLES["words"], "more": SAMPLES["words"]}
    harness_returns(monkeypatch, {"words": WORDS, "more": WORDS, "both": {"acc,none": 0.5}}, samples)
    (task,) = cases.tasks_of(folder, {"name": "a", "kind": "lm-eval", "task": "both"})
    found = harness.run_harness(torch.nn.Module(), tiny.build_tokenizer(), task, 0)
    assert (found.scores, found.count) == ([(0, 0.0), (1, 1.0), (2, 0.0), (3, 1.0)], 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "two", "metric": "acc"}, r"^task 'a': metric: two has no 'acc' \(it has: exact_match,word, exact_ma"),
        ({"task": "tag"}, "^task 'a': task: tag stands for tasks that have no score in common: two, words; name one$"),
    ],
)
def test_what_the_harness_has_no_score_for_is_named(folder, monkeypatch, given, message):
    harness_returns(monkeypatch, {"two": TWO, "words": WORDS}, SAMPLES)
    (task,) = cases.tasks_of(folder, {"name": "a", "kind": "lm-eval", **given})
    with pytest.raises(UserError, match=message):
        harness.run_harness(torch.nn.Module(), tiny.build_tokenizer(), task, 0)


ENDLESS = {
    "it goes on for ever": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nothing ends a computation in C": "{{ (messages | length + 8) ** 99999999 % 7 }}",
    "its text has no end": "{{ 'x' * 99999999 }}",
    "it takes all memory": "{{ 'x' * (messages | length * 9999999999) }}",
}


@pytest.mark.parametrize("how", ENDLESS)
def test_a_template_has_an_end(chatty, monkeypatch, how):
    """After it others are rendered as before."""
    monkeypatch.setattr(chat, "SECONDS", 1.0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chatty)
    message = "it took more than 1 s or 2.1 GB|it makes 99999999 characters of one|MemoryError"
    with pytest.raises(UserError, match=rf"^x: its chat template cannot be followed: ({message})"):
        chat.rendered(tokenizer, [user("red")], "x", chat_template=ENDLESS[how])
    options = {"add_generation_prompt": False, "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ more }}"}
    assert chat.rendered(tokenizer, [user("röd\n")], "x", more=[1], **options) == "<s>röd\n[1]"


def test_a_template_that_does_not_ask_is_told(chatty, folder):
    (folder / "deaf.jinja").write_text("<s> {{ messages | length }}")
    (task,) = cases.tasks_of(folder, {**GENERATION, "template": "deaf.jinja"})
    with pytest.raises(UserError, match="task 'a': chat: the task's chat template writes the same prompt whatever"):
        score(chatty, task)


def test_a_question_is_not_shown_before_itself_wherever_it_stands(folder):
    rows = [dict(row) for row in ROWS]
    for place in (3, 12, 13, 14, 20):
        rows[place] |= {"prompt": "red cat", "answer": "dog"}
    cases.questions(folder, rows)
    few, many = cases.tasks_of(folder, {**GENERATION, "few_shot": 3}, {**GENERATION, "name": "b", "few_shot": 18})
    for split in ("test", "validation"):
        found = read_examples(few, split)
        for place in range(len(found)):
            shown = [found.shots.samples[i].values[0] for i in found.shots_before(place)]
            assert len({*shown}) == len(shown) == 3 and found.samples[place].values[0] not in shown
    with pytest.raises(
        UserError, match="task 'b': few_shot: 18 asked for, and its validation split has 18 rows of diff"
    ):
        read_examples(many, "test")


def test_an_expression_has_an_end(chatty, folder, monkeypatch):
    monkeypatch.setattr(generation, "MATCHING", 0.2)
    (task,) = cases.tasks_of(folder, {**GENERATION, "extract": r"^(?:a|b|ab)*c"})
    with open_model(str(chatty)) as opened:
        scorer = Generation(opened.model, opened.processor, read_examples(task), opened.device)
    assert scorer.measure("ababc", ["ababc"], 0) == 1.0
    with pytest.raises(UserError, match="task 'a': extract: takes more than 0 s in the answer to row 1; an expression"):
        scorer.measure("ab" * 60 + "xc", ["ab"], 0)
