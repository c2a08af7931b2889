"""Stage 3 on paper: weights and coefficients of small examples, worked out by hand."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from neuron_methods.routing.routes import Routing, chosen_weights, layer_coefficients

P = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
# Layer 0 is core to all; layer 1 redundant for expert 0; layer 2 for experts 0 and 2.
CORE = torch.tensor([[True, True, True], [False, True, True], [False, True, False]])


def test_the_most_probable_experts_are_chosen_and_their_weights_renormalised():
    weights = chosen_weights(P, 2, torch.tensor([True, False]))
    assert torch.allclose(weights, torch.tensor([[2 / 3, 1 / 3, 0], [0, 0, 0]]))


EVERYWHERE = torch.ones_like(CORE)


def test_core_layers_come_from_the_first_expert_alone_and_redundant_ones_from_the_others_chosen():
    weights = chosen_weights(P, 2, torch.tensor([True, True]))
    coefficients = layer_coefficients(weights, CORE, EVERYWHERE, "router")
    assert torch.allclose(coefficients[0], torch.tensor([[1.0, 0, 0], [0, 1 / 3, 0], [0, 1 / 3, 0]]))
    assert torch.allclose(coefficients[1, :2], torch.tensor([[0.0, 0, 1], [0, 0, 1]]))
    assert torch.allclose(coefficients[1, 2].sum(), torch.tensor(0.25)) and coefficients[1, 2, 2] == 0


def test_a_layer_that_the_first_leaves_to_others_is_theirs_by_weights_that_sum_to_1():
    weights = chosen_weights(torch.tensor([[0.98, 0.015, 0.005]]), 3, torch.tensor([True]))
    (found,) = layer_coefficients(weights, CORE, EVERYWHERE)
    assert torch.allclose(found, torch.tensor([[1.0, 0, 0], [0, 0.75, 0.25], [0, 0.75, 0.25]]))


def test_of_the_others_only_those_that_have_an_update_there_share_a_layer():
    weights = chosen_weights(torch.tensor([[0.98, 0.015, 0.005]]), 3, torch.tensor([True]))
    there = torch.tensor([[True, True, True], [True, False, True], [True, False, False]])
    (found,) = layer_coefficients(weights, CORE, there)
    assert torch.allclose(found, torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0, 0, 0]]))


def test_out_of_domain_gets_nobodys_update():
    weights = chosen_weights(P, 3, torch.tensor([False, False]))
    for redundant in ("others", "router", "random", "none"):
        assert not layer_coefficients(weights, CORE, EVERYWHERE, redundant).any()


def test_random_assignment_takes_one_other_expert_at_full_strength_and_follows_its_seed():
    core = torch.zeros(40, 3, dtype=torch.bool)
    weights = chosen_weights(P, 2, torch.tensor([True, True]))
    drawn = layer_coefficients(weights, core, ~core, "random", seed=1)
    assert torch.equal(drawn.sum(2), torch.ones(2, 40))
    assert not drawn[0, :, 0].any() and not drawn[1, :, 2].any()
    assert drawn[0, :, 1].any() and drawn[0, :, 2].any()  # also who was not chosen
    assert torch.equal(drawn, layer_coefficients(weights, core, ~core, "random", seed=1))
    assert not torch.equal(drawn, layer_coefficients(weights, core, ~core, "random", seed=2))


def test_nothing_in_redundant_layers():
    coefficients = layer_coefficients(chosen_weights(P, 3, torch.tensor([True, True])), CORE, EVERYWHERE, "none")
    assert torch.equal(coefficients[0], torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]))


@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 99))
def test_a_sample_never_depends_on_the_others_of_its_batch(experts, layers, seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(4, experts, generator=generator).softmax(1)
    core = torch.rand(layers, experts, generator=generator) < 0.5
    there = torch.rand(layers, experts, generator=generator) < 0.7
    inside = torch.rand(4, generator=generator) < 0.7
    together = layer_coefficients(chosen_weights(probabilities, 2, inside), core, there)
    for b in range(4):
        alone = layer_coefficients(chosen_weights(probabilities[b : b + 1], 2, inside[b : b + 1]), core, there)
        assert torch.equal(together[b], alone[0])


def test_a_routing_tells_its_samples_experts():
    weights = chosen_weights(P, 2, torch.tensor([True, False]))
    routing = Routing(
        ("a", "b", "c"), P, weights, torch.tensor([-0.5, -3.0]), -1.0, layer_coefficients(weights, CORE, EVERYWHERE)
    )
    assert routing.experts == [["a", "b"], []]
    assert routing.in_domain.tolist() == [True, False]
    assert routing.describe(0) == "a 0.667, b 0.333 (score -0.5, threshold -1)"
    assert "out of domain" in routing.describe(1) and "nearest expert c" in routing.describe(1)
    assert routing[[1]].experts == [[]] and len(routing[[1]]) == 1
