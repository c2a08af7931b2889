"""What the router looks at: the base's own hidden states, whatever the padding."""

import pytest
import torch

from neuron_methods.routing.base import load_base
from neuron_methods.routing.pooling import body_of, pooled_states, resolve_layers
from neuron_methods.support.errors import UserError

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
ONES = torch.ones_like(IDS)


@pytest.mark.parametrize("kind", ["llama", "t5", "vit"])
@pytest.mark.parametrize("layer", [0, 1])
def test_states_are_those_of_the_whole_forward_pass(made, kind, layer):
    model = load_base(str(made(kind) / "base"), "base")
    inputs = {"pixel_values": torch.rand(2, 3, 8, 8)} if kind == "vit" else {"input_ids": IDS, "attention_mask": ONES}
    with torch.no_grad():
        states = body_of(model)[0](**inputs, output_hidden_states=True).hidden_states[layer]
    moments = torch.cat((states.mean(1), states.std(1, correction=0)), dim=1)
    expected = {"mean": states.mean(1), "moments": moments, "first": states[:, 0], "last": states[:, -1]}
    for pooling, pooled in expected.items():
        assert torch.allclose(pooled_states(model, inputs, [layer], pooling), pooled, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("pooling", ["mean", "moments", "first", "last"])
@pytest.mark.parametrize("layer", [0, 2])
def test_padding_does_not_matter_on_either_side(made, kind, pooling, layer):
    model = load_base(str(made(kind) / "base"), "base")
    alone = pooled_states(model, {"input_ids": IDS[:1], "attention_mask": ONES[:1]}, [layer], pooling)
    zeros = torch.zeros(1, 3, dtype=torch.long)
    for order in ((IDS[:1], zeros), (zeros, IDS[:1])):
        ids = torch.cat(order, dim=1)
        padded = pooled_states(model, {"input_ids": ids, "attention_mask": (ids > 0).long()}, [layer], pooling)
        assert torch.allclose(padded, alone, atol=1e-5)


def test_positions_count_real_tokens_where_they_are_learnt(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    alone = pooled_states(model, {"input_ids": IDS[:1], "attention_mask": ONES[:1]}, [2])
    ids = torch.cat((torch.zeros(1, 3, dtype=torch.long), IDS[:1]), dim=1)
    padded = pooled_states(model, {"input_ids": ids, "attention_mask": (ids > 0).long()}, [2])
    assert torch.allclose(padded, alone, atol=1e-5)


def test_layers_behind_the_one_that_is_read_are_not_computed(made):
    model = load_base(str(made("llama") / "base"), "base")
    seen = []
    for number, layer in enumerate(body_of(model)[1]):
        layer.register_forward_hook(lambda *_, number=number: seen.append(number))
    pooled_states(model, {"input_ids": IDS}, [0, 1])
    assert seen == [0]
    pooled_states(model, {"input_ids": IDS}, [2])
    assert seen == [0, 0, 1]


def test_several_layers_stand_side_by_side(made):
    model = load_base(str(made("llama") / "base"), "base")
    together = pooled_states(model, {"input_ids": IDS}, [0, 2], "mean")
    alone = [pooled_states(model, {"input_ids": IDS}, [layer], "mean") for layer in (0, 2)]
    assert torch.equal(together, torch.cat(alone, dim=1))


def test_layers_are_counted_from_either_end(made):
    model = load_base(str(made("llama") / "base"), "base")
    found = [resolve_layers(model, layer) for layer in (None, 0, 2, -1, -3, (2, -3))]
    assert found == [(0, 1), (0,), (2,), (2,), (0,), (0, 2)]
    with pytest.raises(UserError, match=r"router\.layer: 3 is no layer of a model with 2"):
        resolve_layers(model, (0, 3))
