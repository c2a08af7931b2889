"""Stage 2: the router, a small MLP on pooled hidden states, and how it tells what is out of domain.

The MLP has one output per expert and one for *nobody*: beside the experts' inputs it is trained on outliers, made from
the inputs themselves (`router_training`) or given as background data. Probabilities are over the experts alone.

An input goes to the plain base when its score does not reach a threshold. That, nobody's class, and the choice of
scores are ours:

- ``probability``: the largest p_e over experts and nobody;
- ``energy``: T · log Σ_e exp(z_e / T) of the experts' logits z at temperature T (Liu et al., arXiv:2010.03759);
- ``distance``: minus the root mean square distance to the nearest expert's mean in the pooled hidden states, measured
  in the metric of the scatter within experts (after Lee et al., arXiv:1807.03888): axes of large scatter count little.
  The covariance is that of probabilistic PCA: the leading axes with their variances, the rest with one variance;
- ``combined``: the lower of energy and distance, each less its median over in-domain inputs, in units of the gap from
  there to the score that one in twenty of them fall short of. Text of another kind is far away in distance, and an MLP
  may still be sure of itself there; images that look alike from afar are told apart by what the MLP has learnt.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from neuron_methods.routing.route_yaml import OodScore
from neuron_methods.routing.routed_files import RouterShape
from neuron_methods.routing.stored import read_tensors


class Router(nn.Module):
    """Tells from pooled hidden states (B, width) which expert an input belongs to.

    Attributes:
        shape: how it is made, and what it decides by.
        threshold: inputs with a lower score are out of domain.
    """

    def __init__(self, shape: RouterShape, experts: int) -> None:
        """Make an untrained router for so many experts."""
        super().__init__()
        self.shape, self.threshold = shape, shape.ood_threshold
        width, hidden, axes = shape.width, shape.hidden, shape.axes
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, experts + 1)  # the last one is nobody's
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("centres", torch.zeros(experts, width))
        self.register_buffer("axes", torch.zeros(width, axes))
        self.register_buffer("variances", torch.ones(axes))
        self.register_buffer("rest_variance", torch.ones(()))
        # Of energy and distance over in-domain inputs: the median, and its gap to the 5 % quantile.
        self.register_buffer("usual", torch.zeros(2))
        self.register_buffer("gap", torch.ones(2))

    @classmethod
    def load(cls, path: Path, shape: RouterShape, experts: int) -> Router:
        """Read a trained router, once its file is known to hold tensors of the right shapes.

        Raises:
            UserError: it cannot be read, has other tensors, or holds what is no number.
        """
        with torch.device("meta"):
            expected = {key: list(value.shape) for key, value in cls(shape, experts).state_dict().items()}
        state = read_tensors(path, expected)
        router = cls(shape, experts)
        router.load_state_dict(state)
        return router

    def standardised(self, states: Tensor) -> Tensor:
        """Bring hidden states to mean 0 and deviation 1 over the training inputs, in the router's dtype and place."""
        return (states.to(self.mean) - self.mean) / self.scale

    def logits(self, states: Tensor) -> Tensor:
        """Compute (B, experts + 1), the last one nobody's; not yet divided by the temperature."""
        return self.outer(functional.gelu(self.inner(self.standardised(states))))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Compute probabilities (B, experts), and scores (B,) of which larger ones look more in domain."""
        logits = self.logits(states) / self.shape.temperature
        return logits[:, :-1].softmax(dim=1), self.scores(states, logits, self.shape.ood_score)

    def scores(self, states: Tensor, logits: Tensor, kind: OodScore) -> Tensor:
        """Measure how much in domain inputs look, (B,); `logits` are divided by the temperature."""
        if kind == "probability":
            return logits.softmax(dim=1)[:, :-1].amax(1)
        if kind == "combined":
            both = torch.stack([self.scores(states, logits, part) for part in ("energy", "distance")], dim=1)
            return ((both - self.usual) / self.gap).amin(1)
        if kind == "energy":
            return self.shape.temperature * logits[:, :-1].logsumexp(dim=1)
        return -self._distances(states).amin(1)

    @torch.no_grad()
    def fit_scores(self, states: Tensor) -> None:
        """Set what ``combined`` takes for usual, from in-domain inputs that were not trained on."""
        logits = self.logits(states) / self.shape.temperature
        for number, kind in enumerate(("energy", "distance")):
            scores = self.scores(states, logits, kind)
            self.usual[number] = scores.median()
            self.gap[number] = (scores.median() - scores.quantile(0.05)).clamp(min=1e-6)

    def _distances(self, states: Tensor) -> Tensor:
        """To every expert's centre, (B, experts); about 1 for the inputs they were fitted to."""
        gaps = self.standardised(states).unsqueeze(1) - self.centres  # (B, E, width)
        along = gaps @ self.axes
        rest = (gaps.square().sum(2) - along.square().sum(2)).clamp(min=0)
        squares = (along.square() / self.variances).sum(2) + rest / self.rest_variance
        return (squares / gaps.shape[2]).sqrt()

    @torch.no_grad()
    def fit_scatter(self, states: Tensor, labels: Tensor) -> None:
        """Set the standardisation, the centres and the metric from training inputs, each expert's at least once.

        States are float32 (n, width), labels int64 (n,).
        """
        self.mean.copy_(states.mean(0))
        # What never varies carries nothing, and must not be blown up where it does vary.
        spread = states.std(0)
        self.scale.copy_(spread.clamp(min=1e-3 * float(spread.mean()) + 1e-12))
        normal = self.standardised(states)
        for expert in range(len(self.centres)):
            self.centres[expert] = normal[labels == expert].mean(0)
        within = normal - self.centres[labels]
        _, singular, axes = torch.linalg.svd(within.double(), full_matrices=False)
        variances = singular.square() / len(within)
        kept = self.axes.shape[1]
        self.axes.copy_(axes[:kept].T)
        rest = float(variances[kept:].sum()) / max(normal.shape[1] - kept, 1)
        floor = 1e-3 * float(variances.sum()) / normal.shape[1] + 1e-12
        self.variances.copy_(variances[:kept].clamp(min=floor))
        self.rest_variance.fill_(max(rest, floor))


def axes_for(inputs: int, width: int) -> int:
    """Count how many axes of the scatter that many inputs can tell: an eighth as many, 64 at most."""
    return max(1, min(64, inputs // 8, width - 1))


def threshold_for(scores: Tensor, share: float, margin: float = 0.0) -> float:
    """Find the largest threshold that at least `share` of the scores reach, less `margin` × its gap to their median."""
    ordered = scores.sort(descending=True).values
    needed = max(1, min(len(ordered), int(-(-share * len(ordered) // 1))))
    threshold = ordered[needed - 1]
    return float(threshold - margin * (scores.median() - threshold).clamp(min=0))
