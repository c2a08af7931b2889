"""Training the router: early stopping on held-out inputs, accuracy and threshold on inputs it has not seen.

With every batch come as many outliers, which are to be nobody's: mixtures of two experts' inputs, and inputs some of
whose features are those of other inputs. Both lie near the experts' inputs, off what makes them what they are, so that
the router learns to claim no more than it has seen. Background inputs, if there are any, are outliers too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from neuron_methods.routing.route_yaml import RouterSettings
from neuron_methods.routing.routed_files import RouterShape
from neuron_methods.routing.router import Router, axes_for, threshold_for

_BATCH = 128


@dataclass(frozen=True)
class Inputs:
    """Pooled hidden states float32 (n, width) and the expert each belongs to, int64 (n,)."""

    states: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def halves(self) -> tuple[Inputs, Inputs]:
        """Deal every expert's inputs out to two, the odd one to the first."""
        turn = torch.empty_like(self.labels)
        for expert in self.labels.unique():
            places = (self.labels == expert).nonzero().squeeze(1)
            turn[places] = torch.arange(len(places)) % 2
        return tuple(Inputs(self.states[turn == half], self.labels[turn == half]) for half in (0, 1))


@dataclass(frozen=True)
class RouterReport:
    """What came of the training.

    Attributes:
        epochs: trained for.
        accuracy: share of held-out inputs whose first expert is their own.
        accuracies: the same per expert, in the experts' order.
        held_out: how many inputs that is.
        in_domain: share of the held-out inputs that pass the threshold.
        training: how many inputs it was trained on.
    """

    epochs: int
    accuracy: float
    accuracies: list[float]
    held_out: int
    in_domain: float
    training: int


def train_router(
    train: Inputs,
    calibration: Inputs,
    settings: RouterSettings,
    background: Tensor | None = None,
    layers: tuple[int, ...] = (),
) -> tuple[Router, RouterReport]:
    """Train a router.

    Half of the calibration inputs decide when training ends and where the out-of-domain threshold lies; the other half
    has no say in anything, and is what accuracy and share in domain are reported on.

    Args:
        train: every expert is there, and counts the same however many inputs it has.
        calibration: held-out inputs, at least two of each expert.
        settings: see there.
        background: hidden states (n, width) of inputs that no expert is for.
        layers: where the hidden states come from, to be noted.
    """
    decide, held_out = calibration.halves()
    experts = int(train.labels.max()) + 1
    width = train.states.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        given = settings.model_dump(include={"pooling", "hidden", "top_k", "temperature", "ood_score"})
        router = Router(RouterShape(layers, width=width, axes=axes_for(len(train), width), **given), experts)
        router.fit_scatter(train.states, train.labels)
        epochs = _fit(router, train, decide, settings, background)
    router.requires_grad_(False).eval()
    router.fit_scores(decide.states)
    _, scores = router(decide.states)
    router.threshold = threshold_for(scores, settings.in_domain_share, settings.ood_margin)
    probabilities, scores = router(held_out.states)
    right = probabilities.argmax(1) == held_out.labels
    report = RouterReport(
        epochs=epochs,
        accuracy=float(right.float().mean()),
        accuracies=[float(right[held_out.labels == e].float().mean()) for e in range(experts)],
        held_out=len(held_out),
        in_domain=float((scores >= router.threshold).float().mean()),
        training=len(train),
    )
    return router, report


def _fit(router: Router, train: Inputs, decide: Inputs, settings: RouterSettings, background: Tensor | None) -> int:
    """Train in place and keep the weights of the best epoch; returns how many epochs were trained."""
    experts = len(router.centres)
    counts = torch.bincount(train.labels, minlength=experts).float()
    balance = counts.sum() / (experts * counts)
    weights = torch.cat((balance, torch.ones(1)))
    optimizer = torch.optim.AdamW(
        [*router.inner.parameters(), *router.outer.parameters()], lr=settings.learning_rate, weight_decay=0.01
    )
    best, best_loss, since = None, float("inf"), 0
    epoch = 0
    while epoch < settings.epochs and since < settings.patience:
        epoch += 1
        for places in torch.randperm(len(train)).split(_BATCH):
            outliers = _outliers(train, places, background)
            states = torch.cat((train.states[places], outliers))
            labels = torch.cat((train.labels[places], torch.full((len(outliers),), experts)))
            loss = functional.cross_entropy(router.logits(states), labels, weight=weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            held = float(functional.cross_entropy(router.logits(decide.states)[:, :-1], decide.labels, weight=balance))
        if held < best_loss:
            best = {key: value.clone() for key, value in router.state_dict().items()}
            best_loss, since = held, 0
        else:
            since += 1
    router.load_state_dict(best)
    return epoch


def _outliers(train: Inputs, places: Tensor, background: Tensor | None) -> Tensor:
    """Inputs that are to be nobody's, (about twice as many as `places`, width)."""
    count, width = len(places), train.states.shape[1]
    one, other = torch.randint(len(train), (2, count))
    share = torch.rand(count, 1) * 0.6 + 0.2
    mixed = (share * train.states[one] + (1 - share) * train.states[other])[train.labels[one] != train.labels[other]]
    # Every feature of a stranger comes from an input of its own.
    strangers = train.states[torch.randint(len(train), (count, width)), torch.arange(width)]
    exchanged = torch.rand(count, width) < torch.rand(count, 1) * 0.9 + 0.1
    parts = [mixed, torch.where(exchanged, strangers, train.states[places])]
    if background is not None:
        parts.append(background[torch.randint(len(background), (count,))])
    return torch.cat(parts)
