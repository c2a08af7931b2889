"""What a model does, by the class that its config names: one table for all that load, feed, score and describe it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["causal", "text-to-text", "text-classification", "image-classification", "vision", "image-text"]

_RELATIVE = ("t5", "mt5", "umt5")  # model types whose positions are relative, so that texts may be of any length


@dataclass(frozen=True)
class KindFacts:
    """One kind of model.

    Attributes:
        name: what it does.
        endings: of its classes' names.
        auto_class: loads it.
        processor: auto class of what makes its inputs.
        hub_task: the task of the hub that it serves.
        peft_task: how peft calls the task, where that changes nothing about which modules an adapter stores.
        encodes: whether it is an encoder-decoder, where that tells it apart from others of the same ending.
    """

    name: Kind
    endings: tuple[str, ...]
    auto_class: str
    processor: str
    hub_task: str
    peft_task: str | None = None
    encodes: bool | None = None


KINDS = (
    KindFacts(
        "causal",
        ("ForCausalLM", "LMHeadModel"),
        "AutoModelForCausalLM",
        "AutoTokenizer",
        "text-generation",
        "CAUSAL_LM",
    ),
    KindFacts(
        "text-to-text",
        ("ForConditionalGeneration",),
        "AutoModelForSeq2SeqLM",
        "AutoTokenizer",
        "text2text-generation",
        "SEQ_2_SEQ_LM",
        encodes=True,
    ),
    KindFacts(
        "text-classification",
        ("ForSequenceClassification",),
        "AutoModelForSequenceClassification",
        "AutoTokenizer",
        "text-classification",
    ),
    KindFacts(
        "image-classification",
        ("ForImageClassification", "ForImageClassificationWithTeacher"),
        "AutoModelForImageClassification",
        "AutoImageProcessor",
        "image-classification",
    ),
    *(
        KindFacts("vision", (name,), name, "AutoImageProcessor", "image-feature-extraction")
        for name in ("CLIPVisionModel", "CLIPVisionModelWithProjection")
    ),
    KindFacts("image-text", ("CLIPModel",), "AutoModel", "AutoProcessor", "zero-shot-image-classification"),
)


def facts_of(architecture: str, encodes: bool = True) -> KindFacts | None:
    """Look a class up; None where the table does not know it.

    Args:
        architecture: name of the class.
        encodes: whether its config says that it is an encoder-decoder.
    """
    for facts in KINDS:
        if architecture.endswith(facts.endings) and facts.encodes in (None, encodes):
            return facts
    return None


def model_kind(architecture: str, config: Any) -> Kind | None:
    """Name what a class of transformers does, None where the table does not know it.

    Args:
        architecture: name of the class.
        config: the model's.
    """
    facts = facts_of(architecture, bool(getattr(config, "is_encoder_decoder", False)))
    return facts.name if facts else None


def text_limit(config: Any) -> int | None:
    """How many tokens a model can read; None: any number, or no texts at all."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit, relative = getattr(text, "max_position_embeddings", None), getattr(text, "model_type", "") in _RELATIVE
    return limit if isinstance(limit, int) and limit > 0 and not relative else None
