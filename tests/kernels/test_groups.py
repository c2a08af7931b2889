from __future__ import annotations

import torch

from neuron_methods.kernels.groups import NO_DOMAIN, domain_shares, label_neurons


def test_shares_count_the_top_activations_of_each_domain() -> None:
    math = torch.tensor([[9.0, 8.0, 7.0], [1.0, 0.5, 0.1]])
    code = torch.tensor([[6.0, 5.0, 4.0], [-3.0, 0.8, 0.2]])
    # Neuron 0: top three all math. Neuron 1: 3.0 code, 1.0 math, 0.8 code.
    shares = domain_shares([math, code], [100, 100])
    assert torch.allclose(shares, torch.tensor([[1.0, 0.0], [1 / 3, 2 / 3]]).double())


def test_shares_are_corrected_for_the_tokens_of_each_domain() -> None:
    math, code = torch.tensor([[4.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    # One place each, but code had a third of the tokens to win it with.
    assert torch.allclose(domain_shares([math, code], [300, 100]), torch.tensor([[0.25, 0.75]]).double())


def test_a_silent_neuron_has_no_shares() -> None:
    assert not domain_shares([torch.zeros(2, 3), torch.zeros(2, 3)], [10, 10]).any()


def test_labels_need_the_threshold_a_sole_maximum_and_firing() -> None:
    shares = torch.tensor([[0.7, 0.3], [0.55, 0.45], [0.5, 0.5], [0.0, 0.0], [0.1, 0.9], [0.4, 0.6]]).double()
    firing = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.001], [0.0, 0.5]])
    labels = label_neurons(shares, firing, threshold=0.6, min_firing=0.01)
    assert labels.tolist() == [0, NO_DOMAIN, NO_DOMAIN, NO_DOMAIN, NO_DOMAIN, 1]
    assert label_neurons(shares, firing, threshold=0.0, min_firing=0.0).tolist() == [0, 0, NO_DOMAIN, NO_DOMAIN, 1, 1]
