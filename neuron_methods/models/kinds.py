"""What a model does, by the class that its config names: one table for all that load, feed, score and describe it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Kind = Literal["causal", "text-to-text", "text-classification", "image-classification", "vision", "image-text"]
Processor = Literal["AutoTokenizer", "AutoImageProcessor", "AutoProcessor"]

_RELATIVE = ("t5", "mt5", "umt5")  # model types whose positions are relative, so that texts may be of any length


class KindFacts(NamedTuple):
    """One kind of model.

    Attributes:
        kind: what it does.
        ending: of its classes' names.
        auto_class: loads it.
        processor: auto class of what makes its inputs.
        hub_task: the task of the hub that it serves.
        peft_task: how peft calls the task, where that changes nothing about which modules an adapter stores.
    """

    kind: Kind
    ending: str
    auto_class: str
    processor: Processor
    hub_task: str
    peft_task: str | None = None


KINDS = tuple(
    KindFacts(*line.split())
    for line in """
    causal ForCausalLM AutoModelForCausalLM AutoTokenizer text-generation CAUSAL_LM
    causal LMHeadModel AutoModelForCausalLM AutoTokenizer text-generation CAUSAL_LM
    text-to-text ForConditionalGeneration AutoModelForSeq2SeqLM AutoTokenizer text2text-generation SEQ_2_SEQ_LM
    text-classification ForSequenceClassification AutoModelForSequenceClassification AutoTokenizer text-classification
    image-classification ForImageClassification AutoModelForImageClassification AutoImageProcessor image-classification
    vision CLIPVisionModel CLIPVisionModel AutoImageProcessor image-feature-extraction
    vision CLIPVisionModelWithProjection CLIPVisionModelWithProjection AutoImageProcessor image-feature-extraction
    image-text CLIPModel AutoModel AutoProcessor zero-shot-image-classification
    """.strip().splitlines()
)


def facts_of(architecture: str, encodes: bool = True) -> KindFacts | None:
    """Look a class up; None where the table does not know it.

    Args:
        architecture: name of the class.
        encodes: whether its config says that it is an encoder-decoder, as what is text-to-text has to be.
    """
    architecture = architecture.removesuffix("WithTeacher")  # of distilled vision models
    found = (facts for facts in KINDS if architecture.endswith(facts.ending))
    return next((facts for facts in found if encodes or facts.kind != "text-to-text"), None)


def model_kind(architecture: str, config: Any) -> Kind | None:
    """Name what a class of transformers with this config does, None where the table does not know it."""
    facts = facts_of(architecture, bool(getattr(config, "is_encoder_decoder", False)))
    return facts.kind if facts else None


def text_limit(config: Any) -> int | None:
    """Tell how many tokens a model can read; None: any number, or no texts at all."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit, relative = getattr(text, "max_position_embeddings", None), getattr(text, "model_type", "") in _RELATIVE
    return limit if isinstance(limit, int) and limit > 0 and not relative else None
