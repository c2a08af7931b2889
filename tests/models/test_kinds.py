"""What a class of transformers does."""

from __future__ import annotations

import pytest
import transformers

from neuron_methods.models.kinds import KINDS, facts_of, model_kind, text_limit
from tests.support import tiny


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("llama", "causal"), ("t5", "text-to-text"), ("vit", "image-classification"), ("clip", "image-text")],
)
def test_tiny_models_are_known(kind: str, expected: str) -> None:
    architecture, config = tiny.config_of(kind)
    assert model_kind(architecture, config) == expected
    assert type(tiny.build_model(kind)).__name__.endswith(facts_of(architecture).ending)


@pytest.mark.parametrize(
    ("architecture", "encodes", "expected"),
    [
        ("GPT2LMHeadModel", False, "causal"),
        ("BertForSequenceClassification", False, "text-classification"),
        ("DeiTForImageClassificationWithTeacher", False, "image-classification"),
        ("CLIPVisionModelWithProjection", False, "vision"),
        ("LlavaForConditionalGeneration", False, None),  # goes on with a text, as no encoder-decoder does
        ("BartForConditionalGeneration", True, "text-to-text"),
        ("BertModel", False, None),
    ],
)
def test_classes_are_told_by_their_ends(architecture: str, encodes: bool, expected: str | None) -> None:
    facts = facts_of(architecture, encodes)
    assert (facts and facts.kind) == expected


def test_what_loads_a_kind_is_there() -> None:
    for facts in KINDS:
        assert hasattr(transformers, facts.auto_class) and hasattr(transformers, facts.processor)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.LlamaConfig(max_position_embeddings=12), 12),
        (tiny.config_of("clip")[1], 12),
        (tiny.config_of("t5")[1], None),
        (transformers.T5Config(max_position_embeddings=12), None),
        (tiny.config_of("vit")[1], None),
    ],
)
def test_how_much_text_a_model_reads(config: transformers.PretrainedConfig, expected: int | None) -> None:
    assert text_limit(config) == expected
