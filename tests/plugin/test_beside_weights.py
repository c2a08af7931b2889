"""What lies beside the weights: tokenizers, templates, cards, files of image models; and what is told of a merge."""

import json
import os
import tempfile
from pathlib import Path

import click.testing
import pytest
import torch
import transformers
import yaml
from mergekit.options import MergeOptions

from neuron_methods.cli import main
from neuron_methods.plugin.merging import merge_to_directory, plan_merge
from neuron_methods.support.errors import UserError
from neuron_methods.support.targets import MARK
from tests.support.checkpoints import (
    build,
    configuration,
    fine_tune,
    read,
    save,
    save_family,
)
from tests.support.merges import EMBEDDING, EXPERTS, merge, merged
from tests.support.tokenizers import save_tokenizer

WORDS = ["<unk>", *(f"w{i}" for i in range(39))]


def test_the_tokenizer_and_its_template_come_along(workspace):
    folder = workspace("llama-tied")
    save_tokenizer(folder / "base", WORDS, chat_template="{{ messages }}")
    merge()
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    assert tokenizer.get_vocab() == {word: index for index, word in enumerate(WORDS)}
    assert tokenizer.chat_template == "{{ messages }}"
    merge(out="without", copy_tokenizer=False)
    assert not list(Path("without").glob("token*"))
    merge(configuration(chat_template="chatml"), "chatml")
    assert "im_start" in transformers.AutoTokenizer.from_pretrained("chatml").chat_template


@pytest.fixture(params=["merged", "planned"])
def refused(request):
    """Expects that a configuration is refused, by the merge or already by its plan."""

    def expect(source, message):
        with pytest.raises(UserError, match=message):
            plan_merge(source) if request.param == "planned" else merge(source)
        assert not os.path.exists("out")

    return expect


def test_a_template_without_a_tokenizer(workspace, refused):
    workspace("llama-tied")
    refused(configuration(chat_template="chatml"), "chat_template: base has no tokenizer")


def test_a_template_that_is_none(workspace, refused):
    save_tokenizer(workspace("llama-tied") / "base", WORDS)
    refused(configuration(chat_template="nonsense"), "Invalid chat template: nonsense")


def test_a_tokenizer_that_cannot_be_loaded(workspace, refused):
    folder = workspace("llama-tied")
    (folder / "base" / "tokenizer.json").write_text("{")
    refused(configuration(), r"model base: tokenizer: .*; --no-copy-tokenizer merges without")
    plan_merge(configuration(), options=MergeOptions(copy_tokenizer=False))
    merge(copy_tokenizer=False)


def widened(workspace):
    """Experts of vocabularies of their own: a has the base's words and two more, b has them turned around."""
    folder = workspace("llama-tied")
    save_tokenizer(folder / "base", WORDS)
    save(fine_tune(build("llama-tied", vocab_size=42), 0), folder / "expert-a")
    save_tokenizer(folder / "expert-a", [*WORDS, "new0", "new1"])
    save_tokenizer(folder / "expert-b", [WORDS[0], *WORDS[:0:-1]])
    return folder


@pytest.mark.parametrize(("source", "size"), [("base", 40), ("union", 42)])
@pytest.mark.parametrize("expert", EXPERTS)
def test_vocabularies_are_aligned(workspace, source, size, expert):
    folder = widened(workspace)
    with pytest.raises(UserError, match=r"vocabularies differ"):
        merge()
    # By these parameters the merge of one expert is the expert, if only its rows meet the right ones of the base.
    parameters = {"density": 1.0, "consensus": "sum", "lambda_parallel": 1.0, "lambda_orthogonal": 1.0}
    models = [{"model": model, "parameters": {"weight": float(model == expert)}} for model in EXPERTS]
    tensors = merged(configuration(models=models, tokenizer={"source": source}, parameters=parameters))
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == size == len(tensors[EMBEDDING])
    vocabulary = transformers.AutoTokenizer.from_pretrained("out").get_vocab()
    own = transformers.AutoTokenizer.from_pretrained(expert).get_vocab()
    assert len(vocabulary) == size
    rows = read(folder / expert)[EMBEDDING]
    for word in WORDS:
        torch.testing.assert_close(tensors[EMBEDDING][vocabulary[word]], rows[own[word]], atol=1e-6, rtol=0)


def test_a_tokenizer_is_asked_for_and_there_is_none(workspace):
    workspace("llama-tied")
    with pytest.raises(UserError, match=r"merge.yaml: tokenizer: base has no tokenizer"):
        merge_to_directory(configuration(tokenizer={"source": "base"}), "out", progress=False, config_name="merge.yaml")


def token(source):
    return {"source": "base", "tokens": {"w3": {"source": source, "force": True}}}


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"source": "none"}, "tokenizer: source: none is no model of this merge"),
        (token("none"), "tokenizer: token 'w3': none is no model of this merge"),
        (
            token({"kind": "model_token", "model": "expert-a", "token": "zzz"}),
            "token 'w3': the tokenizer of expert-a does not know 'zzz'",
        ),
        (
            {"source": "union", "tokens": {"new": {"source": "base"}}},
            "token 'new': the tokenizer of base does not know 'new'",
        ),
    ],
)
def test_a_source_of_tokens_that_is_none(workspace, refused, tokenizer, message):
    widened(workspace)
    refused(configuration(tokenizer=tokenizer), message)


def test_a_plan_leaves_no_tokenizer_behind(workspace, monkeypatch):
    folder = workspace("llama-tied")
    save_tokenizer(folder / "base", WORDS)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = sorted(folder.rglob("*"))
    plan_merge(configuration())
    assert sorted(folder.rglob("*")) == before


def test_a_dry_run_refuses_a_source_without_a_tokenizer(workspace):
    folder = workspace("llama-tied")
    save_tokenizer(folder / "base", WORDS)
    Path("merge.yaml").write_text(configuration(tokenizer_source="expert-a"))
    done = click.testing.CliRunner().invoke(main, ["merge", "merge.yaml", "out", "--dry-run"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "error: merge.yaml: tokenizer: source: expert-a has no tokenizer; name a model that has one\n"


def test_a_token_may_start_from_another(workspace):
    folder = widened(workspace)
    source = {"kind": "model_token", "model": "expert-a", "token": "new0"}
    rows = read(folder / "expert-a")[EMBEDDING]
    # Both experts and the base take the row, so that there is nothing to merge.
    tensors = merged(configuration(tokenizer=token(source)))
    torch.testing.assert_close(tensors[EMBEDDING][WORDS.index("w3")], rows[40])


def test_vocabularies_cut_to_the_smallest_on_request(workspace):
    folder = workspace("llama-tied")
    save(fine_tune(build("llama-tied", vocab_size=42), 0), folder / "expert-a")
    assert merged(unsafe_truncate_embeddings=True)[EMBEDDING].shape == (40, 16)


def test_the_card_tells_what_was_merged(workspace):
    workspace("llama-tied")
    merge(out="nested/my-merge")
    card = Path("nested/my-merge/README.md").read_text()
    assert "# my-merge" in card
    assert "[NeuroMerging](https://arxiv.org/abs/2503.05320)" in card
    assert card.index("* expert-a") < card.index("* expert-b")
    assert yaml.safe_load(Path("nested/my-merge/mergekit_config.yml").read_text())["merge_method"] == "neuro_merging"
    merge(out="bare", write_model_card=False)
    assert sorted(os.listdir("bare")) == [MARK, "config.json", "generation_config.json", "model.safetensors"]


def test_what_belongs_to_an_image_model_comes_along(workspace):
    folder = workspace("vit")
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "base")
    merge()
    processor = transformers.AutoImageProcessor.from_pretrained("out")
    assert processor.size["height"] == 8


def test_the_summary_tells_what_happened(workspace):
    workspace("llama-tied")
    text = str(merge(configuration(parameters={"lambda_parallel": 0.2})))
    for part in (
        "neuro_merging: 20 tensors, 109.4 kB read, 18.2 kB written, ",
        " s\n",
        "expert-a: trim threshold 0.0",
        "sigma 0.2",
        "automatic lambda_orthogonal 1.3",
        "% parallel, ",
        "% orthogonal to the neurons",
        "complete and verified: out",
    ):
        assert part in text


def test_the_summary_tells_what_every_expert_keeps(workspace):
    workspace("llama-tied")
    assert "expert-a: keeps 25 of 48 MLP neurons (52.1%)" in str(merge(configuration("min_merging")))


def test_nothing_is_said_that_the_user_can_do_nothing_about(workspace, caplog, capfd):
    workspace("llama-tied")
    transformers.utils.logging.set_verbosity_warning()
    merge(configuration(dtype="bfloat16"))
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
    assert caplog.records == []


def test_a_merge_of_a_generated_family_is_seen_by_transformers_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(save_family(tmp_path, "llama-tied", experts=4, dtype=torch.bfloat16))
    models = [{"model": f"expert-{letter}"} for letter in "abcd"]
    tensors = merged(configuration(models=models))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert transformers.LlamaForCausalLM.from_pretrained("out").dtype == torch.bfloat16


def test_a_directory_of_sentence_transformers_stays_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    for seed, name in enumerate(("base", *EXPERTS)):
        torch.manual_seed(seed)
        save(transformers.BertModel(config), tmp_path / name)
        save_tokenizer(tmp_path / name, WORDS)
    modules = {
        "modules.json": '[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]',
        "config_sentence_transformers.json": "{}",
        "sentence_bert_config.json": '{"max_seq_length": 8}',
        "1_Pooling/config.json": '{"word_embedding_dimension": 16}',
        "2_Dense/config.json": "{}",
        "2_Dense/model.safetensors": "weights of its own",
    }
    for file, text in {**modules, "data_config.json": "[]", "runs/log.json": "{}", "3_Pooling.json.lock": ""}.items():
        (tmp_path / "base" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / file).write_text(text)
    weights = {"base": 0.0, "expert-a": 0.75, "expert-b": 0.25}
    models = [{"model": model, "parameters": {"weight": weight}} for model, weight in weights.items()]
    merge(configuration("linear", models=models), write_model_card=False)
    tree = {path.relative_to("out").as_posix() for path in Path("out").rglob("*") if path.is_file()}
    assert tree == {MARK, "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} | {*modules}
    assert {file: (tmp_path / "out" / file).read_text() for file in modules} == modules
    found = transformers.AutoModel.from_pretrained("out").state_dict()
    a, b = (transformers.AutoModel.from_pretrained(name).state_dict() for name in EXPERTS)
    for name, tensor in found.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.75 * a[name] + 0.25 * b[name])
