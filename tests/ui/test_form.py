"""The form and the YAML beside it: each follows the other, and parameters are those of the methods' own specs."""

from __future__ import annotations

import pytest
import yaml
from mergekit.merge_methods import registry

from neuron_methods.support.errors import UserError
from neuron_methods.ui.form import Form, fields_of, methods, read_form, with_models, with_setting
from neuron_methods.ui.sheet import Sheet

EXPERTS = ["a", "b"]
START = with_models("", "base", EXPERTS, "neuro_merging", "bfloat16")


def asked(method, name):
    return next(field for field in fields_of(method) if field.name == name)


def test_every_parameter_of_every_method_has_a_field_with_what_its_spec_says():
    known = methods()
    assert next(iter(known)) in ("neuron_response", "neuro_merging", "min_merging", "neuron_merge")
    assert set(known) == {method.spec.name for method in registry.registered_methods()}
    for name, method in known.items():
        fields = fields_of(name)
        assert [field.name for field in fields] == [parameter.name for parameter in method.spec.parameters]
        for field, parameter in zip(fields, method.spec.parameters, strict=True):
            assert (parameter.description or "") in field.about
            assert field.each == (parameter.scope.value != "shared")


def test_a_field_tells_range_words_and_default():
    assert asked("neuro_merging", "density").about.endswith("; a number in (0, 1]; default 0.15")
    assert "a finite number or auto or norm; default auto" in asked("neuro_merging", "lambda_orthogonal").about
    assert asked("neuro_merging", "trim").words == ("model", "tensor", "differing")
    assert asked("ties", "weight").about == "a finite number; needed"
    assert asked("ties", "normalize").words == ("true", "false")


def test_the_form_writes_a_yaml():
    text = with_setting(with_setting(START, "density", "0.2, 0.3"), "trim", "tensor")
    assert yaml.safe_load(text) == {
        "merge_method": "neuro_merging",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"density": 0.2}},
            {"model": "b", "parameters": {"density": 0.3}},
        ],
        "parameters": {"trim": "tensor"},
        "dtype": "bfloat16",
    }
    assert list(yaml.safe_load(text)) == ["merge_method", "base_model", "models", "parameters", "dtype"]
    assert read_form(text) == Form(
        "neuro_merging", "base", ("a", "b"), "bfloat16", (("trim", "tensor"), ("density", "0.2, 0.3"))
    )


@pytest.mark.parametrize("value", ["0.15", "0.150", ""])
def test_what_is_at_its_default_is_left_out(value):
    assert with_setting(with_setting(START, "density", "0.5"), "density", value) == START


def test_a_text_that_looks_like_a_number_stays_a_text():
    text = with_models("", "base", EXPERTS, "neuron_merge", "")
    assert [m["parameters"]["group"] for m in yaml.safe_load(with_setting(text, "group", "1, 2"))["models"]] == [
        "1",
        "2",
    ]


def test_other_than_one_value_or_one_each_is_refused():
    with pytest.raises(UserError, match="density: 3 values for 2 experts; give one value, or one for each"):
        with_setting(START, "density", "1, 2, 3")


def test_what_the_form_does_not_know_stays():
    text = START + "tokenizer: {source: union}\n"
    text = with_setting(text, "density", "0.2, 0.3")
    changed = yaml.safe_load(with_models(text, "base", ["b", "c"], "neuro_merging", "bfloat16"))
    assert changed["tokenizer"] == {"source": "union"}
    assert changed["models"] == [{"model": "b", "parameters": {"density": 0.3}}, {"model": "c"}]


def test_another_method_keeps_only_parameters_that_it_has():
    text = with_setting(with_setting(START, "density", "0.2"), "trim", "tensor")
    assert yaml.safe_load(with_models(text, "base", EXPERTS, "ties", ""))["parameters"] == {"density": 0.2}


def test_gradients_and_filters_are_left_to_the_yaml():
    text = START + "parameters: {density: [0.1, 0.9], lambda_parallel: [{filter: mlp, value: 1}], weight: 2}\n"
    form = read_form(text)
    assert form.beyond == {"density", "lambda_parallel"} and form.settings == (("weight", "2"),)


@pytest.mark.parametrize("text", ["slices: [{sources: []}]", "[", "- 1", "merge_method: ties\nmerge_method: ties"])
def test_what_the_form_has_no_room_for_is_told(text):
    with pytest.raises(UserError, match=r"^the YAML"):
        with_models(text, "base", EXPERTS, "ties", "")


# --- edits on either side


def test_comments_stay_until_the_form_says_something_new():
    text = "# Mine.\n" + START
    sheet = Sheet().left(text)
    assert sheet.form == read_form(START) and sheet.drawing == 1
    assert sheet.with_models("base", EXPERTS, "neuro_merging", "bfloat16") is sheet
    assert sheet.with_setting("density", "0.15") is sheet
    assert "# Mine" not in sheet.with_setting("density", "0.5").text


def test_what_comes_back_late_undoes_nothing():
    one = Sheet().left(START).with_setting("density", "0.2")
    two = one.with_setting("weight", "3")
    for late in ("", START, one.text, two.text):
        begun = Sheet().with_models("base", EXPERTS, "neuro_merging", "bfloat16")
        edited = begun.with_setting("density", "0.2").with_setting("weight", "3")
        assert edited.text == two.text
        assert edited.typed(late) is edited and edited.left(late) is edited
    assert two.typed("merge_method: ties").text == "merge_method: ties"


def test_the_form_follows_when_the_yaml_is_left():
    sheet = Sheet().left(START)
    typed = sheet.typed(START + "parameters: {trim: tensor}\n")
    assert typed.form == sheet.form and typed.drawing == sheet.drawing
    left = typed.left(typed.text)
    assert left.form.settings == (("trim", "tensor"),) and left.drawing == sheet.drawing + 1
    assert left.left(left.text) is left
    assert left.left("[").form == left.form


def test_what_is_recorded_of_the_heads_is_no_comment():
    recorded = "# mergekit-neuron merge --head base\n"
    sheet = Sheet().left(f"{recorded}# Mine.\n{START}").with_setting("density", "0.5")
    assert sheet.text.startswith(f"{recorded}merge_method:")
    assert sheet.with_models("base", EXPERTS[:1], "ties", "").text.startswith(f"{recorded}merge_method:")
