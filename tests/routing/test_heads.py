"""Experts with heads of their own: routed, answered, saved, scored; against peft with one adapter at a time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file

from neuron_methods import NeuronRoutedModel
from neuron_methods.cli import main
from neuron_methods.routing.answering import answer
from neuron_methods.routing.build import build_routed_model
from neuron_methods.routing.heads import BASE
from neuron_methods.routing.routed_files import RoutedConfig
from neuron_methods.support.errors import UserError
from tests.support.accelerator import DEVICE, accelerator
from tests.support.routed import (
    HEADS,
    headed_settings,
    make_headed_workspace,
    make_workspace,
    save_headed,
    settings,
    write_topic,
)
from tests.support.tiny import save_model

SIZES = [len(labels) for labels in HEADS.values()]
PLAIN = {"enhancement": {"enabled": False}}


both = pytest.mark.parametrize("made", ["with a head", "headless"], indirect=True)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """`folders("headless")`: a folder with such a base and experts routed without enhancement, and the model."""
    known = {}

    def get(kind):
        if kind not in known:
            folder = make_headed_workspace(tmp_path_factory.mktemp("heads"), headless=kind == "headless")
            (folder / "routed.yaml").write_text(yaml.safe_dump({**headed_settings(), **PLAIN}))
            build_routed_model(folder / "routed.yaml", folder / "routed")
            known[kind] = folder, NeuronRoutedModel.from_pretrained(folder / "routed")
        return known[kind]

    return get


@pytest.fixture
def made(folders, request):
    """Such a folder, to be left as it is."""
    return folders(getattr(request, "param", "with a head"))[0]


@pytest.fixture
def loaded(folders, made):
    return next(model for folder, model in map(folders, ("with a head", "headless")) if folder == made)


@pytest.fixture
def workspace(made, working_copy):
    """A working copy of that folder."""
    return working_copy(made)


def images(*numbers):
    """One image of each task's brightness; None: of nobody's."""
    generator = torch.Generator().manual_seed(0)
    shades = [
        torch.tensor([0.0, 1.0]).repeat(3, 8, 4)
        if n is None
        else (torch.rand(3, 8, 8, generator=generator) * 20 + 64 * n) / 255
        for n in numbers
    ]
    return torch.stack(shades) * 2 - 1


def is_headless(folder):
    return json.loads((folder / "base" / "config.json").read_text())["architectures"] == ["ViTModel"]


def by_peft(folder, name, pixels):
    """What peft computes with one adapter and its head."""
    config = transformers.AutoConfig.from_pretrained(folder / "base")
    config.num_labels = len(HEADS[name])
    model = transformers.ViTForImageClassification.from_pretrained(
        folder / "base", config=config, ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(model, folder / "adapters" / name).eval()
    with torch.no_grad():
        return model(pixel_values=pixels).logits


def invoke(*args, code=0):
    result = CliRunner().invoke(main, [*map(str, args)])
    assert result.exit_code == code, result.output
    return result


def error_of(*args):
    (line,) = [text for text in invoke(*args, code=1).stderr.splitlines() if text.startswith("error: ")]
    return line


@both
def test_each_sample_of_a_mixed_batch_is_answered_by_its_experts_head(made, loaded):
    pixels = images(2, 0, 3, 1, 0)
    with torch.no_grad():
        output, routing = loaded(pixel_values=pixels, return_routing=True)
    assert output.heads == [list(HEADS)[n] for n in (2, 0, 3, 1, 0)] == [names[0] for names in routing.experts]
    starts = [sum(SIZES[:n]) for n in range(4)]
    assert output.logits.shape == (5, sum(SIZES) + (0 if is_headless(made) else 3))
    for row, number in enumerate((2, 0, 3, 1, 0)):
        name, start, size = list(HEADS)[number], starts[number], SIZES[number]
        expected = by_peft(made, name, pixels[row : row + 1])[0]
        own = output.logits[row, start : start + size]
        assert torch.allclose(own, expected, atol=1e-5)
        assert torch.equal(output.logits[row].isfinite().nonzero().flatten(), torch.arange(start, start + size))
        assert output.labels[row] == sorted(HEADS[name])[int(expected.argmax())]  # an image folder's order
        assert loaded.config.id2label[int(output.logits[row].argmax())] == output.labels[row]


@both
def test_what_nobody_claims_is_the_bases_to_answer_or_the_nearest_experts(made, loaded):
    pixels = images(None, 1)
    with torch.no_grad():
        output, routing = loaded(pixel_values=pixels, return_routing=True)
    assert routing.in_domain.tolist() == [False, True] and "out of domain" in routing.describe(0)
    if is_headless(made):
        nearest = list(HEADS)[int(routing.probabilities[0].argmax())]
        assert output.heads[0] == nearest == routing.experts[0][0]
        (_, start, stop) = next(head for head in loaded.config.routed_heads if head[0] == nearest)
        assert torch.allclose(output.logits[0, start:stop], by_peft(made, nearest, pixels[:1])[0], atol=1e-5)
    else:
        base = transformers.ViTForImageClassification.from_pretrained(made / "base")
        with torch.no_grad():
            expected = base(pixel_values=pixels[:1]).logits[0]
        assert (output.heads[0], routing.experts[0]) == (BASE, [])
        assert torch.allclose(output.logits[0, -3:], expected, atol=1e-5) and output.labels[0] in ("cat", "dog", "tree")


def test_the_loss_is_over_the_chosen_heads_classes(loaded):
    pixels, labels = images(0, 2), torch.tensor([1, 6])
    with torch.no_grad():
        output = loaded(pixel_values=pixels, labels=labels)
    own = [output.logits[0, :2], output.logits[1, 5:9]]
    expected = torch.stack([-own[0].log_softmax(0)[1], -own[1].log_softmax(0)[1]]).mean()
    assert torch.allclose(output.loss, expected, atol=1e-6)


def test_saved_and_loaded_it_answers_the_same(loaded, tmp_path):
    loaded.save_pretrained(tmp_path / "again")
    assert sorted(file.stem for file in (tmp_path / "again" / "heads").iterdir()) == sorted(HEADS)
    again = NeuronRoutedModel.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        one, two = (model(pixel_values=images(0, 1, 2, 3, None)) for model in (loaded, again))
    assert torch.equal(one.logits, two.logits) and (one.heads, one.labels) == (two.heads, two.labels)


def test_as_static_has_one_experts_head(made, loaded, tmp_path):
    plain = loaded.as_static({"shapes": 1.0})
    plain.save_pretrained(tmp_path / "plain")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    pixels = images(2)
    with torch.no_grad():
        assert torch.allclose(again(pixel_values=pixels).logits, by_peft(made, "shapes", pixels), atol=1e-5)
    assert list(again.config.id2label.values()) == sorted(HEADS["shapes"])
    halves = {"shapes": 0.5, "digits": 0.5}
    assert loaded.as_static(halves, head="digits").config.num_labels == 2
    with pytest.raises(UserError, match="as_static: head: several experts have a say in it; name one's: digits, "):
        loaded.as_static(halves)
    with pytest.raises(UserError, match="as_static: head: unknown expert 'numerals'"):
        loaded.as_static(halves, head="numerals")


def test_enhancement_measures_each_expert_by_its_own_head(workspace):
    (workspace / "new.yaml").write_text(yaml.safe_dump(headed_settings()))
    invoke("route", "new.yaml", "new")
    experts = json.loads(Path("new/enhancement.json").read_text())["experts"]
    for trace in (expert["trace"] for expert in experts):
        assert trace[1]["what"] == "original" and trace[1]["loss"] < 10  # of a head that fits; -Inf elsewhere
    with torch.no_grad():
        NeuronRoutedModel.from_pretrained("new")(pixel_values=images(0, 1, 2, 3))


# ------------------------------------------------------------------------------------------ scored


def write_tasks(*tasks):
    common = {"kind": "image-classification"}
    Path("tasks.yml").write_text(yaml.safe_dump({"tasks": [{**common, **task} for task in tasks]}))


def folder(path):
    return {"source": path, "split": "train"}


def score():
    invoke("evaluate", "routed", "--task", "tasks.yml", "-o", "scores.json", "--force", "--quiet")
    lines = Path("scores.examples.jsonl").read_text().splitlines()
    return json.loads(Path("scores.json").read_text()), [json.loads(line) for line in lines]


def test_evaluate_scores_each_task_by_the_head_that_is_chosen(workspace, loaded):
    write_tasks(*({"name": name, "data": folder(f"data/{name}")} for name in HEADS))
    scores, outcomes = score()
    assert len(outcomes) == 12 * sum(SIZES)
    right = {name: [] for name in HEADS}
    processor = transformers.AutoImageProcessor.from_pretrained("base")
    from PIL import Image

    for name, labels in HEADS.items():
        for label in sorted(labels):
            for file in sorted(Path("data", name, label).iterdir()):
                pixels = processor(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]
                with torch.no_grad():
                    right[name].append(loaded(pixel_values=pixels).labels == [label])
    found = {task["name"]: task["score"] for task in scores["tasks"]}
    assert found == pytest.approx({name: sum(values) / len(values) for name, values in right.items()})


def test_numbers_are_labels_of_the_head_that_is_named(workspace):
    rows = [{"image": str(file.resolve()), "label": 1} for file in sorted(Path("data/colours/blue").iterdir())]
    Path("numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "numbers", "data": "numbers.jsonl"}
    write_tasks(task)
    message = error_of("evaluate", "routed", "--task", "tasks.yml")
    assert "task 'numbers': its labels are numbers" in message and "head: NAME (digits, animals, shapes" in message
    write_tasks({**task, "head": "colours"})
    assert {outcome["target"] for outcome in score()[1]} == {"green"}  # the second of blue, green, …
    write_tasks({**task, "head": "numerals"})
    assert "task 'numbers': head: unknown head 'numerals'" in error_of("evaluate", "routed", "--task", "tasks.yml")


def test_a_task_that_no_head_knows_the_labels_of(workspace):
    for label in ("lion", "tiger"):
        shutil.copytree("data/digits/one", f"other/{label}")
    write_tasks({"name": "lions", "data": folder("other")})
    assert "one of the model's" in error_of("evaluate", "routed", "--task", "tasks.yml")
    write_tasks({"name": "lions", "data": folder("data/digits"), "labels": ["lion"]})
    assert "labels: the model routed has no label 'lion'" in error_of("evaluate", "routed", "--task", "tasks.yml")


def test_a_label_of_several_heads_is_the_same_answer(workspace):
    """`one` is the second of two digits and the last of five colours; each is right by its name, in whichever place."""
    content = json.loads(Path("routed/routed_config.json").read_text())
    content["experts"][0]["head_labels"] = ["one", "nought"]  # the same classes in another order
    content["experts"][3]["head_labels"] = ["nought", "two", "three", "four", "one"]
    Path("routed/routed_config.json").write_text(json.dumps(content))
    shutil.copytree("data/digits", "mixed")
    for number, file in enumerate(sorted(Path("data/colours/one").iterdir())):
        shutil.copy(file, f"mixed/one/colour-{number}.png")
    write_tasks({"name": "mixed", "data": folder("mixed")})
    model = NeuronRoutedModel.from_pretrained("routed")
    assert len({model.config.id2label[n] for n in (0, 13)}) == 1
    outcomes = score()[1]
    assert {outcome["target"] for outcome in outcomes} == {"nought", "one"}
    assert all(outcome["score"] == (outcome["prediction"] == outcome["target"]) for outcome in outcomes)


def test_among_the_labels_of_a_task_alone(workspace):
    write_tasks({"name": "animals", "data": folder("data/animals")})
    said = score()[1][0]["prediction"]
    shutil.rmtree(f"data/animals/{said}")
    others = [label for label in HEADS["animals"] if label != said]
    write_tasks({"name": "animals", "data": folder("data/animals"), "labels": others})
    assert {outcome["prediction"] for outcome in score()[1]} <= {*others}
    # A task of other labels than those of the head that is chosen is answered wrong, and by none of its labels.
    write_tasks({"name": "digits", "data": folder("data/digits"), "labels": ["nought", "one"]})
    for name in ("nought", "one"):
        shutil.rmtree(f"data/digits/{name}")
        shutil.copytree(f"data/animals/{others[0]}", f"data/digits/{name}")
    scores, outcomes = score()
    assert scores["tasks"][0]["score"] == 0 and {o["prediction"] for o in outcomes} <= {*HEADS["animals"]}


# ------------------------------------------------------------------------------------------ what is told


def test_generate_names_label_and_head(workspace):
    given = ["--image", "data/digits/one/1.png", "--image", "data/colours/red/0.png"]
    lines = [json.loads(line) for line in invoke("generate", "routed", *given, "--json").output.splitlines()]
    assert [line["head"] for line in lines] == ["digits", "colours"]
    assert all(line["answer"] in HEADS[line["head"]] for line in lines)
    assert "(head: digits)\n" in invoke("generate", "routed", *given).output


def test_verify_counts_heads_and_names_what_is_wrong_with_one(workspace):
    assert "its router and 4 adapters, 4 with heads" in invoke("verify", "routed").output
    file = Path("routed/heads/digits.safetensors")
    whole = load_file(file)
    save_file({key: value[:1].contiguous() for key, value in whole.items()}, file, metadata={"format": "pt"})
    assert "but digits has 2 labels in routed_config.json; route again" in error_of("verify", "routed")
    with pytest.raises(UserError, match=r"digits\.safetensors: 'classifier\.\w+' is of shape .*, expected "):
        NeuronRoutedModel.from_pretrained("routed")
    file.unlink()
    assert "heads/digits.safetensors: missing" in error_of("verify", "routed")
    with pytest.raises(UserError, match=r"heads/digits\.safetensors"):
        NeuronRoutedModel.from_pretrained("routed")


# ------------------------------------------------------------------------------------------ refused


def refused(content):
    Path("new.yaml").write_text(yaml.safe_dump(content))
    message = error_of("route", "new.yaml", "new")
    assert not Path("new").exists() and "new.yaml" in message
    return message


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["a", "b", "c"], "expert 'digits': head_labels: 3 labels, but the adapter's head has 2 classes"),
        (["a", "a"], "expert 'digits': head_labels: a twice"),
    ],
)
def test_labels_that_do_not_fit_the_head(workspace, labels, expected):
    content = headed_settings(**PLAIN)
    content["experts"][0]["head_labels"] = labels
    assert expected in refused(content)


def test_data_with_other_labels_than_the_head_and_names_that_are_given_instead(workspace):
    shutil.rmtree("data/animals/owl")
    content = headed_settings(**PLAIN)
    assert "the labels of its data (head_labels names others): 2 labels, but the adapter's head has 3" in refused(
        content
    )
    content["experts"][1]["head_labels"] = ["owl", "dog", "cat"]
    Path("new.yaml").write_text(yaml.safe_dump(content))
    plan = invoke("route", "new.yaml", "new").output
    assert "\nhead of digits: 2 labels: nought, one\nhead of animals: 3 labels: owl, dog, cat\n" in plan
    assert RoutedConfig.read(Path("new")).experts[1].head_labels == ("owl", "dog", "cat")


@both
def test_labels_for_an_adapter_without_a_head(workspace):
    file = Path("adapters/digits/adapter_model.safetensors")
    tensors = {key: value for key, value in load_file(file).items() if "classifier" not in key}
    save_file(tensors, file, metadata={"format": "pt"})
    config = Path("adapters/digits/adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": None}))
    content = headed_settings(**PLAIN)
    if is_headless(workspace):
        assert "expert digits: it has no head of its own, and neither has the base, a ViTModel" in refused(content)
        return
    content["experts"][0]["head_labels"] = ["a", "b"]
    assert "expert 'digits': head_labels: its adapter stores no head; leave it out" in refused(content)
    del content["experts"][0]["head_labels"]
    content["enhancement"] = {"enabled": False}
    Path("new.yaml").write_text(yaml.safe_dump(content))
    invoke("route", "new.yaml", "new")  # it answers by the base's
    with torch.no_grad():
        assert NeuronRoutedModel.from_pretrained("new")(pixel_values=images(0, 1)).heads == [BASE, "animals"]


def test_what_is_stored_whole_of_the_body(workspace):
    file = Path("adapters/shapes/adapter_model.safetensors")
    tensors = load_file(file)
    tensors["base_model.model.vit.layernorm.weight"] = torch.ones(16)
    save_file(tensors, file, metadata={"format": "pt"})
    assert "it stores vit.layernorm.weight whole, which is of the model's body" in refused(headed_settings(**PLAIN))


def test_half_a_head(workspace):
    file = Path("adapters/shapes/adapter_model.safetensors")
    tensors = {key: value for key, value in load_file(file).items() if not key.endswith("classifier.bias")}
    save_file(tensors, file, metadata={"format": "pt"})
    message = refused(headed_settings(**PLAIN))
    assert "of its head it stores classifier.weight, and not classifier.bias" in message


def test_the_head_of_a_model_that_generates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_workspace("llama", tmp_path)
    save_headed(Path("base"), Path("adapters/colours"), 2, 0, head="lm_head")
    message = refused(settings("llama", **PLAIN))
    assert "it stores the head of a LlamaForCausalLM whole (modules_to_save); only classifiers' heads" in message


def test_one_checkpoint_of_several_heads(workspace):
    message = error_of("route", "routed.yaml", "new", "--static")
    assert "adapter of digits: it brings a head of its own, and one checkpoint has one head" in message


def test_what_was_written_before_there_were_heads_still_loads(made, tmp_path):
    """Format 1 named neither heads nor their class; its redundant layers went by the router's weights."""
    shutil.copytree(made / "routed", tmp_path / "routed")
    file = tmp_path / "routed" / "routed_config.json"
    content = json.loads(file.read_text())
    del content["architecture"]
    for expert in content["experts"]:
        del expert["head_labels"]
    file.write_text(json.dumps({**content, "format_version": 1}))
    model = NeuronRoutedModel.from_pretrained(tmp_path / "routed", base_model=str(made / "base"))
    with torch.no_grad():
        output = model(pixel_values=images(0, 1))
    assert output.logits.shape == (2, 3) and not hasattr(output, "heads")


# ------------------------------------------------------------------------------------------ texts


def test_a_decoder_whose_experts_classify_texts_and_pairs(tmp_path, monkeypatch):
    """GLUE's case: the base generates, and each adapter brings a `score` of its own size."""
    monkeypatch.chdir(tmp_path)
    save_model("llama", Path("base"))
    kind = {"architecture": "LlamaForSequenceClassification", "head": "score", "task_type": "SEQ_CLS"}
    sizes = {"numbers": 2, "colours": 3, "animals": 4}
    experts = []
    for number, (name, size) in enumerate(sizes.items()):
        save_headed(Path("base"), Path("adapters", name), size, number, **kind)
        file = write_topic(Path(f"{name}.jsonl"), name, 40, number)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [
            {"text": row["input"], "second": row["target"], "label": place % size} for place, row in enumerate(rows)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        columns = {"text": "text", "label": "label", **({"pair": "second"} if name == "colours" else {})}
        experts.append({"name": name, "adapter": f"adapters/{name}", "data": {"source": str(file), "columns": columns}})
    router = {"hidden": 16, "epochs": 60, "learning_rate": 0.01, "in_domain_share": 1.0}
    content = {"base_model": "base", "experts": experts, "enhancement": {"samples": 4}, "router": router}
    Path("routed.yaml").write_text(yaml.safe_dump(content))
    plan = invoke("route", "routed.yaml", "routed").output
    assert "\nhead of colours: 3 classes without names (head_labels would name them)\n" in plan
    model = NeuronRoutedModel.from_pretrained("routed")
    tokenizer = transformers.AutoTokenizer.from_pretrained("routed")
    texts = ["two one one two", "red green", "cat dog dog cat"]
    together = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model(**{key: together[key] for key in ("input_ids", "attention_mask")})
        assert output.heads == list(sizes) and output.logits.shape == (3, 9)
        for row, text in enumerate(texts):
            alone = model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"])
            assert torch.allclose(alone.logits[0], output.logits[row], atol=1e-5)
    (line,) = invoke("generate", "routed", "--prompt", "dog cat dog", "--json").output.splitlines()
    assert json.loads(line)["head"] == "animals" and json.loads(line)["answer"].startswith("animals: LABEL_")
    monkeypatch.setattr(NeuronRoutedModel, "from_pretrained", lambda *_, **options: model.to(DEVICE))
    with torch.no_grad(), accelerator():
        (there,) = map(json.loads, answer("routed", prompts=["dog cat dog"], as_json=True))  # and so on a device
    assert there["score"] == pytest.approx(json.loads(line)["score"], abs=1e-5)
    assert {**there, "score": None} == {**json.loads(line), "score": None}
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    task = {"name": "pairs", "kind": "text-classification", "data": "colours.jsonl", "head": "colours"}
    write_tasks({**task, "columns": {"text": "text", "pair": "second"}})
    assert score()[0]["tasks"][0]["count"] == 40
