"""What a dry run prints."""

import pytest
import torch

from neuron_methods.plugin.describe import describe_plan, tensor_kind
from neuron_methods.plugin.merging import plan_merge
from tests.support.checkpoints import configuration, edit


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embeddings"),
        ("shared.weight", "embeddings"),
        ("vit.embeddings.cls_token", "embeddings"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "embeddings"),
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "attention"),
        ("vit.encoder.layer.0.attention.output.dense.weight", "attention"),
        ("model.layers.0.mlp.down_proj.weight", "MLP"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", "MLP"),
        ("vit.encoder.layer.0.output.dense.weight", "MLP"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "MLP"),
        ("model.norm.weight", "norms"),
        ("vision_model.pre_layrnorm.bias", "norms"),
        ("text_model.encoder.layers.0.mlp.fc1.bias", "biases"),
        ("lm_head.weight", "heads"),
        ("classifier.weight", "heads"),
        ("logit_scale", "heads"),
        ("mystery", "other"),
    ],
)
def test_kinds(name, kind):
    assert tensor_kind(name) == kind


def described(method="neuro_merging", **keys):
    return describe_plan(plan_merge(configuration(method, **keys)))


def test_parameters_that_are_alike_are_told_once(workspace):
    workspace("llama-tied")
    text = described()
    assert "neuro_merging of 2 models on base base: expert-a, expert-b" in text
    assert "  embeddings: 1 tensor, 640 parameters, 2.6 kB to write" in text
    assert "  in all: 20 tensors, 4,560 parameters" in text
    assert text.count("expert-a: weight=1, density=0.15") == 1
    assert "trim=model, lambda_parallel=0, lambda_orthogonal=auto, lambda_points=orthogonal" in text
    assert "rank_energy=1, spectral_exponent=1" in text
    assert "to read: 109.4 kB (two passes: measure, merge)" in text
    assert "to write: 18.2 kB" in text
    assert "peak memory: at most about" in text
    assert "and 471.9 MB the program\n" in text
    assert "memory to take: " in text


def test_gradients_and_filters_are_told_per_kind(workspace):
    workspace("llama-tied")
    text = described(
        parameters={
            "trim": "tensor",
            "density": [0.1, 0.9],
            "rank_energy": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}],
            "consensus": [{"filter": "mlp.up", "value": "sum"}, {"value": "mean"}],
        }
    )
    _, _, mlp = text.partition("  MLP:")
    mlp = mlp.splitlines()[1:4]
    assert "rank_energy=0.5" in mlp[0]
    assert "consensus=mean or sum" in mlp[0] or "consensus=sum or mean" in mlp[0]
    assert "density=0.1 to 0.9" in mlp[1]
    embeddings = text.partition("  embeddings:")[2].splitlines()[1:3]
    assert "rank_energy=1" in embeddings[0]
    assert "density=0.1" in embeddings[1]
    assert "0.9" not in embeddings[1]


def test_a_method_without_base(workspace):
    workspace("llama-tied")
    text = described("linear")
    assert text.startswith("linear of 2 models: expert-a, expert-b")
    assert "(one pass)" in text
    assert "expert-b: weight=0.25" in text


def test_what_is_copied_or_left_out_is_told(workspace):
    folder = workspace("llama-tied")
    edit(folder / "base", lambda tensors: tensors.update({f"odd.{i}": torch.zeros(2) for i in range(5)}))
    edit(folder / "expert-a", lambda tensors: tensors.update(value_head=torch.zeros(2)))
    text = described()
    assert "  copied from the base: 5 tensors, 10 parameters, 40 B to write" in text
    assert "odd.0, odd.1, odd.2 and 2 more" in text
    assert "left out, as only expert-a stores them and no method merges them: value_head" in text


def test_a_plan_writes_nothing(workspace):
    folder = workspace("llama-tied")
    before = sorted(folder.rglob("*"))
    described()
    assert sorted(folder.rglob("*")) == before
