"""What headers tell before a merge: what is refused, and the numbers of a dry run."""

import collections
import shutil
from pathlib import Path

import pytest
import torch
from mergekit.options import MergeOptions

from neuron_methods.plugin.merging import merge_to_directory, plan_merge
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import format_bytes
from tests.support.checkpoints import build, configuration, edit, fine_tune, read, save, save_family

UP = "model.layers.1.mlp.up_proj.weight"


def plan(folder="", method="neuro_merging", options=None, **keys):
    return plan_merge(configuration(method, folder, **keys), options=options)


def refused(match, **keys):
    with pytest.raises(UserError, match=match) as caught:
        plan(**keys)
    assert "\n" not in str(caught.value)


def stored_bytes(*folders):
    return sum(t.numel() * t.element_size() for folder in folders for t in read(folder).values())


@pytest.mark.parametrize("model", ["base", "expert-a"])
def test_a_missing_tensor(workspace, model):
    edit(workspace("llama-tied") / model, lambda tensors: tensors.pop(UP))
    refused(rf"{model}: tensor {UP} is missing from its checkpoint \(19 tensors found\)")


def test_a_shape_that_differs(workspace):
    edit(workspace("llama-tied") / "expert-b", lambda tensors: tensors.update({UP: torch.zeros(23, 16)}))
    refused(rf"{UP}: shapes differ: expert-b has \[23, 16\], base has \[24, 16\]")


def test_heads_of_different_classes(workspace):
    save(fine_tune(build("vit", num_labels=5), 1), workspace("vit") / "expert-b")
    refused(r"classifier.weight: the heads differ in shape: base has \[3, 16\], expert-b has \[5, 16\]; .* --head keep")


def test_vocabularies_that_differ(workspace):
    save(fine_tune(build("llama-tied", vocab_size=44), 1), workspace("llama-tied") / "expert-b")
    refused(r"vocabularies differ: expert-b has 44 tokens, base has 40; .* tokenizer: \{source: base\}")
    assert plan(options=MergeOptions(unsafe_truncate_embeddings=True)).tensors


def test_a_dtype_that_nothing_merges(workspace):
    edit(
        workspace("llama-tied") / "expert-b", lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)})
    )
    refused(f"expert-b/model.safetensors: tensor {UP} is stored as F8_E4M3")


def test_bytes_are_those_of_the_headers_and_the_passes(checkpoints):
    folder = checkpoints("llama-tied")
    base, experts = stored_bytes(folder / "base"), stored_bytes(folder / "expert-a", folder / "expert-b")
    measured = plan(folder)
    assert measured.measures
    assert measured.bytes_to_read == 2 * (base + experts)
    assert measured.bytes_to_write == base
    assert plan(folder, dtype="bfloat16").bytes_to_write == base // 2
    assert plan(folder, out_dtype="float64").bytes_to_write == base * 2
    unmeasured = plan(folder, parameters={"trim": "tensor", "lambda_orthogonal": 1.0})
    assert not unmeasured.measures
    assert unmeasured.bytes_to_read == base + experts
    linear = plan(folder, "linear")
    assert not linear.measures
    assert linear.bytes_to_read == experts


def test_carried_tensors_are_read_once(workspace):
    folder = workspace("llama-tied")
    before = plan()
    edit(folder / "base", lambda tensors: tensors.update(odd=torch.zeros(100, dtype=torch.float16)))
    after = plan()
    assert after.carried == ["odd"]
    assert after.bytes_to_read - before.bytes_to_read == 200
    assert after.bytes_to_write - before.bytes_to_write == 200


def test_what_a_plan_says_is_what_the_merge_writes(workspace):
    workspace("llama-tied")
    summary = merge_to_directory(configuration(dtype="bfloat16"), "out", progress=False)
    assert summary.bytes_written == plan(dtype="bfloat16").bytes_to_write == stored_bytes(Path("out"))


def test_memory_grows_with_shards_and_mapped_files(tmp_path, checkpoints):
    whole = plan(checkpoints("llama-tied"))
    assert whole.mapped_bytes == 3 * whole.bytes_to_write
    peaks = [
        plan(
            checkpoints("llama-tied"), "linear", MergeOptions(safe_serialization=safe, out_shard_size=size)
        ).memory.peak
        for safe, size in ((True, 10**9), (False, 4000), (False, 10**9))
    ]
    assert peaks[2] - peaks[0] > 4000 and peaks[2] - peaks[1] > 4000
    sharded = save_family(tmp_path, "llama-tied", experts=2)
    shutil.rmtree(sharded / "base")
    save(build("llama-tied"), sharded / "base", max_shard_size="6KB")
    assert plan(sharded).mapped_bytes < whole.mapped_bytes


def test_a_full_disk_is_seen_before_the_merge(workspace, monkeypatch):
    folder = workspace("llama-tied")
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=rf"^{folder}: 18.2 kB to write, 1.0 kB free"):
        merge_to_directory(configuration(), "out", progress=False)
    assert sorted(p.name for p in folder.iterdir()) == ["base", "expert-a", "expert-b"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (3e9, "3.0 GB"), (4e12, "4.00 TB")],
)
def test_bytes_for_people(count, text):
    assert format_bytes(count) == text
