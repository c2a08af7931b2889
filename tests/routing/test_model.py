"""The routed model as its user has it: loaded, called, generating, saved, made static."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from neuron_methods import NeuronRoutedModel
from neuron_methods.routing import is_routed
from neuron_methods.support.errors import UserError
from tests.support.routed import EXPERTS

KINDS = ["llama", "t5", "vit"]
TEXTS = {"numbers": "one two three one two", "colours": "red green blue", "animals": "cat dog dog cat"}
STRANGE = "house and tree or house and"


@pytest.fixture(scope="session")
def loaded(made):
    """`loaded("llama")`: the routed model; nobody changes it."""
    models = {}

    def get(kind):
        if kind not in models:
            models[kind] = NeuronRoutedModel.from_pretrained(made(kind) / "routed")
        return models[kind]

    return get


def batch(made, kind, topics=EXPERTS):
    """One sample of each topic (None: of no topic), as the model takes them."""
    if kind == "vit":
        low = {"numbers": 0.0, "colours": 0.4, "animals": 0.8}
        generator = torch.Generator().manual_seed(0)
        pixels = [
            torch.rand(3, 8, 8, generator=generator) * 0.2 + low[t] if t else torch.tensor([0.0, 1.0]).repeat(3, 8, 4)
            for t in topics
        ]
        return {"pixel_values": torch.stack(pixels) * 2 - 1}
    tokenizer = AutoTokenizer.from_pretrained(made(kind) / "base")
    texts = [TEXTS[t] if t else STRANGE for t in topics]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    inputs = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    if kind == "t5":
        inputs["decoder_input_ids"] = torch.zeros(len(topics), 1, dtype=torch.long)
    return inputs


def row(inputs, index):
    return {key: value[index : index + 1] for key, value in inputs.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_gives_sample_by_sample_what_each_gives_alone(made, loaded, kind):
    model = loaded(kind)
    inputs = batch(made, kind, (*EXPERTS, None))
    with torch.no_grad():
        together, routing = model(**inputs, return_routing=True)
        assert [experts[:1] for experts in routing.experts] == [["numbers"], ["colours"], ["animals"], []]
        for i in range(4):
            alone, one = model(**row(inputs, i), return_routing=True)
            assert torch.allclose(together.logits[i], alone.logits[0], atol=1e-5)
            assert torch.allclose(routing.coefficients[i], one.coefficients[0], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_out_of_domain_is_the_base_model(made, loaded, kind):
    from neuron_methods.routing.base import load_base

    model = loaded(kind)
    inputs = batch(made, kind, (None,))
    with torch.no_grad():
        output, routing = model(**inputs, return_routing=True)
        expected = load_base(str(made(kind) / "base"), "base")(**inputs)
    assert not routing.in_domain.any() and routing.scores[0] < routing.threshold
    assert torch.equal(output.logits, expected.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_core_layers_are_the_experts_and_redundant_ones_the_others(made, loaded, kind):
    """Against the merge by hand of what the files hold."""
    model = loaded(kind)
    inputs = batch(made, kind)
    stored = json.loads((made(kind) / "routed" / "routed_config.json").read_text())
    redundant = [set(expert["redundant_layers"]) for expert in stored["experts"]]
    assert any(redundant)
    with torch.no_grad():
        output, routing = model(**inputs, return_routing=True)
    for i in range(3):
        coefficients = torch.zeros(len(model.mixer.layers), 3)
        for number, layer in enumerate(model.mixer.layers):
            if layer not in redundant[i]:
                coefficients[number, i] = 1
            else:
                here = [e for e in range(3) if e != i and layer not in redundant[e]]
                others = routing.weights[i, here]
                coefficients[number, here] = others / others.sum() if others.any() else others
        plain = model.as_static(coefficients)
        with torch.no_grad():
            assert torch.allclose(plain(**row(inputs, i)).logits[0], output.logits[i], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generate_routes_once_on_the_prompt_and_holds(made, loaded, kind, monkeypatch):
    model = loaded(kind)
    inputs = batch(made, kind)
    inputs.pop("decoder_input_ids", None)
    calls = []
    route = NeuronRoutedModel.route
    monkeypatch.setattr(NeuronRoutedModel, "route", lambda self, **given: calls.append(1) or route(self, **given))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    output, routing = model.generate(**inputs, **options, return_routing=True)
    assert len(calls) == 1
    for i in range(3):
        plain = model.as_static(routing.coefficients[i])
        assert torch.equal(plain.generate(**row(inputs, i), **options)[0], output[i])


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_beams_and_several_sequences_follow_their_prompt(made, loaded, kind):
    model = loaded(kind)
    inputs = batch(made, kind)
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    together = model.generate(**inputs, **options)
    assert len(together) == 6
    for i in range(3):
        alone = model.generate(**row(inputs, i), **options)
        width = min(alone.shape[1], together.shape[1])
        assert torch.equal(alone[:, :width], together[2 * i : 2 * i + 2, :width])


def test_a_routing_can_be_made_first_and_used_for_more(made, loaded):
    model = loaded("llama")
    inputs = batch(made, "llama")
    routing = model.route(**inputs)
    longer = {key: torch.cat((value, torch.ones(3, 2, dtype=torch.long)), dim=1) for key, value in inputs.items()}
    _, held = model(**longer, routing=routing, return_routing=True)
    assert held is routing
    with pytest.raises(UserError, match="give the prompt's routing"):
        model(**inputs, past_key_values=object())


def test_padding_is_told_by_its_id_where_no_mask_is_given(made, loaded):
    model = loaded("llama")
    inputs = batch(made, "llama")
    assert torch.allclose(model.route(input_ids=inputs["input_ids"]).scores, model.route(**inputs).scores, atol=1e-5)


def test_as_static_is_the_plain_merge_and_leaves_the_routed_model_alone(made, loaded):
    model = loaded("llama")
    inputs = batch(made, "llama")
    before = model(**inputs).logits
    plain = model.as_static({"numbers": 0.5, "animals": 0.25})
    assert not any("lora" in name for name, _ in plain.named_parameters())
    with torch.no_grad(), model.mixer.using(model.mixer.uniform(torch.tensor([0.5, 0, 0.25]))):
        expected = model.base(**inputs).logits
    assert torch.allclose(plain(**inputs).logits, expected, atol=1e-5)
    assert torch.equal(model(**inputs).logits, before)
    with pytest.raises(UserError, match="no expert 'math'"):
        model.as_static({"math": 1.0})
    with pytest.raises(UserError, match="expected"):
        model.as_static(torch.ones(3))


def test_as_static_saves_and_loads_as_any_model(made, loaded, tmp_path):
    from transformers import AutoModelForCausalLM

    plain = loaded("llama").as_static({"numbers": 1.0})
    plain.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    inputs = batch(made, "llama")
    assert torch.allclose(again(**inputs).logits, plain(**inputs).logits, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(made, loaded, tmp_path, kind):
    model = loaded(kind)
    model.save_pretrained(tmp_path / "again")
    assert is_routed(tmp_path / "again")
    assert not json.loads((tmp_path / "again" / "routed_config.json").read_text())["base_model"].startswith("/")
    again = NeuronRoutedModel.from_pretrained(tmp_path / "again")
    inputs = batch(made, kind)
    with torch.no_grad():
        one, first = model(**inputs, return_routing=True)
        two, second = again(**inputs, return_routing=True)
    assert torch.equal(one.logits, two.logits) and torch.equal(first.coefficients, second.coefficients)


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"device_map": "cpu"}, {"dtype": "float32"}])
def test_placed_by_a_device_map_it_computes_the_same(made, loaded, options):
    inputs = batch(made, "llama")
    placed = NeuronRoutedModel.from_pretrained(made("llama") / "routed", **options)
    there = {name: values.to(placed.device) for name, values in inputs.items()}
    found, expected = placed(**there).logits.cpu(), loaded("llama")(**inputs).logits
    assert torch.allclose(found, expected, rtol=0, atol=0 if placed.device.type == "cpu" else 1e-5)


def test_base_and_routed_model_move_together_and_a_lost_base_is_named(made, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("base", "routed"):
        shutil.copytree(made("llama") / name, folder / name)
    assert NeuronRoutedModel.from_pretrained(folder / "routed").base_reference == str(folder / "base")
    (folder / "base").rename(folder / "moved")
    with pytest.raises(UserError, match=r"its base model was the directory \.\./base, which is not there"):
        NeuronRoutedModel.from_pretrained(folder / "routed")
    NeuronRoutedModel.from_pretrained(folder / "routed", base_model=str(folder / "moved"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format_version": 3}, "format_version 3 is not known here"),
        ({"format": "other"}, "its format is not 'mergekit-neuron-routed'"),
        ({"experts": [{}]}, r"routed_config.json: experts\[0\].name: missing"),
        (None, "not valid JSON"),
    ],
)
def test_what_is_no_routed_model_is_refused(made, tmp_path, change, expected):
    folder = tmp_path / "routed"
    shutil.copytree(made("llama") / "routed", folder)
    file = folder / "routed_config.json"
    content = json.loads(file.read_text())
    file.write_text("{" if change is None else json.dumps({**content, **change}))
    with pytest.raises(UserError, match=expected):
        NeuronRoutedModel.from_pretrained(folder)


def test_missing_and_damaged_files_are_named(made, tmp_path):
    assert not is_routed(tmp_path)
    with pytest.raises(UserError, match=r"no routed_config\.json in it"):
        NeuronRoutedModel.from_pretrained(tmp_path)
    folder = tmp_path / "routed"
    shutil.copytree(made("llama") / "routed", folder)
    (folder / "router.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"router\.safetensors: cannot be read"):
        NeuronRoutedModel.from_pretrained(folder, base_model=str(made("llama") / "base"))


def test_a_prompt_longer_than_the_context_is_refused(made):
    model = NeuronRoutedModel.from_pretrained(made("llama") / "routed")
    model.config.max_position_embeddings = 6
    ids = torch.full((1, 7), 5)
    with pytest.raises(UserError, match="the prompt is 7 tokens long, and the context of LlamaForCausalLM has 6"):
        model.route(input_ids=ids)
    with pytest.raises(UserError, match="the prompt is 6 tokens long"):
        model.generate(ids[:, :6])


def test_an_image_classifier_generates_nothing(loaded):
    with pytest.raises(UserError, match="classifies images and generates nothing"):
        loaded("vit").generate(pixel_values=torch.zeros(1, 3, 8, 8))


def test_push_to_hub_uploads_what_is_saved(made, loaded, monkeypatch):
    import huggingface_hub

    model = loaded("llama")
    with pytest.raises(UserError, match="name its repository: base_model="):
        model.push_to_hub("me/routed")
    seen = {}

    def upload_folder(*, repo_id, folder_path, **options):
        seen.update(json.loads((Path(folder_path) / "routed_config.json").read_text()), repo=repo_id)
        return type("Done", (), {"commit_url": "address"})

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo_id, **options: seen.update(options))
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    assert model.push_to_hub("me/routed", base_model="me/base", private=True) == "address"
    assert (seen["base_model"], seen["repo"], seen["private"]) == ("me/base", "me/routed", True)
