"""Which files go with a model into what is made of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from neuron_methods.models.companions import companions, is_of_tokenizer

ROOT = Path(transformers.__file__).parent


def read_by_tokenizers() -> set[str]:
    """Names of the files that transformers' tokenizers are made of, by their source."""
    tables = [
        table
        for path in (*ROOT.glob("tokenization*.py"), *ROOT.glob("models/*/tokenization*.py"))
        for table in re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(encoding="utf-8"), re.S)
    ]
    return {name for table in tables for name in re.findall(r': *"([\w.-]+\.\w+)"', table)}


def test_every_file_that_a_tokenizer_reads_goes_along():
    names = read_by_tokenizers()
    assert {"tokenizer.json", "vocab.txt", "normalizer.json", "word_shape.json"} <= names
    assert set(companions(names)) == names
    assert all(map(is_of_tokenizer, names))


@pytest.mark.parametrize(
    "name",
    [
        *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "chat_template.json"),
        *(
            "generation_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "config_sentence_transformers.json",
        ),
        *("sentence_bert_config.json", "modules.json", "1_Pooling/config.json", "additional_chat_templates/rag.jinja"),
        *("chat_template.jinja", "tokenizer.model", "id2label.json"),
    ],
)
def test_what_goes_with_a_model(name):
    assert name in companions({name, "modules.json"})


@pytest.mark.parametrize(
    "name",
    [
        *("notes.json", "run.json", "metrics.json", "wandb-summary.json", "predictions.json", "samples.json"),
        *("trainer_state.json", "all_results.json", "train_results.json", "model.safetensors.index.json"),
        *("hf_token.txt", "hf_token.json", "tokens.json"),
        *("config.json", "adapter_config.json", "log.txt", "requirements.txt", "1_Pooling/config.json", "modeling.py"),
    ],
)
def test_what_is_anybodys_notes_stays(name):
    assert companions([name]) == []
