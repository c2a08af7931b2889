"""The zoo's scripts at a tiny scale: complete, the same for the same seed, kept when run again, clear when wrong."""

import json
import random
import re
import shutil
from pathlib import Path

import common
import glyphs
import llama
import pytest
import scenes
import text_tasks
import torch
import vision_tasks
import vit
from datasets import load_dataset
from safetensors.torch import load_file

from neuron_methods.demo.pipeline import RECORDS, DemoSettings, base_key, expert_key, training_settings
from neuron_methods.demo.questions import build_tasks
from neuron_methods.evaluation import load_tasks, open_model
from neuron_methods.support.errors import UserError
from neuron_methods.support.stages import Stages
from tests.support.zoos import GGUF, SETTINGS, TASKS, adapter_config, build_zoo


@pytest.fixture(scope="module")
def zoos(tmp_path_factory):
    """`zoos("vit")`: (directory, what was said) of a family's zoo with adapters, built once and not to be changed."""
    made = {}

    def zoo_of(family):
        if family not in made:
            out = tmp_path_factory.mktemp("zoo") / family
            made[family] = out, build_zoo(family, out, lora=True)
        return made[family]

    return zoo_of


@pytest.fixture(scope="module", params=SETTINGS)
def zoo(request, zoos):
    """(family, directory, what was said)."""
    return request.param, *zoos(request.param)


def weights(out: Path, place: str) -> dict[str, torch.Tensor]:
    return load_file(next((out / place).glob("*.safetensors")))


def test_holds_what_merging_tuning_and_routing_need(zoo):
    family, out, said = zoo
    tasks = load_tasks(out / "tasks.yml")
    assert tuple(task.name for task in tasks) == TASKS[family]
    for task in tasks:
        counts = {
            split: len(load_dataset(str(out / "data" / task.name), split=split, cache_dir=str(out.parent / "cache")))
            for split in ("train", "validation", "test")
        }
        train = counts.pop("train")
        assert train == 12 or (family == "llama" and train > 400)  # the demo's own
        assert counts == {"validation": 6, "test": 10}
        adapter = adapter_config(out, task.name)
        assert adapter["base_model_name_or_path"] == str(out / "base")
        with open_model(f"{out / 'base'}+{out / 'adapters' / task.name}") as adapted:
            assert adapted.model.config.model_type == family
        base, expert = weights(out, "base"), weights(out, f"experts/{task.name}")
        assert base.keys() == expert.keys()
        assert any(not base[name].equal(expert[name]) for name in base)
    stored = json.loads((out / "checks.json").read_text())
    assert tuple(stored["scores"]["by_task"]) == TASKS[family]
    assert len(stored["met"]) == 3
    assert str(common.Checks(**stored["scores"])) == said[-1]


def test_an_expert_of_the_llama_zoo_is_its_adapter_merged(zoos):
    out, _ = zoos("llama")
    base, (name,) = weights(out, "base"), {"model.layers.0.mlp.up_proj.weight"}
    for task in TASKS["llama"]:
        stored = weights(out, f"adapters/{task}")
        (a,), (b,) = ([t for key, t in stored.items() if f".0.mlp.up_proj.lora_{side}" in key] for side in "AB")
        merged = base[name].float() + 2 * b @ a
        torch.testing.assert_close(weights(out, f"experts/{task}")[name].float(), merged, rtol=2**-7, atol=1e-6)


def test_the_vision_head_is_frozen_and_each_task_has_its_labels(zoos):
    out, _ = zoos("vit")
    tasks = load_tasks(out / "tasks.yml")
    assert [list(task.settings["labels"]) for task in tasks] == [[*range(10)], [*range(10, 20)], [*range(20, 26)]]
    for task in tasks:
        for name in ("classifier.weight", "classifier.bias"):
            assert weights(out, "base")[name].equal(weights(out, f"experts/{task.name}")[name])


def test_run_again_keeps_everything(zoo):
    family, out, _ = zoo
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    said = build_zoo(family, out, lora=True)
    assert all(line.endswith("kept") for line in said[:-1])
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_another_camera_means_other_images_but_the_same_base(zoos, tmp_path, monkeypatch):
    out, _ = zoos("vit")
    shutil.copytree(out, tmp_path / "zoo")
    monkeypatch.setitem(vision_tasks.CAMERA, "contrast", 0.3)
    said = build_zoo("vit", tmp_path / "zoo", checks=False)
    assert "vit: base kept" in said
    assert {"vit: data ...", "vit: experts/shapes ..."} <= set(said)
    pixels = [vit.read_images(place / "data" / "shapes" / "test.parquet")[0] for place in (out, tmp_path / "zoo")]
    assert pixels[1].std() < pixels[0].std()


def test_same_seed_same_zoo_other_seed_another(zoo, tmp_path):
    family, out, _ = zoo
    last = f"experts/{TASKS[family][-1]}"
    build_zoo(family, tmp_path / "same", checks=False)
    build_zoo(family, tmp_path / "other", seed=1, checks=False)
    for name, tensor in weights(out, last).items():
        assert tensor.equal(weights(tmp_path / "same", last)[name]), name
    assert any(not tensor.equal(weights(tmp_path / "other", last)[name]) for name, tensor in weights(out, last).items())
    parts = [(place / "data" / TASKS[family][0] / "test.parquet") for place in (out, tmp_path / "same")]
    assert parts[0].read_bytes() == parts[1].read_bytes()


def test_missing_fonts_name_the_package(tmp_path):
    with pytest.raises(UserError, match=r"NotoSans-Regular.ttf .*apt-get install fonts-noto-core"):
        vit.build_zoo(tmp_path / "zoo", vit.Settings(), fonts=tmp_path, say=lambda line: None)
    assert not (tmp_path / "zoo" / "base").exists()


def test_foreign_directory_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that a zoo's script did not write"):
        build_zoo("t5", tmp_path)


def test_images_are_in_range_and_show_their_class():
    for task in vision_tasks.vision_tasks(("shapes", "textures", "counts"), glyphs.NOTO):
        labels = torch.arange(len(task.classes))
        for paint in (task.paint, task.paint_clean):
            images = paint(labels, common.generator("test"))
            assert images.shape == (len(labels), 3, scenes.IMAGE, scenes.IMAGE)
            assert images.min() >= 0
            assert images.max() <= 1
            # All that is drawn by chance is the same here: what differs is the class.
            others = paint(labels.roll(1), common.generator("test"))
            assert all(not one.equal(other) for one, other in zip(images, others, strict=True))
    discs = scenes.scattered_discs(torch.tensor([1, 6]), common.generator("discs"))
    assert discs[1].sum() > 3 * discs[0].sum()


def test_text_tasks_are_right_and_within_the_vocabulary():
    assert [text_tasks.in_words(number) for number in (0, 13, 40, 99)] == ["zero", "thirteen", "forty", "ninety nine"]
    known = {*text_tasks.vocabulary(), *text_tasks.PREFIXES, *text_tasks.SENTINELS}
    for task in text_tasks.TASKS.values():
        splits = text_tasks.draw(task, {"train": 200, "validation": 20, "test": 50}, 0)
        prompts = [prompt for pairs in splits.values() for prompt, _ in pairs]
        assert len(prompts) == len(set(prompts))
        assert all(prompt.startswith(f"{task.name}: ") for prompt in prompts)
        assert {word for pairs in splits.values() for pair in pairs for text in pair for word in text.split()} <= known
    rng = random.Random(0)
    asked = {task.make(rng)[0] for task in text_tasks.TASKS.values() for _ in range(4000)}
    for make in text_tasks.PRETRAINING:
        for prompt, answer in (make(rng) for _ in range(400)):
            assert {*prompt.split(), *answer.split()} <= known
            assert prompt not in asked
    numbers = {text_tasks.in_words(number): number for number in range(100)}

    def calculate(asked):
        one, sign, other = re.fullmatch("(.+) (plus|minus) (.+)", asked).groups()
        return numbers[one] + (numbers[other] if sign == "plus" else -numbers[other])

    for name, check in {
        "reverse": lambda asked, answer: asked.split() == answer.split()[::-1],
        "sort": lambda asked, answer: [numbers[w] for w in answer.split()] == sorted(numbers[w] for w in asked.split()),
        "opposite": lambda asked, answer: text_tasks.OPPOSITE[asked.split()[1]] == answer.split()[1],
        "sum": lambda asked, answer: calculate(asked) == numbers[answer],
    }.items():
        for prompt, answer in (text_tasks.TASKS[name].make(rng) for _ in range(50)):
            assert check(prompt.partition(": ")[2], answer), (prompt, answer)


def test_at_most_half_of_few_prompts_is_held_out():
    task = text_tasks.TextTask("few", lambda rng: (f"few: {rng.randrange(100)}", "one"))
    splits = text_tasks.draw(task, {"train": 500, "validation": 50, "test": 200}, 0)
    assert {split: len(pairs) for split, pairs in splits.items()} == {"validation": 10, "test": 40, "train": 50}


def test_tokenizer_reads_and_writes_every_answer(zoos):
    out, _ = zoos("t5")
    with open_model(str(out / "base")) as opened:
        tokenizer = opened.processor.tokenizer
        assert len(tokenizer) == opened.model.config.vocab_size
        for text in ("zwölf kühe", "forty two"):
            ids = tokenizer(text).input_ids
            assert ids[-1] == opened.model.config.eos_token_id
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_llama_tests_on_what_was_not_trained_on():
    for task in build_tasks(1, seed=0):
        splits = llama.split_examples(task, llama.Settings(), seed=0)
        assert splits["train"] == list(task.train)
        assert len(splits["validation"]) == 40
        assert len(splits["test"]) > 200
        keys = {example: key for key, example in llama.SOURCES[task.name]()}
        trained = {keys[example] for example in splits["train"]}
        assert not trained & {keys[example] for split in ("validation", "test") for example in splits[split]}
        assert not set(splits["validation"]) & set(splits["test"])


def test_llama_takes_only_what_the_demo_trained_alike(tmp_path):
    key = {"stage": "expert", "training": {"steps": 60}}
    with pytest.raises(UserError, match="has no finished expert german"):
        llama.copy_expert(tmp_path, "german", key, tmp_path / "copy", tmp_path / "base")

    def train(path):
        (path / "adapter").mkdir(parents=True)
        (path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere", "r": 16}')

    Stages(tmp_path / RECORDS, "the demo").run(tmp_path / "experts" / "german", key, train)
    with pytest.raises(UserError, match="was trained with other settings"):
        llama.copy_expert(tmp_path, "german", key | {"task": "german"}, tmp_path / "copy", tmp_path / "base")
    llama.copy_expert(tmp_path, "german", key, tmp_path / "copy", tmp_path / "base")
    config = json.loads((tmp_path / "copy" / "adapter" / "adapter_config.json").read_text())
    assert config == {"base_model_name_or_path": str(tmp_path / "base"), "r": 16}


def test_llama_takes_experts_of_a_full_run_of_the_demo_and_none_of_a_quick_one(zoos, tmp_path):
    out, _ = zoos("llama")
    steps = SETTINGS["llama"].steps
    for full in (False, True):
        demo, zoo = tmp_path / f"demo-{full}", tmp_path / f"zoo-{full}"
        for task in build_tasks(1, seed=0):
            key = expert_key(base_key(GGUF), task, training_settings(task, DemoSettings(full=full, steps=steps)))
            trained = out / "trained" / task.name
            Stages(demo / RECORDS, "the demo").run(
                demo / "experts" / task.name, key, lambda path, trained=trained: shutil.copytree(trained, path) and None
            )
        if full:
            build_zoo("llama", zoo, demo=demo, checks=False)
            taken, trained = (weights(place, "experts/german") for place in (zoo, out))
            assert all(taken[name].equal(trained[name]) for name in trained)
        else:
            with pytest.raises(UserError, match=r"its expert arithmetic was trained .* demo --full, or leave"):
                build_zoo("llama", zoo, demo=demo, checks=False)
