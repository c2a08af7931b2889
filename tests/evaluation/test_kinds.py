"""Every kind of task against a reference that scores one example at a time, without padding."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from neuron_methods.evaluation import evaluate_model, open_model, read_examples
from neuron_methods.support.errors import UserError
from tests.evaluation import cases
from tests.support import tiny


@pytest.fixture
def folder(tmp_path):
    cases.questions(tmp_path)
    return tmp_path


def score(model_path, task, **options):
    with open_model(str(model_path)) as opened:
        result = evaluate_model(opened.model, opened.processor, task, **options)
        return result, opened.model.cpu()  # where the references below compute, whatever device it was on


def next_logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens], device=model.device)).logits[0].float()


def greedy(model, tokens, count):
    said = []
    for _ in range(count):
        token = int(next_logits(model, tokens + said)[-1].argmax())
        if token == tiny.VOCABULARY["</s>"]:
            break
        said.append(token)
    return said


def likelihood(model, given, said):
    logs = next_logits(model, given + said).log_softmax(-1)
    return sum(float(logs[len(given) - 1 + i, token]) for i, token in enumerate(said))


GENERATION = {
    "name": "a",
    "kind": "generation",
    "data": "questions.jsonl",
    "columns": {"input": "prompt", "target": "answer"},
    "max_new_tokens": 6,
    "batch_size": 7,
}


def test_generation_says_what_greedy_decoding_says(model, folder):
    (task,) = cases.tasks_of(folder, GENERATION)
    result, loaded = score(model("llama"), task)
    tokenizer = tiny.build_tokenizer()
    assert [outcome.row for outcome in result.outcomes] == list(range(30))
    for outcome, question in zip(result.outcomes, cases.QUESTIONS, strict=True):
        tokens = greedy(loaded, tokenizer(question["prompt"])["input_ids"], 6)
        assert outcome.prediction == tokenizer.decode(tokens, skip_special_tokens=True)
        assert outcome.target == question["answer"]
        assert outcome.score == float(outcome.prediction == question["answer"])
    assert len({outcome.prediction for outcome in result.outcomes}) > 10


def test_generation_counts_exact_answers(model, folder):
    (task,) = cases.tasks_of(folder, GENERATION)
    predictions = [outcome.prediction for outcome in score(model("llama"), task)[0].outcomes]
    right = [
        {**q, "answer": f" {p} " if i % 3 else "x"}
        for i, (q, p) in enumerate(zip(cases.QUESTIONS, predictions, strict=True))
    ]
    cases.questions(folder, right)
    result, _ = score(model("llama"), task)
    assert [outcome.score for outcome in result.outcomes] == [float(i % 3 > 0) for i in range(30)]
    assert result.score == pytest.approx(20 / 30)
    assert result.low < result.score < result.high
    assert (result.count, result.metric, result.split) == (30, "exact_match", "all")


def test_what_is_extracted_is_scored(model, folder):
    (plain,) = cases.tasks_of(folder, GENERATION)
    said = [outcome.prediction for outcome in score(model("llama"), plain)[0].outcomes]
    cases.questions(
        folder,
        [{**q, "answer": s.split()[-1] if s.split() else ""} for q, s in zip(cases.QUESTIONS, said, strict=True)],
    )
    for extract in (r"(\S+)$", r"\S+$"):
        (task,) = cases.tasks_of(folder, {**GENERATION, "extract": extract})
        result, _ = score(model("llama"), task)
        assert [outcome.score for outcome in result.outcomes] == [1.0] * 30
        assert [outcome.prediction for outcome in result.outcomes] == said  # shown whole


def test_an_answer_ends_before_stop(model, folder):
    (plain,) = cases.tasks_of(folder, GENERATION)
    said = [outcome.prediction for outcome in score(model("llama"), plain)[0].outcomes]
    words = [word for text in said for word in text.split()]
    stop = max(set(words), key=words.count)
    (task,) = cases.tasks_of(folder, {**GENERATION, "stop": stop})
    stopped = [outcome.prediction for outcome in score(model("llama"), task)[0].outcomes]
    assert stopped == [text.split(stop)[0].strip() for text in said]
    assert stopped != said


def test_a_checkpoint_that_samples_is_asked_greedily(model, folder):
    (task,) = cases.tasks_of(folder, {**GENERATION, "limit": 5})
    with open_model(str(model("llama"))) as opened:
        greedily = evaluate_model(opened.model, opened.processor, task)
        opened.model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, num_beams=2)
        again = evaluate_model(opened.model, opened.processor, task)
    assert [o.prediction for o in again.outcomes] == [o.prediction for o in greedily.outcomes]


def test_prompts_that_are_too_long_lose_their_beginning_and_that_is_said(model, folder):
    (task,) = cases.tasks_of(folder, {**GENERATION, "max_length": 4})
    result, loaded = score(model("llama"), task)
    long = [q for q in cases.QUESTIONS if len(q["prompt"].split()) > 4]
    assert result.notes == [f"{len(long)} inputs cut to what the model can read"]
    tokens = tiny.build_tokenizer()(cases.QUESTIONS[0]["prompt"])["input_ids"]
    assert result.outcomes[0].prediction == tiny.build_tokenizer().decode(
        greedy(loaded, tokens[-4:], 6), skip_special_tokens=True
    )


@pytest.mark.parametrize("kind", ["t5", "t5-gated"])
def test_text_to_text(model, folder, kind):
    (task,) = cases.tasks_of(folder, {**GENERATION, "kind": "text-to-text", "metric": "token_f1"})
    result, loaded = score(model(kind), task)
    tokenizer = tiny.build_tokenizer()
    for outcome, question in zip(result.outcomes[:8], cases.QUESTIONS, strict=False):
        ids = torch.tensor([tokenizer(question["prompt"])["input_ids"]])
        said = [0]
        for _ in range(6):
            with torch.no_grad():
                logits = loaded(input_ids=ids, decoder_input_ids=torch.tensor([said])).logits
            said.append(int(logits[0, -1].argmax()))
            if said[-1] == tiny.VOCABULARY["</s>"]:
                break
        assert outcome.prediction == tokenizer.decode(said, skip_special_tokens=True).strip()


def test_multiple_choice_by_sum_and_per_token(model, folder):
    cases.questions(folder, [{**q, "choices": ["tree tree", "red", "two"]} for q in cases.QUESTIONS])
    whole = cases.choice_task(data="questions.jsonl")
    plain, per_token = cases.tasks_of(folder, whole, {**whole, "name": "n", "normalize": "tokens"})
    tokenizer = tiny.build_tokenizer()
    picked = []
    for task, power in ((plain, 0), (per_token, 1)):
        result, loaded = score(model("llama"), task)
        for outcome, question in zip(result.outcomes, cases.QUESTIONS, strict=True):
            given = tokenizer(question["prompt"])["input_ids"]
            names = ["tree tree", "red", "two"]
            choices = [tokenizer(choice)["input_ids"] for choice in names]
            values = [likelihood(loaded, given, said) / len(said) ** power for said in choices]
            best = max(range(3), key=values.__getitem__)
            assert outcome.prediction == names[best]
            assert outcome.score == float(best == question["right"])
        picked.append([outcome.prediction for outcome in result.outcomes])
    assert picked[0] != picked[1]


def test_multiple_choice_of_a_text_to_text_model(model, folder):
    (task,) = cases.tasks_of(folder, cases.choice_task())
    result, loaded = score(model("t5"), task)
    tokenizer = tiny.build_tokenizer()
    for outcome, question in zip(result.outcomes, cases.QUESTIONS, strict=False):
        ids = torch.tensor([tokenizer(question["prompt"])["input_ids"]])
        values = []
        for choice in question["choices"]:
            said = torch.tensor([tokenizer(choice)["input_ids"]])
            with torch.no_grad():
                loss = loaded(input_ids=ids, labels=said).loss
            values.append(-float(loss) * said.numel())
        assert outcome.prediction == question["choices"][max(range(3), key=values.__getitem__)]


@pytest.mark.parametrize(
    ("choices", "label", "right"),
    [
        (["cat", "dog"], "dog", "dog"),
        (["cat", "dog"], "1", "dog"),
        ({"text": ["cat", "dog"], "label": ["A", "B"]}, "A", "cat"),
        ({"text": ["cat", "dog"], "label": ["1", "2"]}, "2", "dog"),
    ],
)
def test_the_right_choice_by_place_text_or_letter(model, folder, choices, label, right):
    cases.questions(folder, [{"prompt": "one two", "choices": choices, "right": label}])
    (task,) = cases.tasks_of(folder, cases.choice_task(data="questions.jsonl"))
    assert score(model("llama"), task)[0].outcomes[0].target == right


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["a", "b"], "right": 2}, "column 'right' of row 0 holds 2, needed is one of the 2 choices"),
        ({"choices": ["a", "b"], "right": "c"}, "column 'right' of row 0 holds 'c'"),
        ({"choices": ["a"], "right": 0}, "column 'choices' of row 0 holds list, needed is a list of two texts"),
        ({"choices": "a", "right": 0}, "column 'choices' of row 0 holds 'a'"),
    ],
)
def test_choices_that_are_none(model, folder, row, message):
    cases.questions(folder, [{"prompt": "one", **row}])
    (task,) = cases.tasks_of(folder, cases.choice_task(data="questions.jsonl"))
    with pytest.raises(UserError, match=message):
        score(model("llama"), task)


def test_a_token_that_changes_where_the_choice_follows():
    """The scored tokens are those of the whole text behind what input and whole have in common."""
    from neuron_methods.evaluation.kinds.likelihood import MultipleChoice

    class Greedy:
        def __call__(self, text):
            table = {"ab": [1, 2], "ab c": [1, 3, 4]}
            return {"input_ids": table[text]}

    scorer = MultipleChoice.__new__(MultipleChoice)
    scorer.encodes, scorer.longest, scorer.tokenizer, scorer.truncated = False, None, Greedy(), [False]
    scorer.examples = type("E", (), {"text": lambda self, i, role: "ab"})()
    scorer.separator = " "
    scorer.asked = type("P", (), {"text": lambda self, i: "ab", "tokenize": lambda self, t: Greedy()(t)["input_ids"]})()
    assert scorer._pair(0, "c") == ([1], [3, 4])


@pytest.mark.parametrize("window", [None, 4])
def test_perplexity(model, folder, window):
    given = {"data": "questions.jsonl", **({"max_length": window} if window else {})}
    (task,) = cases.tasks_of(folder, cases.perplexity_task(**given))
    result, loaded = score(model("llama"), task)
    tokenizer, total, count = tiny.build_tokenizer(), 0.0, 0
    for question in cases.QUESTIONS:
        tokens = tokenizer(question["prompt"])["input_ids"]
        for place in range(1, len(tokens)):
            first = 0 if window is None else (place - 1) // (window - 1) * (window - 1)
            total -= likelihood(loaded, tokens[first:place], [tokens[place]])
            count += 1
    assert result.score == pytest.approx(math.exp(total / count), rel=1e-5)
    assert sum(outcome.weight for outcome in result.outcomes) == count


def test_image_classification_and_a_restricted_label_set(model, tmp_path):
    tiny.write_images(tmp_path / "images", 6)
    plain = {
        "name": "a",
        "kind": "image-classification",
        "data": {"source": "images", "split": "train"},
        "batch_size": 4,
    }
    (task,) = cases.tasks_of(tmp_path, plain)
    result, loaded = score(model("vit"), task)
    processor = transformers.AutoImageProcessor.from_pretrained(model("vit"))
    names = loaded.config.id2label
    from PIL import Image

    logits = {}
    for path in sorted((tmp_path / "images").rglob("*.png")):
        pixels = processor(Image.open(path), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits[path] = loaded(pixel_values=pixels).logits[0]
    expected = {(path.parent.name, names[int(v.argmax())]) for path, v in logits.items()}
    assert {(outcome.target, outcome.prediction) for outcome in result.outcomes} == expected
    right = [path.parent.name == names[int(v.argmax())] for path, v in logits.items()]
    assert result.score == pytest.approx(sum(right) / 18)

    pair = [label for label in tiny.LABELS if label != names[int(next(iter(logits.values())).argmax())]]
    for label in tiny.LABELS:
        if label not in pair:
            for path in (tmp_path / "images" / label).iterdir():
                path.unlink()
    (task,) = cases.tasks_of(tmp_path, {**plain, "labels": pair})
    result, _ = score(model("vit"), task)
    assert {outcome.prediction for outcome in result.outcomes} <= {*pair}
    assert result.count == 12


def test_labels_by_number_and_by_name(model, tmp_path):
    tiny.write_images(tmp_path / "images", 2)
    paths = sorted((tmp_path / "images").rglob("*.png"))
    for label_of in (lambda p: p.parent.name, lambda p: tiny.LABELS[p.parent.name]):
        rows = [{"image": str(path), "label": label_of(path)} for path in paths]
        tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
        (task,) = cases.tasks_of(tmp_path, {"name": "a", "kind": "image-classification", "data": "rows.jsonl"})
        result, _ = score(model("vit"), task)
        assert [outcome.target for outcome in result.outcomes] == [path.parent.name for path in paths]


def test_folders_named_by_numbers_are_those_classes(tmp_path):
    tiny.write_images(tmp_path / "all", 2)
    (tmp_path / "images").mkdir()
    for name, number in (("cat", "2"), ("dog", "0")):
        (tmp_path / "all" / name).rename(tmp_path / "images" / number)
    classifier = transformers.ViTForImageClassification(transformers.ViTConfig(**tiny.VISION, num_labels=3))
    given = {"name": "a", "kind": "image-classification", "data": {"source": "images", "split": "train"}}
    (task,) = cases.tasks_of(tmp_path, given)
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    result = evaluate_model(classifier, processor, task)
    assert sorted({outcome.target for outcome in result.outcomes}) == ["LABEL_0", "LABEL_2"]


@pytest.mark.parametrize("prompts", [None, ["a cat and {}", "{} or tree", "{}"]])
def test_zero_shot_classification(model, tmp_path, prompts):
    tiny.write_images(tmp_path / "images", 3)
    given = {"data": {"source": "images", "split": "train"}, **({"prompts": prompts} if prompts else {})}
    (task,) = cases.tasks_of(tmp_path, {"name": "a", "kind": "zero-shot-image-classification", **given})
    result, loaded = score(model("clip"), task)
    tokenizer = tiny.build_tokenizer()
    processor = transformers.AutoImageProcessor.from_pretrained(model("clip"))
    from PIL import Image

    names = sorted(tiny.LABELS)
    with torch.no_grad():
        classes = []
        for name in names:
            texts = [prompt.replace("{}", name) for prompt in (prompts or ["a photo of a {}."])]
            each = [
                loaded.get_text_features(**tokenizer(t, return_tensors="pt", return_token_type_ids=False))
                for t in texts
            ]
            each = [e if isinstance(e, torch.Tensor) else e.pooler_output for e in each]
            classes.append(torch.stack([e[0] / e[0].norm() for e in each]).mean(0))
        predicted = []
        for path in sorted((tmp_path / "images").rglob("*.png")):
            pixels = processor(Image.open(path), return_tensors="pt")["pixel_values"]
            image = loaded.get_image_features(pixel_values=pixels)
            image = image if isinstance(image, torch.Tensor) else image.pooler_output
            values = [float(torch.cosine_similarity(image[0], c, dim=0)) for c in classes]
            predicted.append((path.parent.name, names[values.index(max(values))]))
    assert [(outcome.target, outcome.prediction) for outcome in result.outcomes] == predicted


def test_zero_shot_needs_names(model, tmp_path):
    tiny.write_images(tmp_path / "images", 1)
    rows = [{"image": str(path), "label": 1} for path in sorted((tmp_path / "images").rglob("*.png"))]
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    given = {"name": "a", "kind": "zero-shot-image-classification", "data": "rows.jsonl"}
    with pytest.raises(UserError, match="task 'a': labels: the data names no labels"):
        score(model("clip"), cases.tasks_of(tmp_path, given)[0])
    result, _ = score(model("clip"), cases.tasks_of(tmp_path, {**given, "labels": ["cat", "dog"]})[0])
    assert {outcome.target for outcome in result.outcomes} == {"dog"}
    with pytest.raises(UserError, match="column 'label' of row 0 holds 1, needed is one of the 1 labels"):
        score(model("clip"), cases.tasks_of(tmp_path, {**given, "labels": ["cat"]})[0])


@pytest.mark.parametrize(("pad", "pair"), [(0, False), (None, True)])
def test_text_classification(folder, pad, pair):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**tiny.DECODER, "pad_token_id": pad}, num_labels=3)
    classifier = transformers.LlamaForSequenceClassification(config).eval()
    columns = {"text": "prompt", "label": "right", **({"pair": "answer"} if pair else {})}
    given = {"name": "a", "kind": "text-classification", "data": "questions.jsonl", "columns": columns, "batch_size": 8}
    tokenizer = tiny.build_tokenizer()
    result = evaluate_model(classifier, tokenizer, cases.tasks_of(folder, given)[0])
    for outcome, question in zip(result.outcomes, cases.QUESTIONS, strict=True):
        texts = [question["prompt"], question["answer"]] if pair else [question["prompt"]]
        with torch.no_grad():
            logits = classifier(**tokenizer(*texts, return_tensors="pt", return_token_type_ids=False)).logits[0]
        assert outcome.prediction == f"LABEL_{int(logits.argmax())}"
        assert outcome.target == f"LABEL_{question['right']}"
    assert len({outcome.prediction for outcome in result.outcomes}) > 1


def test_the_model_is_left_in_its_mode_and_scored_without_dropout(folder):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**tiny.DECODER, num_labels=3, attention_dropout=0.9)
    classifier = transformers.LlamaForSequenceClassification(config).train()
    columns = {"text": "prompt", "label": "right"}
    given = {"name": "a", "kind": "text-classification", "data": "questions.jsonl", "columns": columns}
    (task,) = cases.tasks_of(folder, given)
    examples = read_examples(task)
    first = evaluate_model(classifier, tiny.build_tokenizer(), task, examples=examples)
    assert classifier.training
    again = evaluate_model(classifier, tiny.build_tokenizer(), task, examples=examples)
    assert first.outcomes == again.outcomes
