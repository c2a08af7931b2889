"""Stage 3: from what the router says of an input to how much of each expert every layer gets.

That layers are merged for each input is MIN-Merging's (Liang, reviews); the weights are ours. Input b has probabilities
p over experts. The `top_k` largest are chosen, and their weights w are p renormalised over them. Let e be the first of
them. A layer that is core to e gets e's update alone; a layer that is redundant for e gets Σ_j v_j τ_j over the other
chosen experts j that have an update there, with v_j = w_j / Σ_j w_j: e leaves the layer to them. (`router` takes w_j
itself, of which a router that is sure of e leaves next to nothing.) An input out of domain gets nobody's update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_methods.routing.route_yaml import Redundant


@dataclass(frozen=True)
class Routing:
    """How the samples of a batch are routed. B samples, E experts, L layers.

    Attributes:
        names: of the experts, in the order of the other attributes' columns.
        probabilities: float32 (B, E), the router's.
        weights: float32 (B, E), those of the chosen experts, which sum to 1; all 0 where the base answers alone.
        scores: float32 (B,), how much in domain a sample looks, larger is more.
        threshold: below it a sample is out of domain.
        coefficients: float32 (B, L, E), how much of an expert's update a layer gets.
    """

    names: tuple[str, ...]
    probabilities: Tensor
    weights: Tensor
    scores: Tensor
    threshold: float
    coefficients: Tensor

    @property
    def in_domain(self) -> Tensor:
        """Bool (B,)."""
        return self.scores >= self.threshold

    @property
    def experts(self) -> list[list[str]]:
        """Each sample's chosen experts, the first one first; none where the base answers alone."""
        order = self.weights.argsort(dim=1, descending=True).tolist()
        return [[self.names[e] for e in row if self.weights[b, e] > 0] for b, row in enumerate(order)]

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Routing:
        """Take the routing of some of the samples."""
        parts = (self.probabilities[index], self.weights[index], self.scores[index])
        return Routing(self.names, *parts, self.threshold, self.coefficients[index])

    def describe(self, sample: int) -> str:
        """Show a sample's routing in one line: ``german 0.98, python 0.02 (score -0.91, threshold -1.34)``."""
        score = f"score {self.scores[sample]:.3g}, threshold {self.threshold:.3g}"
        chosen = self.experts[sample]
        if not chosen:
            nearest = self.names[int(self.probabilities[sample].argmax())]
            return f"out of domain, base model alone ({score}; nearest expert {nearest})"
        shares = (f"{name} {self.weights[sample, self.names.index(name)]:.3g}" for name in chosen)
        outside = "" if self.in_domain[sample] else "out of domain, but the base has no head: "
        return f"{outside}{', '.join(shares)} ({score})"


def chosen_weights(probabilities: Tensor, top_k: int, in_domain: Tensor) -> Tensor:
    """Weigh the `top_k` most probable experts, renormalised; (B, E) like `probabilities`, whose rows sum to 1.

    Rows that are not `in_domain`, bool (B,), get all zeros.
    """
    values, places = probabilities.topk(top_k, dim=1)
    weights = torch.zeros_like(probabilities).scatter(1, places, values / values.sum(dim=1, keepdim=True))
    return weights * in_domain.unsqueeze(1)


def layer_coefficients(
    weights: Tensor, core: Tensor, there: Tensor, redundant: Redundant = "others", seed: int = 0
) -> Tensor:
    """Compute how much of each expert's update each layer gets, float32 (B, L, E).

    Args:
        weights: (B, E), as `chosen_weights` makes them.
        core: bool (L, E): whether a layer is core to an expert.
        there: bool (L, E): whether an expert has an update in a layer.
        redundant: what layers get that are redundant for the first expert: the `others` that are chosen, by their
            weights among those that are there; ``router``: by their weights as they are; ``random``: one of the others
            at full strength, drawn per layer and expert from `seed` (the ablation that shows whether the router's
            choice matters), ``none``: nothing.
        seed: of the draw.
    """
    first = weights.argmax(dim=1)
    alone = torch.nn.functional.one_hot(first, weights.shape[1]).to(weights.dtype)
    if redundant in ("others", "router"):
        others = (weights * (1 - alone)).unsqueeze(1) * there.to(weights)
        if redundant == "others":
            total = others.sum(dim=2, keepdim=True)
            others = torch.where(total > 0, others / total, 0.0)
    elif redundant == "random":
        others = _random_others(core, seed).to(weights)[first]
    else:
        others = torch.zeros_like(weights).unsqueeze(1)
    is_core = core.T.to(weights.device)[first].unsqueeze(2)  # (B, L, 1)
    mixed = torch.where(is_core, alone.unsqueeze(1), others)
    return mixed * weights.any(dim=1).view(-1, 1, 1)


def _random_others(core: Tensor, seed: int) -> Tensor:
    """(E, L, E): for every first expert and layer, 1 at one other expert."""
    layers, experts = core.shape
    steps = torch.randint(1, experts, (experts, layers), generator=torch.Generator().manual_seed(seed))
    drawn = (torch.arange(experts).unsqueeze(1) + steps) % experts
    return torch.nn.functional.one_hot(drawn, experts)
