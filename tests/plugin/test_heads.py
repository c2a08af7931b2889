"""Heads of different sizes: bodies merged, held against arithmetic on what transformers loads; every choice of head."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from neuron_methods.models.verification import verify_model
from neuron_methods.plugin.adapter_output import AdapterOutput
from neuron_methods.plugin.describe import describe_plan
from neuron_methods.plugin.merging import MergeSummary, merge_to_directory, plan_merge
from neuron_methods.sharing.publishing import merge_witness
from neuron_methods.support.errors import UserError
from tests.support.checkpoints import edit
from tests.support.kinds import build_kind

CARS, DIGITS = ["audi", "bmw", "vw"], ["one", "two", "three", "four", "five"]
WEIGHTS = {"cars": 0.5, "digits": 0.25}
CLASSIFIERS = (
    "vit-classifier",
    "dinov2-classifier",
    "resnet",
    "convnext",
    "swin",
    "bert-classifier",
    "distilbert-classifier",
    "llama-classifier",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(name: str, kind: str, seed: int, labels: Sequence[str] | None = None, **changes: Any) -> nn.Module:
    if labels is not None:
        changes |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    model = build_kind(kind, seed, **changes)
    model.save_pretrained(name)
    return model


def save_classifiers(kind: str) -> None:
    save("base", kind, 0, ["yes", "no"])
    save("cars", kind, 1, CARS)
    save("digits", kind, 2, DIGITS)


def save_body(name: str, kind: str, seed: int, cls: str) -> None:
    """The backbone of a kind, by its own class, poolers included."""
    config = build_kind(kind, seed).config
    model = getattr(transformers, cls)(config)
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator) + 0.1
    model.save_pretrained(name)


def source(method: str = "task_arithmetic", base: str = "base", **keys: Any) -> str:
    models = [{"model": name, "parameters": {"weight": weight}} for name, weight in WEIGHTS.items()]
    return yaml.safe_dump({"merge_method": method, "base_model": base, "models": models, **keys}, sort_keys=False)


def merge(head: str | None = None, yml: str | None = None, out: str = "out", **options: Any) -> MergeSummary:
    return merge_to_directory(yml or source(), out, head=head, progress=False, force=True, **options)


def load(path: str, **options: Any) -> nn.Module:
    """By the class that its config names, with nothing missing, left over or of another shape."""
    (architecture,) = json.loads((Path(path) / "config.json").read_text())["architectures"]
    model, found = getattr(transformers, architecture).from_pretrained(path, output_loading_info=True, **options)
    assert not any(found.values()), found
    return model.eval()


def body_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.base_model.state_dict())


def heads_of(model: nn.Module) -> dict[str, Tensor]:
    prefix = f"{model.base_model_prefix}."
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefix)}


def expected_body(base: str = "base") -> dict[str, Tensor]:
    """base + 0.5 (cars − base) + 0.25 (digits − base), of what all have; norms' statistics by the weights' shares."""
    bodies = {name: body_of(load(name)) for name in (base, *WEIGHTS)}
    shared = set.intersection(*(set(body) for body in bodies.values()))
    origin = bodies[base]
    return {
        name: (2 * bodies["cars"][name] + bodies["digits"][name]) / 3
        if ".running_" in name
        else origin[name] + sum(w * (bodies[expert][name] - origin[name]) for expert, w in WEIGHTS.items())
        for name in shared
        if origin[name].is_floating_point()
    }


def check_body(model: nn.Module, base: str = "base") -> None:
    found, expected = body_of(model), expected_body(base)
    assert len(expected) > 20
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return bool(one) and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def labels_of(path: str | Path) -> list[str]:
    return list(json.loads(Path(path).read_text()).get("id2label", {}).values())


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    if model.main_input_name == "pixel_values":
        side = getattr(model.config, "image_size", 8)
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * side * side).reshape(2, 3, side, side)}
    return {"input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])}


# --- the choices


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_the_head_is_that_of_the_chosen_model(kind: str) -> None:
    save_classifiers(kind)
    for choice, labels in (("base", ["yes", "no"]), ("cars", CARS), ("./digits", DIGITS)):
        summary = merge(choice)
        model = load("out")
        assert type(model).__name__ == type(load("cars")).__name__
        assert equal(heads_of(model), heads_of(load(choice)))
        assert labels_of("out/config.json") == labels
        assert any(listed in note for note in summary.notes for listed in [", ".join(labels[:2])])
        check_body(model)
        verify_model(Path("out"))


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_without_a_head_the_output_is_the_backbone(kind: str) -> None:
    save_classifiers(kind)
    summary = merge("drop")
    architecture = type(load("cars").base_model).__name__
    config = json.loads(Path("out/config.json").read_text())
    assert config["architectures"] == [architecture]
    assert not config.keys() & {"id2label", "label2id", "num_labels", "problem_type"}
    poolerless = any("add_pooling_layer=False" in note for note in summary.notes)
    model = load("out", **({"add_pooling_layer": False} if poolerless else {}))
    assert poolerless == (kind == "vit-classifier")
    check_body(model)
    prefix = f"{model.base_model_prefix}."
    assert not any(name.startswith(prefix) for name in load_file("out/model.safetensors"))
    assert not Path("out/heads").exists()
    verify_model(Path("out"))


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_every_experts_head_is_kept_and_attaches_as_the_card_says(kind: str) -> None:
    save_classifiers(kind)
    merge("keep", witness=merge_witness())
    assert sorted(path.name for path in Path("out/heads").iterdir()) == sorted(
        f"{name}.{suffix}" for name in WEIGHTS for suffix in ("json", "safetensors")
    )
    card = Path("out/README.md").read_text()
    for name, labels in (("cars", CARS), ("digits", DIGITS)):
        assert labels_of(f"out/heads/{name}.json") == labels
        assert ", ".join(labels) in card
        attached = run_snippet(card, name).eval()
        assert list(attached.config.id2label.values()) == labels
        # By hand: the expert itself, its backbone replaced by what the merge has to be.
        expert = load(name)
        expert.base_model.load_state_dict(expected_body(), strict=False)
        assert equal(heads_of(attached), heads_of(expert))
        with torch.no_grad():
            found, wanted = (model(**inputs_of(model)).logits for model in (attached, expert))
        assert found.shape[-1] == len(labels)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert "with a head in heads/ it is a whole model: cars, digits" in verify_model(Path("out")).notes


def run_snippet(card: str, head: str) -> Any:
    """Run the card's code in the output's directory, with another of the heads."""
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "load_state_dict" in block)
    scope: dict[str, Any] = {}
    code = block.replace('"."', '"out"').replace("heads/cars", f"heads/{head}")
    assert len([line for line in block.splitlines() if "place" in line and "place =" not in line]) == 3
    exec(code, scope)
    return scope["model"]


@pytest.mark.parametrize("method", ["neuro_merging", "min_merging", "ties", "linear"])
def test_every_method_sees_the_bodies_alone(method: str) -> None:
    save_classifiers("vit-classifier")
    bodies = {name: load(name).base_model for name in ("base", *WEIGHTS)}
    for name, body in bodies.items():
        body.save_pretrained(f"bodies/{name}")
    content = yaml.safe_load(source(method))
    if method == "linear":
        del content["base_model"]
    merge("cars", yaml.safe_dump(content))
    alone = {**content, "models": [{**entry, "model": f"bodies/{entry['model']}"} for entry in content["models"]]}
    alone |= {"base_model": "bodies/base"} if method != "linear" else {}
    merge(None, yaml.safe_dump(alone), "alone")
    found, expected = load_file("out/model.safetensors"), load_file("alone/model.safetensors")
    head = heads_of(load("cars"))
    assert found.keys() == {f"vit.{name}" for name in expected} | head.keys()
    for name, tensor in expected.items():  # sums over all tensors come out in another order
        torch.testing.assert_close(found[f"vit.{name}"], tensor, rtol=1e-6, atol=1e-6, msg=name)


# --- backbones and classifiers together


@pytest.mark.parametrize(
    ("kind", "cls", "pooler"),
    [
        ("vit-classifier", "ViTModel", "pooler.dense.weight"),
        ("dinov2-classifier", "Dinov2Model", None),
        ("bert-classifier", "BertModel", None),
        ("resnet", "ResNetModel", None),
    ],
)
def test_a_backbone_as_base_of_classifiers(kind: str, cls: str, pooler: str | None) -> None:
    save_classifiers(kind)
    save_body("in21k", kind, 7, cls)
    summary = merge(None, source(base="in21k"))
    model = load("out")
    assert type(model).__name__ == cls
    check_body(model, "in21k")
    told = "\n".join(summary.notes)
    assert "heads left out: cars (audi, bmw, vw), digits (one, two, three and 2 more)" in told
    if pooler is not None:  # no classifier has one
        assert torch.equal(body_of(model)[pooler], body_of(load("in21k"))[pooler])
        assert f"unchanged from in21k, as not all models store them: pooler.dense.bias, {pooler}" in told
    merge("digits", source(base="in21k"))
    model = load("out")
    assert equal(heads_of(model), heads_of(load("digits")))
    assert labels_of("out/config.json") == DIGITS
    check_body(model, "in21k")
    with pytest.raises(
        UserError, match=rf"--head base: in21k is a {cls}, without a head; name an expert, drop or keep"
    ):
        merge("base", source(base="in21k"))


def test_a_classifier_as_base_of_backbones() -> None:
    save("base", "vit-classifier", 0, ["yes", "no"])
    save_body("cars", "vit-classifier", 1, "ViTModel")
    save_body("digits", "vit-classifier", 2, "ViTModel")
    summary = merge()
    model = load("out")
    assert equal(heads_of(model), heads_of(load("base")))
    assert labels_of("out/config.json") == ["yes", "no"]
    check_body(model)
    assert any("pooler.dense.bias, pooler.dense.weight of cars" in note for note in summary.notes)
    with pytest.raises(UserError, match="--head cars: cars is a ViTModel, without a head"):
        merge("cars")
    with pytest.raises(UserError, match="--head keep: no expert has a head"):
        merge("keep")


def test_a_masked_language_model_as_base_of_classifiers() -> None:
    save("base", "bert-masked", 0)
    save("cars", "bert-classifier", 1, CARS)
    save("digits", "bert-classifier", 2, DIGITS)
    edit(Path("base"), lambda tensors: tensors.update({"cls.seq_relationship.bias": torch.zeros(2)}))
    summary = merge("cars")
    model = load("out")
    assert equal(heads_of(model), heads_of(load("cars")))
    # The pooler, which the base has not, came with the head.
    for name in ("pooler.dense.weight", "pooler.dense.bias"):
        assert torch.equal(body_of(model)[name], body_of(load("cars"))[name])
    check_body_against_masked(model)
    assert any("cls.seq_relationship.bias" in note for note in summary.notes)
    merge("keep", witness=merge_witness())
    attached = run_snippet(Path("out/README.md").read_text(), "digits")
    assert torch.equal(body_of(attached)["pooler.dense.weight"], body_of(load("digits"))["pooler.dense.weight"])


def check_body_against_masked(model: nn.Module) -> None:
    base = transformers.BertForMaskedLM.from_pretrained("base").base_model.state_dict()
    experts = {name: body_of(load(name)) for name in WEIGHTS}
    for name, tensor in base.items():
        expected = tensor + sum(w * (experts[expert][name] - tensor) for expert, w in WEIGHTS.items())
        torch.testing.assert_close(body_of(model)[name], expected, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("head", [None, "keep", "base"])
def test_two_families_are_refused(head: str | None) -> None:
    save("base", "vit-classifier", 0)
    save("cars", "dinov2-classifier", 1, CARS)
    save("digits", "dinov2-classifier", 2, DIGITS)
    with pytest.raises(UserError, match=r"base is a ViTForImageClassification, cars is a Dinov2ForImageClassification"):
        merge(head)


# --- without the option


def test_heads_that_differ_in_shape_are_refused_with_the_option() -> None:
    save_classifiers("vit-classifier")
    with pytest.raises(UserError) as caught:
        merge()
    assert str(caught.value) == (
        "classifier.weight: the heads differ in shape: base has [2, 16], cars has [3, 16]; say what becomes of them: "
        "--head base, --head EXPERT (a model of the YAML), --head drop, or --head keep (each in a file of its own)"
    )
    assert not Path("out").exists()


def test_heads_of_one_shape_are_merged_and_other_labels_told() -> None:
    save("base", "vit-classifier", 0, num_labels=3)
    save("cars", "vit-classifier", 1, CARS)
    save("digits", "vit-classifier", 2, ["one", "two", "three"])
    summary = merge()
    assert summary.notes == [
        "heads for different labels are merged: cars (audi, bmw, vw), digits (one, two, three); --head keep, drop, "
        "base or EXPERT merges the bodies alone"
    ]
    heads = [heads_of(load(name)) for name in ("base", *WEIGHTS)]
    expected = {n: t + 0.5 * (heads[1][n] - t) + 0.25 * (heads[2][n] - t) for n, t in heads[0].items()}
    for name, tensor in heads_of(load("out")).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)
    save("digits", "vit-classifier", 2, CARS)
    assert merge().notes == []


# --- choices that cannot be


def test_a_choice_that_names_no_head_is_refused() -> None:
    save_classifiers("vit-classifier")
    with pytest.raises(UserError, match=r"--head: unknown choice 'digit'; did you mean 'digits'\?"):
        merge("digit")
    linear = yaml.safe_load(source("linear"))
    del linear["base_model"]
    with pytest.raises(UserError, match="--head base: the configuration names no base_model; name one of its models"):
        merge("base", yaml.safe_dump(linear))
    save("a/model", "vit-classifier", 1, CARS)
    save("b/model", "vit-classifier", 2, DIGITS)
    alike = yaml.safe_dump(
        {**yaml.safe_load(source()), "models": [{"model": f"{x}/model", "parameters": {"weight": 1}} for x in "ab"]}
    )
    with pytest.raises(UserError, match="--head model: a/model, b/model are called so; name one as the YAML does"):
        merge("model", alike)
    merge("a/model", alike)
    assert labels_of("out/config.json") == CARS
    merge("keep", alike)
    assert sorted(path.stem for path in Path("out/heads").glob("*.json")) == ["a", "b"]


def test_models_without_heads_have_none_to_choose() -> None:
    for seed, name in enumerate(("base", *WEIGHTS)):
        save_body(name, "bert-classifier", seed, "BertModel")
    with pytest.raises(UserError, match="--head drop: none of the models has a head: base is a BertModel"):
        merge("drop")


@pytest.mark.parametrize("head", ["cars", "keep"])
def test_a_head_with_nan_is_refused_by_name(head: str) -> None:
    save_classifiers("vit-classifier")
    edit(Path("cars"), lambda tensors: tensors["classifier.bias"].__setitem__(0, float("nan")))
    with pytest.raises(UserError, match=r"classifier.bias: NaN or Inf in cars; use a sound checkpoint"):
        merge(head)
    assert not Path("out").exists()
    merge(head, allow_nonfinite=True)


def test_a_head_with_a_row_per_token_needs_its_tokenizer() -> None:
    save("base", "gpt-neox", 0)
    for seed, name in enumerate(WEIGHTS, 1):
        save(name, "gpt-neox", seed)
    with pytest.raises(UserError, match=r"tokenizer: the head embed_out.weight of base has a row per token"):
        merge("base", source(tokenizer={"source": "base"}))
    merge("drop")
    assert type(load("out")).__name__ == "GPTNeoXModel"


# --- what is written


def test_dtype_layers_and_labels_of_the_output() -> None:
    save_classifiers("bert-classifier")
    slices = [
        {"sources": [{"model": name, "layer_range": span} for name in ("base", *WEIGHTS)]} for span in ([0, 2], [1, 3])
    ]
    content = yaml.safe_load(source(dtype="bfloat16"))
    del content["models"]
    merge("keep", yaml.safe_dump({**content, "slices": slices, "parameters": {"weight": 0.5}}))
    for file in ("out/config.json", "out/heads/cars.json"):
        config = json.loads(Path(file).read_text())
        assert (config["num_hidden_layers"], config["dtype"]) == (4, "bfloat16")
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file("out/model.safetensors").values())
    # Kept as the expert has them.
    assert all(tensor.dtype == torch.float32 for tensor in load_file("out/heads/cars.safetensors").values())
    merge("cars", yaml.safe_dump({**content, "slices": slices, "parameters": {"weight": 0.5}}))
    model = load("out")
    assert model.config.num_hidden_layers == 4 and model.classifier.weight.dtype == torch.bfloat16


def test_the_plan_says_what_becomes_of_the_heads() -> None:
    save_classifiers("vit-classifier")
    told = describe_plan(plan_merge(source(), head="keep"))
    assert "bodies merged: a ViTModel without a head" in told
    assert "heads/cars.safetensors of cars (audi, bmw, vw)" in told
    assert "heads left out: base (yes, no)" in told
    told = describe_plan(plan_merge(source(), head="cars"))
    assert "heads: 1 tensor, 48 parameters" in told
    assert "a ViTForImageClassification with the head of cars (audi, bmw, vw)" in told


def test_the_record_of_a_merge_merges_again_to_the_same() -> None:
    save_classifiers("vit-classifier")
    merge("keep", witness=merge_witness())
    recorded = Path("out/mergekit_config.yml").read_text()
    assert recorded == f"# mergekit-neuron merge --head keep\n{source()}"
    merge(None, recorded, "again", witness=merge_witness())
    for name in ("model.safetensors", "heads/cars.safetensors", "mergekit_config.yml"):
        assert (Path("out") / name).read_bytes() == (Path("again") / name).read_bytes()
    merge("cars", recorded, "other", witness=merge_witness())
    assert Path("other/mergekit_config.yml").read_text() == f"# mergekit-neuron merge --head cars\n{source()}"


def test_a_head_that_is_damaged_is_found_by_verify() -> None:
    save_classifiers("vit-classifier")
    merge("keep")
    edit_head = load_file("out/heads/cars.safetensors")
    del edit_head["classifier.bias"]
    save_file(edit_head, "out/heads/cars.safetensors")
    with pytest.raises(UserError, match=r"heads/cars.safetensors: ViTForImageClassification does not get classifier"):
        verify_model(Path("out"))


# --- adapters


def train_adapter(name: str, labels: int, seed: int, cls: str = "ViTForImageClassification", **options: Any) -> Any:
    """An adapter with a head of its own on `base`, whatever head that has; returns peft's model."""
    model = getattr(transformers, cls).from_pretrained(
        "base", num_labels=labels, ignore_mismatched_sizes=True, attn_implementation="eager"
    )
    heads = sorted({path.partition(".")[0] for path in heads_of(model)})
    targets = ["q_proj", "v_proj"] if "ViT" in cls or "Llama" in cls else ["query", "value"]
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=heads, **options)
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    wrapped.save_pretrained(name)
    return wrapped.eval()


@pytest.mark.parametrize("base", ["ViTModel", "ViTForImageClassification"])
def test_the_head_of_an_adapter_is_the_one_it_was_trained_with(base: str) -> None:
    if base == "ViTModel":
        save_body("base", "vit-classifier", 0, base)
    else:
        save("base", "vit-classifier", 0, num_labels=2)
    cars, _ = train_adapter("cars", 3, 1), train_adapter("digits", 5, 2)
    content = yaml.safe_load(source())
    content["models"] = [
        {"model": "base+cars", "parameters": {"weight": 1.0}},
        {"model": "digits", "parameters": {"weight": 0.0}},
    ]
    yml = yaml.safe_dump(content)
    merge("cars", yml)
    model = load("out", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(
            model(**inputs_of(model)).logits, cars(**inputs_of(model)).logits, rtol=1e-5, atol=1e-5
        )
    merge("keep", yml, witness=merge_witness())
    attached = run_snippet(Path("out/README.md").read_text(), "digits")
    assert torch.equal(
        attached.classifier.weight, load_file("digits/adapter_model.safetensors")["base_model.model.classifier.weight"]
    )
    if base == "ViTModel":
        assert any("heads left out: base+cars (3 labels" in note for note in merge(None, yml).notes)
    else:
        with pytest.raises(UserError, match="the heads differ in shape: base has"):
            merge(None, yml)


def test_an_adapter_by_its_task_brings_its_head() -> None:
    save_body("base", "bert-classifier", 0, "BertModel")
    trained = train_adapter("cars", 3, 1, "BertForSequenceClassification", task_type="SEQ_CLS")
    content = {**yaml.safe_load(source()), "models": [{"model": "cars", "parameters": {"weight": 1.0}}]}
    merge("cars", yaml.safe_dump(content))
    model = load("out", attn_implementation="eager")
    assert type(model).__name__ == "BertForSequenceClassification"
    with torch.no_grad():
        torch.testing.assert_close(
            model(**inputs_of(model)).logits, trained(**inputs_of(model)).logits, rtol=1e-5, atol=1e-5
        )


def test_a_merge_as_adapter_changes_the_body_alone() -> None:
    save_classifiers("vit-classifier")
    merge("base")
    expected = load("out")
    merge("base", out="adapter", output=AdapterOutput())
    model = peft.PeftModel.from_pretrained(load("base"), "adapter").merge_and_unload()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("base", ["LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification"])
@pytest.mark.parametrize("head", [None, "cars"])
def test_the_first_of_adapters_without_base_model_gives_its_class_and_head(base: str, head: str | None) -> None:
    save_body("base", "llama-classifier", 0, base)
    trained = train_adapter("cars", 3, 1, "LlamaForSequenceClassification", task_type="SEQ_CLS")
    train_adapter("digits", 3, 2, "LlamaForSequenceClassification", task_type="SEQ_CLS")
    models = [{"model": f"base+{n}", "parameters": {"weight": w}} for n, w in {"cars": 1.0, "digits": 0.0}.items()]
    yml = yaml.safe_dump({"merge_method": "linear", "models": models, "dtype": "float32"})
    notes = merge(head, yml).notes
    assert any("a LlamaForSequenceClassification with the head of base+cars (3 labels" in note for note in notes)
    assert any("heads left out: base+digits (3 labels" in note for note in notes)
    model = load("out")
    assert type(model).__name__ == "LlamaForSequenceClassification"
    with torch.no_grad():
        torch.testing.assert_close(
            model(**inputs_of(model)).logits, trained(**inputs_of(model)).logits, rtol=1e-5, atol=1e-5
        )
    notes = merge(head, yml, out="adapter", output=AdapterOutput()).notes
    assert not any("with the head of" in note for note in notes)
    assert any("heads left out" in note and "base+cars (3 labels" in note for note in notes)
