"""Functional groups of neurons: who a neuron works for (NeuronMerge).

Ours, for want of a language model: NeuronMerge classifies neurons by descriptions of them (Gu et al., abstract),
2025.findings-acl.471.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Label of a neuron that works for no domain in particular.
NO_DOMAIN = -1


def domain_shares(top_activations: Sequence[Tensor], tokens: Sequence[int]) -> Tensor:
    """Compute each domain's share in a neuron's top activations, corrected for how many tokens the domain contributed.

    The k largest |activations| over all domains are the neuron's top activations. With c_d of them in domain d, which
    contributed n_d tokens, the share is (c_d / n_d) / Σ_e (c_e / n_e): what it would be had all contributed alike.

    Args:
        top_activations: per domain the k largest activations of every neuron, shape (neurons, k); 0 is an empty place.
        tokens: n_d, the tokens each domain contributed.

    Returns:
        Shape (neurons, domains), float64; rows sum to 1, or are 0 where a neuron was never active.
    """
    sizes = torch.cat([values.abs() for values in top_activations], dim=1)
    k = max(values.shape[1] for values in top_activations)
    owner = torch.cat([torch.full_like(values[0], d, dtype=torch.int64) for d, values in enumerate(top_activations)])
    largest, places = sizes.topk(min(k, sizes.shape[1]), dim=1)
    counts = sizes.new_zeros(len(sizes), len(top_activations), dtype=torch.float64)
    counts.scatter_add_(1, owner[places], (largest > 0).double())
    rates = counts / counts.new_tensor([max(1, n) for n in tokens])
    return rates / rates.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def label_neurons(shares: Tensor, firing_rates: Tensor, threshold: float, min_firing: float) -> Tensor:
    """Classify every neuron: the domain with the largest share if that passes the threshold, else general.

    Args:
        shares: from `domain_shares`, shape (neurons, domains).
        firing_rates: share of a domain's tokens on which the neuron fires, shape (neurons, domains).
        threshold: smallest share that makes a neuron its domain's; a tie for the largest share never does.
        min_firing: a neuron that fires more rarely than this in its domain is general: too little to judge by.

    Returns:
        Shape (neurons,), int64: index of the domain, or `NO_DOMAIN`.
    """
    best, domain = shares.max(dim=1)
    sole = (shares == best.unsqueeze(1)).sum(dim=1) == 1
    fires = firing_rates.gather(1, domain.unsqueeze(1)).squeeze(1) >= min_firing
    return torch.where((best > 0) & (best >= threshold) & sole & fires, domain, NO_DOMAIN)
