"""Whole merges in this process, from YAML to a directory that transformers loads."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from neuron_methods.plugin.merging import merge_to_directory, plan_merge
from neuron_methods.support.errors import UserError
from tests import oracle
from tests.support.checkpoints import (
    FAMILIES,
    build,
    configuration,
    edit,
    fine_tune,
    read,
    save,
    save_family,
)
from tests.support.tokenizers import save_tokenizer

EMBEDDING, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
EXPERTS = ("expert-a", "expert-b")


def merge(source=None, out="out", **options):
    arguments = {key: options.pop(key) for key in ("force", "allow_nonfinite", "profile_out") if key in options}
    return merge_to_directory(
        source or configuration(), out, progress=False, options=MergeOptions(**options), **arguments
    )


def merged(source=None, out="out", **options):
    merge(source, out, **options)
    return read(Path(out))


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def close(found, expected, atol=1e-6):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), atol=atol, rtol=0, msg=name)


# --- families, complete and loadable


@pytest.mark.parametrize("method", ["neuro_merging", "linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_merges_whole_and_loads(workspace, family, method):
    folder = workspace(family)
    tensors = merged(configuration(method))
    base = read(folder / "base")
    assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in base.items()}
    kind = FAMILIES[family]
    model, loading = kind.model_class.from_pretrained("out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    with torch.no_grad():
        outputs = model.eval()(**kind.inputs)
        before = kind.model_class.from_pretrained("base").eval()(**kind.inputs)
    assert bool(torch.isfinite(outputs[0]).all())
    assert not torch.equal(outputs[0], before[0])
    changed = [name for name in base if not torch.equal(tensors[name], base[name])]
    assert len(changed) > 0.8 * len(base)
    if family == "llama-tied" or family.startswith("t5"):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if family == "llama-untied":
        assert not torch.equal(tensors["lm_head.weight"], tensors[EMBEDDING])


@pytest.mark.parametrize("family", ["llama-untied", "t5-ungated"])
def test_the_merge_is_the_papers(workspace, family):
    folder = workspace(family)
    summary = merge(configuration(parameters={"lambda_parallel": 0.3}))
    base, experts = read(folder / "base"), [read(folder / name) for name in EXPERTS]
    updates = [[oracle.task_vector(expert[name], base[name]) for name in base] for expert in experts]
    thresholds = [oracle.threshold(update, 0.15) for update in updates]
    assert [e.threshold for e in summary.profile.experts.values()] == pytest.approx(thresholds, rel=1e-7)
    sigmas = [oracle.sigma(update, at) for update, at in zip(updates, thresholds, strict=True)]
    assert [e.sigma for e in summary.profile.experts.values()] == pytest.approx(sigmas, rel=1e-5)
    close(read(Path("out")), oracle.merge_model(base, experts, lambda_parallel=0.3), atol=2e-6)


def test_linear_is_the_weighted_mean(workspace):
    folder = workspace("llama-tied")
    a, b = (read(folder / name) for name in EXPERTS)
    close(merged(configuration("linear")), {name: 0.75 * a[name].double() + 0.25 * b[name].double() for name in a})


def test_without_a_base_model_the_first_model_of_the_yaml_gives_the_config(workspace):
    folder = workspace("llama-tied")
    for name, value in (("expert-a", 17), ("expert-b", 18)):
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({**config, "max_position_embeddings": value}))
    merge(configuration("linear"))
    assert json.loads(Path("out/config.json").read_text())["max_position_embeddings"] == 17


# --- dtypes


def test_inputs_are_not_rounded_before_their_difference(workspace):
    workspace("llama-tied")
    exact = merged(out="exact")
    once = {name: tensor.bfloat16() for name, tensor in exact.items()}
    assert same(merged(configuration(dtype="bfloat16"), "dtype"), once)
    assert same(merged(configuration(out_dtype="bfloat16"), "out_dtype"), once)
    assert same(merged(configuration(dtype="float32", out_dtype="bfloat16"), "both"), once)
    assert json.loads(Path("dtype/config.json").read_text())["dtype"] == "bfloat16"


def test_mixed_dtypes(workspace):
    folder = workspace("llama-tied")
    save(build("llama-tied"), folder / "base", torch.bfloat16)
    save(fine_tune(build("llama-tied"), 0), folder / "expert-a", torch.float16)
    base, experts = read(folder / "base"), [read(folder / name) for name in EXPERTS]
    result = merged(configuration(out_dtype="float32"))
    close(result, oracle.merge_model(base, experts), atol=2e-6)


# --- parameters that vary


def test_density_may_vary_only_with_a_threshold_per_tensor(workspace):
    workspace("llama-tied")
    gradient = {"density": [0.1, 0.9]}
    with pytest.raises(UserError, match=r"density of expert-a varies over the tensors .*set trim: tensor"):
        merge(configuration(parameters=gradient))
    assert not os.path.exists("out")
    merge(configuration(parameters={**gradient, "trim": "tensor"}))


def test_gradients_and_filters_reach_their_tensors(workspace):
    folder = workspace("llama-tied")
    base = read(folder / "base")
    weight = [{"filter": "mlp", "value": 0}, {"filter": "self_attn", "value": [0, 1]}, {"value": 1}]
    tensors = merged(configuration(parameters={"weight": weight, "trim": "tensor", "lambda_orthogonal": 1.0}))
    plain = merged(configuration(parameters={"trim": "tensor", "lambda_orthogonal": 1.0}), "plain")
    for name, tensor in tensors.items():
        untouched = "mlp" in name or ("self_attn" in name and ".0." in name)
        assert torch.equal(tensor, base[name] if untouched else plain[name]), name


def test_trim_per_tensor_keeps_the_same_share_everywhere(workspace):
    folder = workspace("llama-tied")
    base = read(folder / "base")
    parameters = {"trim": "tensor", "density": 0.25, "lambda_parallel": 1.0, "lambda_orthogonal": 1.0}
    tensors = merged(configuration(models=[{"model": "expert-a"}], parameters=parameters))
    for name, tensor in tensors.items():
        # All entries from the (n - n/4)-th smallest on.
        changed = (tensor - base[name]).abs() > 1e-6
        assert abs(int(changed.sum()) - (tensor.numel() // 4 + 1)) <= 1, name


# --- slices and modules


def slice_of(*sources):
    return {"sources": [{"model": model, "layer_range": list(layers)} for model, *layers in sources]}


def test_a_slice_of_all_layers_is_the_whole(workspace):
    workspace("llama-tied")
    sources = [(model, 0, 2) for model in ("base", *EXPERTS)]
    sliced = merged(configuration(models=None, slices=[slice_of(*sources)]), "sliced")
    assert same(sliced, merged())


def test_layers_come_from_the_experts_named_for_them(workspace):
    folder = workspace("llama-tied")
    slices = [slice_of(("base", 0, 1), ("expert-a", 0, 1)), slice_of(("base", 1, 2), ("expert-b", 1, 2))]
    parameters = {"density": 1.0, "consensus": "sum", "lambda_parallel": 1.0}
    tensors = merged(configuration(models=None, slices=slices, parameters=parameters))
    a, b = (read(folder / name) for name in EXPERTS)
    for name in tensors:
        expert = a if ".0." in name or name == EMBEDDING else b
        torch.testing.assert_close(tensors[name], expert[name], atol=1e-6, rtol=0, msg=name)


def test_fewer_layers_make_a_smaller_model(workspace):
    workspace("llama-tied")
    merge(configuration(models=None, slices=[slice_of(("base", 1, 2), ("expert-a", 1, 2))]))
    model, loading = transformers.LlamaForCausalLM.from_pretrained("out", output_loading_info=True)
    assert model.config.num_hidden_layers == 1
    assert not loading["missing_keys"] and not loading["unexpected_keys"]


def test_modules_of_t5_with_experts_of_their_own(workspace):
    folder = workspace("t5-gated")
    modules = {
        "encoder": {"models": [{"model": "expert-a"}]},
        "decoder": {"slices": [slice_of(("base", 0, 2), ("expert-b", 0, 2))]},
        "shared": {"models": [{"model": "expert-a"}, {"model": "expert-b"}], "parameters": {"weight": 0.0}},
    }
    parameters = {"density": 1.0, "consensus": "sum", "lambda_parallel": 1.0}
    tensors = merged(configuration(models=None, modules=modules, parameters=parameters))
    base, a, b = (read(folder / name) for name in ("base", *EXPERTS))
    for name in tensors:
        expected = {"encoder": a, "decoder": b, "shared": base}[name.split(".")[0]]
        torch.testing.assert_close(tensors[name], expected[name], atol=1e-6, rtol=0, msg=name)


# --- what is stored otherwise


@pytest.mark.parametrize("lazy", [False, True])
def test_shards_in_and_out(workspace, lazy):
    folder = workspace("llama-untied")
    whole = merged(out="whole")
    shutil.rmtree(folder / "expert-a")
    save(fine_tune(build("llama-untied"), 0), folder / "expert-a", max_shard_size="8KB")
    assert len(list((folder / "expert-a").glob("*.safetensors"))) > 2
    assert same(merged(out_shard_size=6000, lazy_unpickle=lazy), whole)
    shards = sorted(Path("out").glob("*.safetensors"))
    assert len(shards) > 3
    assert max(shard.stat().st_size for shard in shards) < 6000 + 2000
    _, loading = transformers.LlamaForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]


@pytest.mark.parametrize("sharded", [False, True])
def test_pickles_where_they_are_allowed(workspace, sharded):
    folder = workspace("llama-untied")
    whole = merged(out="whole")
    tensors = load_file(folder / "expert-a" / "model.safetensors")
    os.remove(folder / "expert-a" / "model.safetensors")
    if sharded:
        names = sorted(tensors)
        files = {name: f"pytorch_model-{1 + (i > 9):05d}-of-00002.bin" for i, name in enumerate(names)}
        for file in set(files.values()):
            torch.save({n: tensors[n] for n in names if files[n] == file}, folder / "expert-a" / file)
        (folder / "expert-a" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        torch.save(tensors, folder / "expert-a" / "pytorch_model.bin")
    with pytest.raises(UserError, match="--lazy-unpickle"):
        merge()
    assert same(merged(lazy_unpickle=True), whole)


def test_pickled_output_on_request(workspace):
    workspace("llama-tied")
    whole = merged(out="whole")
    merge(safe_serialization=False)
    assert same(torch.load("out/pytorch_model.bin", weights_only=True), whole)


def test_asynchronous_writing_and_cloning_change_nothing(workspace):
    workspace("llama-tied")
    other = merged(out="other", async_write=True, write_threads=2, clone_tensors=True, out_shard_size=5000)
    assert same(merged(), other)


def test_heads_stored_twice_stay_alike(workspace):
    folder = workspace("llama-tied")
    once = merged(out="once")
    for name in ("base", *EXPERTS):
        edit(folder / name, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    tensors = merged()
    assert torch.equal(tensors.pop("lm_head.weight"), tensors[EMBEDDING])
    assert same(tensors, once)  # they count once for the thresholds, too


def test_tensors_that_no_definition_knows_are_carried_over_bit_for_bit(workspace):
    folder = workspace("llama-tied")
    odd = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
        "half": torch.rand(5).half(),
        "mask": torch.tensor([True, False]),
        "short": torch.arange(3, dtype=torch.int16),
        "nan": torch.tensor([float("nan"), 1.0]),
        "scalar": torch.tensor(2.5),
    }
    for name in ("base", "expert-a"):
        edit(folder / name, lambda tensors: tensors.update(odd))
    edit(folder / "expert-b", lambda tensors: tensors.update(value_head=torch.ones(2)))
    summary = merge(configuration(dtype="bfloat16"))
    tensors = read(Path("out"))
    for name, tensor in odd.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name].nan_to_num(7), tensor.nan_to_num(7))
    assert "value_head" not in tensors
    assert any("copied from the base unchanged" in note and "and 3 more" in note for note in summary.notes)
    assert any("only expert-b stores them" in note and "value_head" in note for note in summary.notes)


def test_integer_buffers_are_copied_where_they_agree(workspace):
    folder = workspace("clip-vision")
    name = "embeddings.position_ids"
    stored = next(key for key in read(folder / "base") if key.endswith("embeddings.class_embedding"))
    name = stored.replace("class_embedding", "position_ids")
    for model in ("base", *EXPERTS):
        edit(folder / model, lambda tensors: tensors.update({name: torch.arange(5)[None]}))
    for method in ("neuro_merging", "linear"):
        tensor = merged(configuration(method, dtype="bfloat16"), method)[name]
        assert tensor.dtype == torch.int64
        assert torch.equal(tensor, torch.arange(5)[None])
    edit(folder / "expert-b", lambda tensors: tensors.update({name: torch.arange(5)[None] + 1}))
    with pytest.raises(UserError, match=f"{name}: the models hold integers here, and not the same ones"):
        merge()


# --- NaN and Inf


def spoil(path, value, name=UP, at=(2, 3)):
    edit(path, lambda tensors: tensors[name].__setitem__(at, value))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("method", "model"), [("neuro_merging", "expert-b"), ("neuro_merging", "base"), ("linear", "expert-b")]
)
def test_nan_or_inf_is_named(workspace, value, method, model):
    folder = workspace("llama-tied")
    spoil(folder / model, value)
    with pytest.raises(UserError, match=rf"{UP}: .*({model}|the base model)") as caught:
        merge(configuration(method))
    assert "--allow-nonfinite" in str(caught.value)
    assert sorted(os.listdir(folder)) == ["base", *EXPERTS]


def test_an_expert_with_nan_merges_as_if_it_had_not_changed_there(workspace):
    folder = workspace("llama-tied")
    spoil(folder / "expert-b", float("nan"))
    summary = merge(allow_nonfinite=True)
    tensors = read(Path("out"))
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
    assert summary.notes == []
    spoil(folder / "expert-b", read(folder / "base")[UP][2, 3])
    assert same(merged(out="unchanged"), tensors)


def test_a_base_with_inf_keeps_it_to_its_entry(workspace):
    folder = workspace("llama-tied")
    spoil(folder / "base", float("inf"))
    summary = merge(allow_nonfinite=True)
    broken = ~torch.isfinite(read(Path("out"))[UP])
    assert broken.nonzero().tolist() == [[2, 3]]
    assert any("NaN or Inf in the output" in note and UP in note for note in summary.notes)


def test_mergekits_own_methods_pass_nan_on_where_it_is_allowed(workspace):
    folder = workspace("llama-tied")
    spoil(folder / "expert-b", float("nan"))
    assert any(UP in note for note in merge(configuration("linear"), allow_nonfinite=True).notes)


def test_an_output_dtype_that_is_too_narrow(workspace):
    folder = workspace("llama-tied")
    for model in ("base", *EXPERTS):
        edit(folder / model, lambda tensors: tensors[UP].mul_(1e6))
    with pytest.raises(UserError, match=rf"{UP}: .*though all inputs are finite"):
        merge(configuration(dtype="float16"))


# --- profiles


def test_a_profile_gives_the_same_bytes(workspace):
    workspace("llama-tied")
    measured = merged(out="measured", profile_out="profile.json")
    source = configuration(parameters={"profile": "profile.json"})
    assert same(merged(source), measured)
    assert not plan_merge(source).measures
    content = json.loads(Path("profile.json").read_text())
    assert content["sigma"] == max(expert["sigma"] for expert in content["experts"])
    merge(source, "again", profile_out="copy.json")
    assert json.loads(Path("copy.json").read_text()) == content


def test_a_profile_per_tensor_gives_the_same_bytes(workspace):
    workspace("llama-tied")
    parameters = {"trim": "tensor", "density": [0.1, 0.5]}
    measured = merged(configuration(parameters=parameters), "measured", profile_out="profile.json")
    assert same(merged(configuration(parameters={**parameters, "profile": "profile.json"})), measured)


def test_a_profile_may_lie_within_the_output(workspace):
    workspace("llama-tied")
    merge(profile_out="out/facts/profile.json")
    assert json.loads(Path("out/facts/profile.json").read_text())["trim"] == "model"


@pytest.mark.parametrize(
    ("method", "parameters", "place", "message"),
    [
        ("linear", {}, "p.json", "linear measures no trim profile"),
        ("neuro_merging", {"trim": "tensor", "lambda_orthogonal": 1}, "p.json", "this merge measures nothing"),
        ("neuro_merging", {}, "none/p.json", "its directory is missing"),
        ("neuro_merging", {}, "base", "a directory; name a JSON file"),
        ("neuro_merging", {}, "out", "a directory; name a JSON file"),
    ],
)
def test_a_profile_that_cannot_be(workspace, method, parameters, place, message):
    folder = workspace("llama-tied")
    with pytest.raises(UserError, match=f"--profile-out.*: .*{message}"):
        merge(configuration(method, parameters=parameters), profile_out=place)
    assert sorted(os.listdir(folder)) == ["base", *EXPERTS]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "truncated, or not valid JSON"),
        ("{}", "not a file of the format 'mergekit-neuron/trim-profile'"),
    ],
)
def test_a_profile_that_is_none(workspace, content, message):
    workspace("llama-tied")
    if content is not None:
        Path("profile.json").write_text(content)
    with pytest.raises(UserError, match=f"profile profile.json: {message}"):
        merge(configuration(parameters={"profile": "profile.json"}))


# --- complete or absent


def test_a_failing_merge_leaves_nothing_and_keeps_the_old_output(workspace):
    folder = workspace("llama-tied")
    merge(out="a/b/out")
    before = {path: path.read_bytes() for path in Path("a/b/out").iterdir()}
    spoil(folder / "expert-b", float("nan"))
    with pytest.raises(UserError):
        merge(out="a/b/out", force=True)
    assert {path: path.read_bytes() for path in Path("a/b/out").iterdir()} == before
    with pytest.raises(UserError):
        merge(out="c/d/out")
    assert sorted(os.listdir(folder)) == ["a", "base", *EXPERTS]
    assert os.listdir("a/b") == ["out"]


def test_force_replaces_the_old_output_whole(workspace):
    workspace("llama-tied")
    merge(out_shard_size=5000)
    Path("out/leftover").write_text("")
    with pytest.raises(UserError, match="exists already"):
        merge()
    merge(force=True)
    assert sorted(p.name for p in Path("out").glob("*.safetensors")) == ["model.safetensors"]
    assert not Path("out/leftover").exists()


@pytest.mark.parametrize("out", ["base", "expert-a", "."])
def test_force_never_replaces_an_input(workspace, out):
    workspace("llama-tied")
    with pytest.raises(UserError, match=r"which is read|current directory"):
        merge(out=out, force=True)
    assert len(read(Path("base"))) == 20


def test_a_run_again_gives_the_same_bytes_in_any_order_of_the_experts_nearly(workspace):
    workspace("llama-tied")
    first, again = merged(), merged(out="again")
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()
    assert same(first, again)
    close(merged(configuration(models=[{"model": m} for m in EXPERTS[::-1]]), "turned"), first)


def test_the_verification_is_of_what_was_written(workspace, monkeypatch):
    folder = workspace("llama-tied")
    from mergekit.io.tensor_writer import TensorWriter

    original = TensorWriter.save_tensor

    def forgetful(self, name, tensor, clone=False):
        if name != UP:
            original(self, name, tensor, clone)

    monkeypatch.setattr(TensorWriter, "save_tensor", forgetful)
    with pytest.raises(UserError, match=f"verification failed: tensor {UP} is missing"):
        merge()
    assert sorted(os.listdir(folder)) == ["base", *EXPERTS]


# --- tokenizers, templates, cards, companions

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


def test_a_template_without_a_tokenizer(workspace):
    workspace("llama-tied")
    with pytest.raises(UserError, match="chat_template: base has no tokenizer"):
        merge(configuration(chat_template="chatml"))


def test_a_template_that_is_none(workspace):
    save_tokenizer(workspace("llama-tied") / "base", WORDS)
    with pytest.raises(UserError, match="Invalid chat template: nonsense"):
        merge(configuration(chat_template="nonsense"))


def test_a_tokenizer_that_cannot_be_loaded(workspace):
    folder = workspace("llama-tied")
    (folder / "base" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"model base: tokenizer: .*; --no-copy-tokenizer merges without"):
        merge()
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
def test_a_source_of_tokens_that_is_none(workspace, tokenizer, message):
    widened(workspace)
    with pytest.raises(UserError, match=message):
        merge(configuration(tokenizer=tokenizer))
    assert not os.path.exists("out")


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
    assert sorted(os.listdir("bare")) == ["config.json", "generation_config.json", "model.safetensors"]


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
