"""The seam on peft's layers against peft itself, which can only do one mixture per batch."""

import pytest
import torch

from neuron_methods.neurons import layer_of
from neuron_methods.routing.base import load_base
from neuron_methods.routing.experts import load_experts
from neuron_methods.routing.mixing import AdapterMixer
from neuron_methods.support.errors import UserError
from tests.support.routed import EXPERTS

IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12], [13, 14, 15, 16, 17], [5, 5, 6, 6, 7]])
INPUTS = {
    "llama": {"input_ids": IDS},
    "t5": {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]},
    "vit": {"pixel_values": torch.linspace(-1, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)},
}


@pytest.fixture(params=sorted(INPUTS))
def loaded(request, made):
    """(kind, base with all adapters, mixer)."""
    folder = made(request.param)
    base = load_base(str(folder / "base"), "base")
    peft_model = load_experts(base, {name: str(folder / "adapters" / name) for name in EXPERTS}, "test")
    return request.param, peft_model, AdapterMixer(peft_model, EXPERTS)


def logits(peft_model, kind, rows=slice(None)):
    with torch.no_grad():
        return peft_model.get_base_model()(**{key: value[rows] for key, value in INPUTS[kind].items()}).logits


def by_peft(peft_model, kind, expert):
    """What peft computes with one adapter active."""
    peft_model.base_model.enable_adapter_layers()
    peft_model.set_adapter(expert)
    expected = logits(peft_model, kind)
    peft_model.base_model.disable_adapter_layers()
    return expected


def test_each_sample_gets_its_own_expert_and_some_none(loaded):
    kind, peft_model, mixer = loaded
    plain = logits(peft_model, kind)
    one_hot = torch.eye(3)
    coefficients = torch.stack([mixer.uniform(one_hot[e])[0] for e in (2, 0, 1)] + [mixer.uniform(torch.zeros(3))[0]])
    with mixer.using(coefficients):
        mixed = logits(peft_model, kind)
    assert torch.allclose(mixed[3], plain[3], atol=1e-6)
    for row, expert in ((0, EXPERTS[2]), (1, EXPERTS[0]), (2, EXPERTS[1])):
        expected = by_peft(peft_model, kind, expert)[row]
        assert torch.allclose(mixed[row], expected, atol=1e-5)
        assert not torch.allclose(mixed[row], plain[row], atol=1e-3)
    assert torch.equal(logits(peft_model, kind), plain)  # outside, the base alone


def test_a_mixed_batch_gives_what_each_sample_gives_alone(loaded):
    kind, peft_model, mixer = loaded
    coefficients = torch.rand(4, len(mixer.layers), 3, generator=torch.Generator().manual_seed(0))
    coefficients[0, 0, 1] = coefficients[1, -1] = 0
    with mixer.using(coefficients):
        together = logits(peft_model, kind)
    for row in range(4):
        with mixer.using(coefficients[row : row + 1]):
            alone = logits(peft_model, kind, slice(row, row + 1))
        assert torch.allclose(together[row], alone[0], atol=1e-5)


def test_coefficients_count_per_layer(loaded):
    kind, peft_model, mixer = loaded
    last = mixer.uniform(torch.zeros(3)).clone()
    last[0, -1, 0] = 0.5
    with mixer.using(last):
        mixed = logits(peft_model, kind)
    plain = logits(peft_model, kind)
    for path, module in mixer.modules.items():  # the same, merged by hand
        delta = mixer.delta(path, EXPERTS[0])
        if mixer.layer_index[path] == len(mixer.layers) - 1 and delta is not None:
            module.get_base_layer().weight.data += 0.5 * delta
    assert torch.allclose(logits(peft_model, kind), mixed, atol=1e-5)
    assert not torch.allclose(mixed, plain, atol=1e-4)


def test_rows_follow_their_samples_when_a_batch_is_expanded(loaded):
    kind, peft_model, mixer = loaded
    coefficients = torch.stack([mixer.only(name)[0] for name in EXPERTS[:2]])
    rows = [0, 0, 1, 1]
    with mixer.using(coefficients[rows]):
        expected = logits(peft_model, kind, rows)
    with mixer.using(coefficients):
        assert torch.allclose(logits(peft_model, kind, rows), expected, atol=1e-6)
        with pytest.raises(UserError, match="routing is of 2 samples, but a batch of 3"):
            logits(peft_model, kind, slice(0, 3))


def test_layers_are_told_by_the_first_number_of_a_path():
    assert layer_of("model.layers.3.mlp.up_proj") == "model.layers.3"
    assert layer_of("encoder.block.0.layer.1.DenseReluDense.wi") == "encoder.block.0"
    assert layer_of("classifier") == "classifier"
