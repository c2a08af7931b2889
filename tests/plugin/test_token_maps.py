"""Models whose rows are merged must number their tokens alike."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from neuron_methods.support.errors import UserError
from tests.support.checkpoints import build, configuration, read, save
from tests.support.merges import EMBEDDING, EXPERTS, merge, merged
from tests.support.tokenizers import save_tokenizer

WORDS = ["<unk>", *(f"w{i}" for i in range(39))]
SWAPPED = [*WORDS[:5], WORDS[6], WORDS[5], *WORDS[7:]]


@pytest.fixture
def folder(workspace):
    folder = workspace("llama-tied")
    for name in ("base", *EXPERTS):
        save_tokenizer(folder / name, WORDS)
    return folder


def notes(out="out"):
    return [note for note in merge(out=out).notes if "token" in note]


@pytest.mark.parametrize("keys", [{}, {"method": "linear"}, {"dtype": "bfloat16"}])
def test_tokens_in_another_order_are_refused_by_name(folder, keys):
    save_tokenizer(folder / "expert-b", SWAPPED)
    first = "expert-a" if "method" in keys else "base"
    message = rf"expert-b numbers its tokens otherwise than {first}: 5 is 'w5' in expert-b and 'w4' in {first}, .*"
    with pytest.raises(UserError, match=message + r"tokenizer: \{source: base\}"):
        merge(configuration(**keys))
    assert not Path("out").exists()


def test_what_the_message_says_helps(folder):
    save_tokenizer(folder / "expert-b", SWAPPED)
    found = merged(configuration("linear", tokenizer={"source": "base"}))[EMBEDDING]
    a, b = (read(folder / name)[EMBEDDING] for name in EXPERTS)
    b[[5, 6]] = b[[6, 5]]
    torch.testing.assert_close(found, 0.75 * a + 0.25 * b)


def test_tokens_in_another_order_are_found_where_a_vocabulary_is_cut_too(folder):
    save(build("llama-tied", vocab_size=42), folder / "expert-b")
    save_tokenizer(folder / "expert-b", [*SWAPPED, "x", "y"])
    with pytest.raises(UserError, match="5 is 'w5' in expert-b and 'w4' in base"):
        merge(unsafe_truncate_embeddings=True)


def test_alike_are_the_same_file_more_or_fewer_tokens_and_none(folder):
    assert notes() == []
    save_tokenizer(folder / "base", WORDS[:36])  # rows beyond are padding
    for file in (folder / "expert-b").glob("token*"):
        file.unlink()
    assert notes(out="again") == []


@pytest.mark.parametrize("placeholder", ["<|reserved_special_token_5|>", "[unused1]", "<extra_id_0>", "<unused7>"])
def test_a_reserved_token_that_was_given_a_name_is_told(folder, placeholder):
    for name in ("base", "expert-a"):
        save_tokenizer(folder / name, [*WORDS[:39], placeholder])
    save_tokenizer(folder / "expert-b", [*WORDS[:39], "<|im_start|>"])
    (note,) = notes()
    assert note == (
        "base and expert-b name 1 tokens differently, whose rows are merged as one's: "
        f"39 is '{placeholder}' and '<|im_start|>'"
    )


def test_one_number_for_two_words_is_refused(folder):
    for name in ("base", "expert-a"):
        save_tokenizer(folder / name, [*WORDS[:38], "<|unused|>", "<|a|>"])
    save_tokenizer(folder / "expert-b", [*WORDS[:38], "<|c|>", "<|b|>"])
    with pytest.raises(UserError, match=r"39 is '<\|b\|>' in expert-b and '<\|a\|>' in base, .*\{source: base\}"):
        merge()


def test_another_vocabulary_altogether(folder):
    save_tokenizer(folder / "expert-b", ["<unk>", *(f"v{i}" for i in range(39))])
    with pytest.raises(UserError, match="1 is 'v0' in expert-b and 'w0' in base"):
        merge()


def test_a_unigram_model_and_added_tokens(folder):
    def unigram(words):
        pieces = [[word, -1.0] for word in words[:-1]]
        added = [{"content": words[-1], "id": len(pieces)}]
        return json.dumps({"model": {"type": "Unigram", "vocab": pieces}, "added_tokens": added})

    for name in EXPERTS:
        (folder / name / "tokenizer.json").write_text(unigram(WORDS))
    (folder / "expert-b" / "tokenizer.json").write_text(unigram([*WORDS[:38], WORDS[39], WORDS[38]]))
    with pytest.raises(UserError, match="38 is 'w38' in expert-b and 'w37' in base"):
        merge()


def test_a_vocabulary_of_lines(folder):
    for name, words in (("base", WORDS), ("expert-a", WORDS), ("expert-b", SWAPPED)):
        for file in (folder / name).glob("token*"):
            file.unlink()
        (folder / name / "vocab.txt").write_text("\n".join(["[UNK]", *words[1:]]) + "\n")
        (folder / name / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    assert transformers.AutoTokenizer.from_pretrained("expert-b").get_vocab()["w5"] == 5
    with pytest.raises(UserError, match="5 is 'w5' in expert-b and 'w4' in base"):
        merge()


def test_an_expert_s_tokenizer_that_cannot_be_read(folder):
    (folder / "expert-b" / "tokenizer.json").write_text("{")
    (note,) = notes()
    assert note.startswith("the tokenizer of expert-b cannot be read, so its rows may be of other tokens: ")


def test_a_base_without_a_tokenizer_where_an_expert_has_one(folder):
    for file in (folder / "base").glob("token*"):
        file.unlink()
    assert notes() == ["base has no tokenizer, so none is written; expert-a has one to copy"]
    assert not list(Path("out").glob("token*"))
