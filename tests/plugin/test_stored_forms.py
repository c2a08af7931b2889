"""What is stored otherwise: in shards, in pickles, twice, beside the definitions; and NaN and Inf."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from neuron_methods.support.errors import UserError
from tests.support.checkpoints import (
    build,
    configuration,
    edit,
    fine_tune,
    read,
    save,
)
from tests.support.merges import EMBEDDING, EXPERTS, UP, merge, merged, same, spoil

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
    with pytest.raises(UserError, match=f"expert-b: tensor {name} differs from that of base"):
        merge()


# --- NaN and Inf


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
