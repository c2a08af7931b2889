"""What of a routed model is ours: its card tells it, and examples/routing/README.md."""

from __future__ import annotations

from neuron_methods.routing.routed_files import RoutedConfig
from neuron_methods.support.sources import ours

OURS = (
    ours(
        "how each of the three stages (Liang, reviews) goes in detail, as no equation was at hand: which layers an "
        "expert loses and which neurons it keeps, what the router reads and how it learns, and what fills the layers "
        "that are lost"
    ),
    ours("the router reads the mean and the standard deviation of the base's hidden states", pooling="moments"),
    ours("the router has a class for nobody's inputs, and learns it from outliers made of the experts' inputs"),
    ours("an input that no expert claims, by a threshold from calibration data, is left to the base"),
    ours(
        "the score that is held against that threshold is the lower of the energy of the router's logits and the "
        "distance to the nearest expert's inputs",
        ood_score="combined",
    ),
    ours(
        "an input is answered by the head of its first expert; by the base's own where no expert claims it, and where "
        "the base has none, by the nearest expert",
        heads="own",
    ),
    ours(
        "a layer that is redundant for the first expert is filled by the other chosen experts that have an update "
        "there, by the router's weights renormalised among them",
        redundant="others",
    ),
)


def own_choices(config: RoutedConfig) -> list[str]:
    """Tell what of a routed model is ours, a clause each."""
    values = {"pooling": [config.router.pooling], "ood_score": [config.router.ood_score]}
    values["heads"] = ["base" if config.architecture is None else "own"]
    values["redundant"] = [config.redundant]
    return [own.text for own in OURS if own.holds(values)]
